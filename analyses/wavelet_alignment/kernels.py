"""Where kernels come from: a trace (`write`, `mixer`) or a Jacobian (`block`); blocks of heads, one (layer, row) each.

    write   k_t[s] = sum_n exp(A_n Cum(s, t)) delta_s                 the mixer with B and C at one
    mixer   k_t[s] = sum_n C_t[n] exp(A_n Cum(s, t)) delta_s B_s[n]   selection frozen at what was executed
    block   k_t[s] = d out_t / d u_s                                  selection moving

In zoh delta_s is delta_s phi1(delta_s A_n) throughout; complex states (S4D) stand for their conjugates too: twice the
real part. Three variants of the first two: as executed ("real"), the layer made time-invariant ("null"), and delta
shuffled in time ("null_shuffle").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical, Selection, attention_row, read
from mamba_probe.analyses.wavelet_alignment import core
from mamba_probe.analyses.wavelet_alignment.selection import frozen
from mamba_probe.trace import require

__all__ = ["NULLS", "Asked", "BlockKernels", "Kernels", "TraceKernels"]

NULLS = ("null", "null_shuffle")

READ = 2**23
"""Numbers of a (token, head) array read at once; more where one chunk of a store holds up to 4 times as many."""

AT_ONCE = 2**19
"""Numbers of a (head, token) array worked on at once: longer rows are taken in smaller blocks of heads."""

Asked = tuple[int, int, str]
"""A query (index among a row's valid tokens), the length of its window, and a variant."""


class TraceKernels:
    """Kernels that a trace's layers executed.

    Args:
        trace: delta and A, for `mixer` B and C too.
        kind: "write" or "mixer".
        read_out: (kernel, channel or head), or None.
        seed: of the permutation of the shuffled variant, one a row, the same in every layer and head.

    Raises:
        ValueError: a missing variable, another discretisation than euler and zoh, a read-out of another shape.
    """

    nulls = NULLS

    def __init__(self, trace: xr.Dataset, kind: str, read_out: object, seed: int) -> None:
        names = ("delta", "A") if kind == "write" else ("delta", "A", "B", "C")
        self.kind, self.seed = kind, seed
        self.view = view = Canonical(_trimmed(trace, *names), *names)
        rule = trace.attrs.get("discretization")
        if rule not in ("euler", "zoh"):
            raise ValueError(f"wavelet_alignment needs a trace of discretization 'euler' or 'zoh'; it says {rule!r}")
        self.read_out = _read_out(view, read_out)
        self.names = _names(view.heads, self.read_out, read_out)
        self.layers, self.batch = view.layers, view.coords()["batch"]
        self.n_rows, self.asked = view.n_rows, None
        self.positions, self.contiguous, self.head_dim = view.positions, view.contiguous, view.head_dim
        self.held = 0 if self.read_out is None else 2 * len(self.read_out)

    def kernels(
        self, layer: int, row: int, asked: Sequence[Asked]
    ) -> Iterator[tuple[int, Float[np.ndarray, "kernel window"]]]:
        """Kernels of all that is asked, (index in `asked`, block of kernels); what is stored is read once for all.

        With a read-out they are read_out @ (kernels of the heads).
        """
        blocks = (
            (i, block.heads, block.kernel(*one))
            for block in self._blocks(layer, row, {at for at, _, _ in asked})
            for i, one in enumerate(asked)
        )  # fmt: skip
        if self.read_out is None:
            yield from ((i, kernel) for i, _, kernel in blocks)
        else:
            for i, kernel in enumerate(_read(self.read_out, blocks, len(asked))):
                size = max(1, AT_ONCE // kernel.shape[1])
                yield from ((i, kernel[start : start + size]) for start in range(0, len(kernel), size))

    def _blocks(self, layer: int, row: int, queries: set[int]) -> Iterator["_Block"]:
        A, (selection, groups) = self.view.matrix(layer), self._selection(layer, row, queries)
        n_tokens = len(self.positions(row))
        order = np.random.default_rng([self.seed, row]).permutation(n_tokens)
        chunks, size = self.view.trace["delta"].chunksizes.get(self.head_dim, ()), max(1, AT_ONCE // n_tokens)
        for part in _slices(self.view.n_heads, chunks, max(1, READ // n_tokens)):
            delta = self._steps(layer, row, part)
            for start in range(0, delta.shape[1], size):
                steps = np.ascontiguousarray(delta[:, start : start + size].T, dtype=np.float64)
                heads = slice(part.start + start, part.start + start + len(steps))
                yield _Block(heads, steps, A[heads], groups[heads], selection, order, self.view.zoh)

    def _steps(self, layer: int, row: int, heads: slice) -> Float[np.ndarray, "token head"]:
        """Step sizes as stored, checked in place: `Canonical.row` would hold several copies in float64."""
        if self.view.constant:
            return self.view.row(layer, row, heads).delta
        found = self.view.trace["delta"].isel({"layer": layer, "batch": row, self.head_dim: heads})
        delta = read(found.transpose("token", self.head_dim)).values
        valid = self.view.valid[row]
        delta = delta if valid.all() else delta[valid]
        if not (delta.min() >= 0 and delta.max() < np.inf):
            self.view.row(layer, row, heads)  # raises, and names the first token
        return delta

    def _selection(self, layer: int, row: int, queries: set[int]) -> tuple[Selection, Int[np.ndarray, " head"]]:
        """What is selected, and the group that each head reads."""
        if self.kind == "write":
            one = np.ones((1, self.view.n_states))
            return Selection(one[None], dict.fromkeys(queries, one), one, one), np.zeros(self.view.n_heads, dtype=int)
        return Selection.of(self.view, layer, row, queries, "F"), self.view.groups()


@dataclass(frozen=True)
class _Block:
    """Some heads of one (layer, row): all its valid tokens, of which each query takes a window."""

    heads: slice
    delta: Float[np.ndarray, "head token"]
    A: Inexact[np.ndarray, "head decay"]
    groups: Int[np.ndarray, " head"]
    selection: Selection
    order: Int[np.ndarray, " token"]
    zoh: bool

    @cached_property
    def real(self) -> tuple[np.ndarray, np.ndarray]:
        return self.delta, np.cumsum(self.delta, axis=1)

    @cached_property
    def shuffled(self) -> tuple[np.ndarray, np.ndarray]:
        delta = self.delta[:, self.order]
        return delta, np.cumsum(delta, axis=1)

    @cached_property
    def mean(self) -> Float[np.ndarray, " head"]:
        return self.delta.mean(axis=1)

    def kernel(self, at: int, window: int, variant: str) -> Float[np.ndarray, "head window"]:
        chosen = self.selection
        if variant == "null":
            return frozen(self.mean, self.A, chosen.C_mean * chosen.B_mean, self.groups, self.zoh, window)
        delta, cumulative = self.shuffled if variant == "null_shuffle" else self.real
        seen = slice(at + 1 - window, at + 1)
        elapsed = cumulative[:, at : at + 1] - cumulative[:, seen]
        B = chosen.B[seen] if len(chosen.B) > 1 else chosen.B
        return attention_row(delta[:, seen].T, elapsed.T, self.A, B, chosen.C[at], self.groups, self.zoh).T


class BlockKernels:
    """Kernels of a whole block: signed derivatives of its read outputs along one direction of its input.

    Args:
        jacobian: what `probe.jacobian(query_tokens=..., direction=...)` returned.

    Raises:
        ValueError: another Dataset, derivatives of what a source moves, or norms, which have no sign.
    """

    nulls = ()
    head_dim = "kernel"
    held = 0

    def __init__(self, jacobian: xr.Dataset) -> None:
        found = jacobian.get("jacobian")
        if found is None or set(found.dims) != {"batch", "query_token", "kernel", "token"}:
            raise ValueError(
                "kernel 'block' needs probe.jacobian(..., query_tokens=..., direction=...), `jacobian` over (batch, "
                f"query_token, kernel, token); got {'none' if found is None else f'dims {found.dims}'}"
            )
        if not str(jacobian.attrs.get("estimator", "")).partition(";")[0].endswith("along direction"):
            raise ValueError(
                "this jacobian holds norms, which have no sign and so no wavelets: pass direction= to probe.jacobian"
            )
        self.values = found.transpose("batch", "query_token", "kernel", "token")
        self.valid = jacobian["valid"].transpose("batch", "token").values.astype(bool)
        self.position = jacobian["position"].transpose("batch", "token").values
        self.asked = jacobian["query_token"].values
        self.layers = np.array([jacobian.attrs["layer"]])
        self.n_rows = len(self.valid)
        self.batch = jacobian["batch"].values if "batch" in jacobian.coords else np.arange(self.n_rows)
        self.names = jacobian["kernel"].values if "kernel" in jacobian.coords else np.arange(found.sizes["kernel"])

    def positions(self, row: int) -> Int[np.ndarray, " token"]:
        """Positions of the valid tokens of a row."""
        return self.position[row, self.valid[row]]

    def contiguous(self, row: int) -> bool:
        """Whether no padding lies between a row's valid tokens."""
        return bool(np.all(np.diff(np.flatnonzero(self.valid[row])) == 1))

    def kernels(
        self, layer: int, row: int, asked: Sequence[Asked]
    ) -> Iterator[tuple[int, Float[np.ndarray, "kernel window"]]]:
        """Kernels of all that is asked, (index in `asked`, kernels)."""
        for i, (at, window, _) in enumerate(asked):
            query = int(np.flatnonzero(self.asked == self.positions(row)[at])[0])
            values = self.values.isel(batch=row, query_token=query).values[:, self.valid[row]]
            if not np.all(np.isfinite(values[:, at + 1 - window : at + 1])):
                raise ValueError(f"`jacobian` is NaN or infinite at a valid token of row {row}")
            yield i, values[:, at + 1 - window : at + 1].astype(np.float64)


Kernels = TraceKernels | BlockKernels


def _trimmed(trace: xr.Dataset, *names: str) -> xr.Dataset:
    """Without the tokens that are padding in every row before the first and after the last that is not: never read."""
    require(trace, *names, "valid", "position")
    held = np.flatnonzero(trace["valid"].transpose("batch", "token").values.any(axis=0))
    return trace.isel(token=slice(held[0], held[-1] + 1)) if len(held) else trace


def _slices(n_heads: int, chunks: tuple[int, ...], size: int) -> Iterator[slice]:
    """Blocks of about `size` heads; of whole chunks, if none is above 4 times as large."""
    ends = np.cumsum(chunks) if chunks and max(chunks) <= 4 * size else np.arange(1, n_heads + 1)
    start = 0
    while start < n_heads:
        end = int(max(ends[ends <= start + size].max(initial=0), ends[ends > start][0]))
        yield slice(start, end)
        start = end


def _read(
    read_out: Float[np.ndarray, "kernel head"], blocks: Iterator[tuple[int, slice, np.ndarray]], n_asked: int
) -> Iterator[Float[np.ndarray, "kernel window"]]:
    """Sum of read-outs; one that cancels to rounding (`RANK_TOLERANCE` of its terms) becomes exactly zero."""
    found: list[Any] = [0.0] * n_asked
    terms: list[Any] = [0.0] * n_asked
    for i, heads, kernel in blocks:
        found[i] += read_out[:, heads] @ kernel
        terms[i] += np.abs(read_out[:, heads]) @ np.abs(kernel)
    for total, size in zip(found, terms, strict=True):
        dead = np.abs(total).max(axis=1) <= core.RANK_TOLERANCE * np.max(size, axis=1)
        yield np.where(dead[:, None], 0.0, total)


def _read_out(view: Canonical, read_out: object) -> Float[np.ndarray, "kernel head"] | None:
    if read_out is None:
        return None
    if isinstance(read_out, xr.DataArray):
        if set(read_out.dims) != {"kernel", view.head_dim}:
            raise ValueError(
                f"read_out needs dims (kernel, {view.head_dim}); got ({', '.join(map(str, read_out.dims))})"
            )
        read_out = read_out.transpose("kernel", view.head_dim).values
    values = np.asarray(read_out, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != view.n_heads or not len(values):
        raise ValueError(f"read_out needs shape (kernel, {view.n_heads}) over `{view.head_dim}`; got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("read_out holds NaN or infinity")
    return values


def _names(heads: np.ndarray, read: np.ndarray | None, given: object) -> np.ndarray:
    if read is None:
        return heads
    labelled = isinstance(given, xr.DataArray) and "kernel" in given.coords
    return given["kernel"].values if labelled else np.arange(len(read))  # pyright: ignore[reportIndexIssue]
