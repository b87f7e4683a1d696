"""The backward of `fused`: gradients of everything a scan took, from those of everything it answered. A (head, state).

The forward saves its inputs and the state before every SEGMENT-th token; the rest is computed again, a segment at a
time, while g = dL/dh goes back from the last token. With several chunks the kernel runs twice, as forward: first LOCAL,
for every chunk but the first, from nothing; then for every chunk, from what the later ones left.

Deterministic: what is a sum over rows (dB, dC), chunks or batch items (dA, dD, d delta_bias) is written in parts, one a
program, and summed in one order.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.backward_kernel import backward_kernel
from mamba_probe.kernels.scan.fused import SEGMENT, dense, multiprocessors
from mamba_probe.kernels.scan.launcher import blocks, fusible, padded, slots, start

__all__ = ["Tile", "Upstream", "backward", "backward_kernel", "choose_tile"]

WARPS = 8
"""That an SM holds at REGISTERS registers a thread: two on each of its four schedulers."""

REGISTERS = 255

LOCAL_COST = 0.25
"""Of a chunk's pass from nothing, beside its main pass."""

REFUSED = ("energy", "mass", "mass_distance")
"""Emitted, and without a gradient here."""


@dataclass(frozen=True)
class Upstream:
    """Gradients of what a scan answered, of that shape; None where nothing depends on it."""

    out: Tensor | None = None
    last_state: Tensor | None = None
    delta: Tensor | None = None
    A_bar: Tensor | None = None
    B_bar: Tensor | None = None
    h: Tensor | None = None
    y: Tensor | None = None
    delta_cumsum: Tensor | None = None
    energy: Tensor | None = None
    mass: Tensor | None = None
    mass_distance: Tensor | None = None


class Tile(NamedTuple):
    """What one program does: rows and tokens of a block, chunks of a sequence, tokens between two saved states, warps,
    registers a thread, states side by side in a thread."""

    rows: int
    tokens: int = 4
    chunks: int = 1
    segment: int = SEGMENT
    warps: int = 2
    registers: int = REGISTERS
    low: int = 4


def choose_tile(a: Arguments) -> Tile:
    """8 states a thread, and as many chunks of tokens as take the least rounds: a chunk more costs a LOCAL pass."""
    group_rows = a.heads_per_group * a.x.shape[3]
    warps = 2
    rows = max(4, min(64, 256 * warps // padded(a.B.shape[3])))
    if rows > padded(group_rows):
        rows, warps = rows // 2, 1
    programs = blocks(group_rows, rows) * a.x.shape[0] * a.B.shape[2]
    slots = WARPS // warps * multiprocessors(a.x.device)
    return Tile(rows, chunks=_choose_chunks(programs, slots, a.n_token), warps=warps)


@cache
def _choose_chunks(programs: int, slots: int, n_token: int) -> int:
    """Of whole segments, where `slots` programs run at once."""

    def cost(chunks: int) -> float:
        used = blocks(n_token, blocks(blocks(n_token, chunks), SEGMENT) * SEGMENT)
        rounds = blocks(programs * used, slots) * slots / (programs * used)
        return rounds * (1 + LOCAL_COST * (used - 1) / used)

    return min(range(1, max(1, n_token // SEGMENT) + 1), key=cost)


def backward(a: Arguments, states: Tensor | None, given: Upstream, tile: Tile | None = None) -> dict[str, Tensor]:
    """Gradients by the name of the argument, for each that was given; of its dtype, D (head, head_channel).

    states (batch, ceil(token / segment) - 1, head, head_channel, state), before tokens segment, 2 segment, ...: the
    forward's `states`, which may be None where there are none.

    Raises ValueError for gradients of an emitted energy, mass or mass_distance.
    """
    for name in REFUSED:
        if getattr(given, name) is not None:
            raise ValueError(f'backend "triton" has no gradient of the emitted `{name}`: use backend="cpu"')
    tile = tile or choose_tile(a)
    n_batch, n_token, n_head, head_channel = a.x.shape
    n_group, n_state = a.B.shape[2:]
    chunk = blocks(blocks(n_token, tile.chunks), tile.segment) * tile.segment
    n_chunk = blocks(n_token, chunk)
    n_block = blocks(a.heads_per_group * head_channel, tile.rows)
    low = min(tile.low, padded(n_state))
    inputs = *_inputs(a), states, _scratch(a, tile, n_batch * n_group * n_chunk * n_block)
    given_too = *_given(a, given), slots(a.emit.tokens, n_token, a.x.device), slots(a.emit.channels, n_head, a.x.device)
    tensors = *inputs, *given_too, *_between(a, n_chunk - 1)
    out = _outputs(a, n_chunk, n_block)
    kept_token, kept_head = a.kept
    sizes = (
        *(t.stride() for t in (a.x, a.delta, a.B, a.C, a.x if a.z is None else a.z)),
        (a.x if given.out is None else given.out).stride(),
        n_token, n_chunk, chunk, kept_token, n_batch, n_head, head_channel, n_group, n_state, kept_head,
        tile.rows, tile.tokens, tile.segment, padded(n_state) // low, low,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh", 1, tile.warps,
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": 1, "maxnreg": tile.registers}
    options["enable_fp_fusion"] = fusible(n_state)
    if n_chunk > 1:
        nothing = (None,) * len(out)
        start(backward_kernel, (n_block, n_chunk - 1, n_batch * n_group), *tensors, *nothing, *sizes, **options)
    start(backward_kernel, (n_block, n_chunk, n_batch * n_group), *tensors, *out.values(), *sizes, **options)
    return _gathered(a, **out)


def _inputs(a: Arguments) -> tuple[Tensor | None, ...]:
    more = dense(a.D), a.z, a.delta_bias, dense(a.starts), dense(a.log_decay), a.given_state
    return a.x, a.delta, a.A, a.B, a.C, *more


def _given(a: Arguments, given: Upstream) -> tuple[Tensor | None, ...]:
    emitted = (dense(getattr(given, name)) for name in ("A_bar", "B_bar", "h", "y"))
    return given.out, dense(given.last_state), dense(_of_delta(a, given)), *emitted


def _of_delta(a: Arguments, given: Upstream) -> Tensor | None:
    """The gradient of the emitted delta, and that of delta_cumsum: of a token, the sum over those from it on."""
    if given.delta_cumsum is None:
        return given.delta
    if a.emit.tokens is not None:
        raise ValueError("a gradient of `delta_cumsum` needs every token to be emitted: leave `emit.tokens` None")
    summed = given.delta_cumsum.flip(1).cumsum(1).flip(1).to(a.dtype)
    return summed if given.delta is None else given.delta + summed


def _scratch(a: Arguments, tile: Tile, n_program: int) -> Tensor | None:
    """Where each program keeps the states of one segment, one a block; None where those saved are as many."""
    if tile.segment == tile.tokens:
        return None
    shape = n_program, tile.segment // tile.tokens, tile.rows, padded(a.B.shape[3])
    return torch.empty(shape, dtype=a.dtype, device=a.x.device)


def _between(a: Arguments, n_chunk: int) -> tuple[Tensor | None, Tensor | None]:
    """What chunks leave for the earlier ones: log2 of their decay, and g before them from nothing."""
    if not n_chunk:
        return None, None
    n_batch, *rest = a.state_shape
    decay, local = torch.empty((2, n_batch, n_chunk, *rest), dtype=a.dtype, device=a.x.device)
    return decay, local


def _outputs(a: Arguments, n_chunk: int, n_block: int) -> dict[str, Tensor | None]:
    """What the kernel fills, in the order of its arguments: gradients, and parts of those that are sums."""
    n_batch, n_token, *rows = a.x.shape
    n_group, n_state = a.B.shape[2:]

    def empty(given: object, *shape: int, dtype: torch.dtype = a.dtype) -> Tensor | None:
        return None if given is None else torch.empty(shape, dtype=dtype, device=a.x.device)

    parts = n_block, n_batch, n_token, n_group, n_state
    return {
        "x": empty(a.x, *a.x.shape, dtype=a.x.dtype),
        "delta": empty(a.delta, *a.x.shape, dtype=a.delta.dtype if rows[1] == 1 else a.dtype),
        "A": empty(a.A, n_batch, n_chunk, *rows, n_state),
        **dict(zip("BC", torch.empty((2, *parts), dtype=a.dtype, device=a.x.device), strict=True)),
        "D": empty(a.D, n_batch, n_chunk, *rows),
        "z": empty(a.z, *a.x.shape, dtype=a.x.dtype if a.z is None else a.z.dtype),
        "delta_bias": empty(a.delta_bias, n_batch, n_chunk, *rows),
        "initial_state": empty(a.given_state, *a.state_shape),
        "log_decay": empty(a.log_decay, n_batch, n_token, *rows, n_state),
    }


def _gathered(a: Arguments, **out: Tensor | None) -> dict[str, Tensor]:
    """Sums over blocks, chunks, batch items and head channels, each in one order."""
    over = {"A": (0, 1, 3), "D": (0, 1), "delta_bias": (0, 1, 3), "delta": 3, "log_decay": 3}
    over |= {name: (0, 1, 2) if name in a.constant else 0 for name in "BC"}
    given: dict[str, Any] = vars(a) | {"initial_state": a.given_state}
    found = {}
    for name, value in out.items():
        if value is not None:
            alone = name == "delta" and value.shape[3] == 1
            summed = value[..., 0] if alone else value.sum(over[name]) if name in over else value
            found[name] = summed.to(given[name].dtype)
    return found
