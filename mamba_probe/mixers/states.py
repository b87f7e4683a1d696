"""A scan that is interrupted where the state is edited, and goes on from what the edit left."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from mamba_probe.kernels.emission import Emission, Emit
from mamba_probe.kernels.scan import ScanResult, selective_scan

__all__ = ["interrupted"]

UNKNOWN = ("mass", "mass_distance")
"""What cannot be emitted in pieces: recurrences that start with every call."""


def interrupted(
    given: Mapping[str, Tensor | None], fixed: Mapping[str, Any], state: Tensor | None, emit: Emit | None,
    tokens: list[int], edit: Callable[..., Tensor],
) -> ScanResult:  # fmt: skip
    """`selective_scan` in pieces that end with each of `tokens`, whose state is what `edit` makes of it.

    The output of such a token reads the edited state: h'_t goes in, y_t = C_t h'_t + D x_t comes out, by one step of
    length delta = 0, which neither decays nor writes.

    Args:
        given: what there is of every token (a constant B or C has no token axis), by the names of `selective_scan`;
            delta as it is executed.
        fixed: its other arguments.
        state: (batch, head, head_channel, state) before the first token.
        edit: of a state (batch, 1, head, head_channel, state) and its token in this call.

    Raises:
        ValueError: mass or mass_distance is to be emitted.
    """
    if emit is not None and set(UNKNOWN) & set(emit.variables):
        raise ValueError("mass and mass_distance cannot be emitted where a state is edited: they do not know of it")
    length = _length(given)
    pieces: list[ScanResult] = []
    start = 0
    for token in tokens:
        if token > start:
            state = _add(pieces, _run(given, fixed, state, emit, start, token))
        stepped = _run(given, fixed, state, emit, token, token + 1)
        state = edit(stepped.last_state[:, None], at=token)[:, 0]
        still = {name: _stilled(name, value) for name, value in given.items()}
        read = _run(still, fixed, state, emit, token, token + 1)
        kept = {name: getattr(read.emission, name) for name in ("h", "y", "energy")}
        _add(pieces, ScanResult(read.y, state, replace(stepped.emission, **kept)))
        start = token + 1
    if start < length:
        state = _add(pieces, _run(given, fixed, state, emit, start, length))
    assert state is not None
    return ScanResult(torch.cat([piece.y for piece in pieces], 1), state, _joined([piece.emission for piece in pieces]))


def _add(pieces: list[ScanResult], piece: ScanResult) -> Tensor:
    pieces.append(piece)
    return piece.last_state


def _length(given: Mapping[str, Tensor | None]) -> int:
    x = given["x"]
    assert x is not None
    return x.shape[1]


def _run(
    given: Mapping[str, Tensor | None], fixed: Mapping[str, Any], state: Tensor | None, emit: Emit | None, start: int,
    stop: int,
) -> ScanResult:  # fmt: skip
    """Tokens start .. stop - 1."""
    piece: dict[str, Any] = {name: _piece(name, value, start, stop) for name, value in given.items()}
    result = selective_scan(**piece, **fixed, initial_state=state, emit=_of(emit, start, stop))
    if result.emission.delta_cumsum is None:
        return result
    delta = given["delta"]
    assert delta is not None
    before = delta[:, :start].double().sum(1, keepdim=True)
    before = before if emit is None or emit.channels is None else before[:, :, list(emit.channels)]
    return result._replace(emission=replace(result.emission, delta_cumsum=result.emission.delta_cumsum + before))


def _piece(name: str, value: Tensor | None, start: int, stop: int) -> Tensor | None:
    if value is None or (name in "BC" and value.ndim == 2):
        return value
    return value[:, start:stop]


def _stilled(name: str, value: Tensor | None) -> Tensor | None:
    """Of a step of no length."""
    return torch.zeros_like(value) if value is not None and name in ("delta", "log_decay") else value


def _of(emit: Emit | None, start: int, stop: int) -> Emit | None:
    """What is to be emitted of a piece."""
    if emit is None or emit.tokens is None:
        return emit
    here = tuple(token - start for token in emit.tokens if start <= token < stop)
    return replace(emit, tokens=here) if here else None


def _joined(emissions: list[Emission]) -> Emission:
    """Pieces one after another."""
    made: dict[str, Tensor] = {}
    for name in (each.name for each in fields(Emission)):
        found = [value for value in (getattr(emission, name) for emission in emissions) if value is not None]
        if found:
            made[name] = torch.cat(found, 1)
    return Emission(**made)
