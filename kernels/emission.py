"""What a scan is asked to emit beside its output, and what it emitted."""

import operator
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float, Float64, Inexact
from torch import Tensor

__all__ = ["EMITTABLE", "STATE_SIZED", "Emission", "Emit"]

EMITTABLE = ("delta", "A_bar", "B_bar", "B", "C", "h", "y", "delta_cumsum", "energy", "mass", "mass_distance")
"""Names a scan can emit."""

STATE_SIZED = ("A_bar", "B_bar", "h")
"""Those with a state axis that the scan computes: as large as the state at every token."""

NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Emit:
    """What is asked of a scan: which variables, at which tokens, of which heads.

    Source: ours. What is not named is neither computed nor allocated.

    mass and mass_distance say how much a token can read of what all tokens of this call up to it wrote, and how many
    tokens back that lies on average, by a recurrence of their own over the states n:

        m_t = |A_bar_t| m_{t-1} + |B_bar_t|                 mass_t = sum_n |C_t| m_t
        d_t = |A_bar_t| (d_{t-1} + m_{t-1})                 mass_distance_t = sum_n |C_t| d_t / mass_t

    Args:
        variables: names out of `EMITTABLE`, each once.
        tokens: strictly increasing token indices of this call, None for all.
        channels: distinct indices on the head axis (Mamba-1: its channels), None for all. B and C have no
            head axis and ignore them.
        dtype: float32, bfloat16 or float16, to which A_bar, B_bar and h are rounded; None for the compute dtype.

    Raises:
        ValueError: for an unknown or repeated variable, tokens that do not increase, repeated channels,
            negative indices, an empty selection, or another dtype.

    >>> Emit(("delta", "h"), tokens=[0, 5]).tokens
    (0, 5)
    >>> Emit(("delat",))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no scan emits 'delat' (`variables`); did you mean 'delta'? Known: delta, A_bar, B_bar, B, C, h, y, ...
    """

    variables: tuple[str, ...] = ()
    tokens: Sequence[int] | None = None
    channels: Sequence[int] | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "variables", _names(self.variables))
        object.__setattr__(self, "tokens", _indices("tokens", self.tokens))
        object.__setattr__(self, "channels", _indices("channels", self.channels))
        if self.tokens is not None and list(self.tokens) != sorted(self.tokens):
            raise ValueError(f"`tokens` must increase strictly; got {_shown(self.tokens)}")
        if self.dtype is not None and self.dtype not in NARROW:
            known = ", ".join(str(dtype) for dtype in NARROW)
            raise ValueError(f"`dtype` of an emission must be None or one of {known}; got {self.dtype!r}")

    def rounded(self, name: str, value: Tensor) -> Tensor:
        """`value` of variable `name` in the dtype asked for."""
        return value if self.dtype is None or name not in STATE_SIZED else value.to(self.dtype)

    def positions(self, start: int, stop: int) -> slice | list[int]:
        """Asked-for tokens of the block [start, stop) of a call, as an index into that block."""
        if self.tokens is None:
            return slice(None)
        low, high = (bisect_left(self.tokens, edge) for edge in (start, stop))
        return [token - start for token in self.tokens[low:high]]

    def tokens_of(self, block: Tensor, start: int = 0) -> Tensor:
        """The asked-for tokens of a block (batch, token, ...) that starts at token `start`; no copy of all."""
        return block if self.tokens is None else block[:, self.positions(start, start + block.shape[1])]

    def heads_of(self, value: Tensor, axis: int) -> Tensor:
        """The asked-for heads of a tensor whose heads lie along `axis`; no copy of all."""
        return value if self.channels is None else value[(slice(None),) * axis + (list(self.channels),)]


@dataclass(frozen=True)
class Emission:
    """What a scan emitted; None where it was not asked for. The token and head axes hold the selection only.

    What is computed has the scan's compute dtype (float32, or float64 for float64 inputs), unless `Emit.dtype` narrows
    A_bar, B_bar and h; B and C have that of the inputs, delta_cumsum is float64; with complex A, A_bar, B_bar, B, C and
    h are complex. A_bar has no state axis where A has none (Mamba-2). Constant B and C are repeated at every token.
    y includes D x and is before the gate. energy is the sum of |h|^2 over the states.

    mass and mass_distance (tokens; NaN where mass is 0) are those of `Emit`, sums over a conjugate pair where A is
    complex. mass_t is at least the sum over s of |alpha_t[s]|, hidden attention, and equal to it where the terms of a
    source have one sign: with one real state, or real B and C >= 0. They start at zero with every call, since the
    tokens behind an initial_state are not known: it is not counted.
    """

    delta: Float[Tensor, "batch token head"] | None = None
    A_bar: Inexact[Tensor, "batch token head *state"] | None = None
    B_bar: Inexact[Tensor, "batch token head state"] | None = None
    B: Inexact[Tensor, "batch token group state"] | None = None
    C: Inexact[Tensor, "batch token group state"] | None = None
    h: Inexact[Tensor, "batch token head head_channel state"] | None = None
    y: Float[Tensor, "batch token head head_channel"] | None = None
    delta_cumsum: Float64[Tensor, "batch token head"] | None = None
    energy: Float[Tensor, "batch token head head_channel"] | None = None
    mass: Float[Tensor, "batch token head"] | None = None
    mass_distance: Float[Tensor, "batch token head"] | None = None


def _names(variables: Sequence[str]) -> tuple[str, ...]:
    if isinstance(variables, str):
        raise ValueError(f"`variables` must be a tuple of names; got the string {variables!r}: write ({variables!r},)")
    if not isinstance(variables, Sequence | Set):
        raise ValueError(f"`variables` must be a tuple of names; got {type(variables).__name__}")
    for name in variables:
        if name not in EMITTABLE:
            near = get_close_matches(str(name), EMITTABLE, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"no scan emits {name!r} (`variables`){hint} Known: {', '.join(EMITTABLE)}")
    if len(set(variables)) < len(variables):
        raise ValueError(f"`variables` names one twice: {', '.join(variables)}")
    return tuple(variables)


def _indices(name: str, indices: Sequence[int] | None) -> tuple[int, ...] | None:
    if indices is None:
        return None
    try:
        chosen = tuple(operator.index(index) for index in indices)
    except TypeError as error:
        raise ValueError(f"`{name}` must be a sequence of integers or None; got {indices!r}") from error
    if not chosen:
        raise ValueError(f"`{name}` is empty; None means all, and no `variables` means that nothing is emitted")
    if min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"`{name}` must be distinct and not negative; got {_shown(chosen)}")
    return chosen


def _shown(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
