"""Rows of one (layer, prompt), one block of heads and one query at a time: never head x token x token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import xarray as xr
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical, Row, Selection, attention_row, runs

__all__ = ["KINDS", "Block", "blocks", "subset"]

KINDS = ("executed", "null_lti", "null_shuffle")
"""The layer as it ran; frozen to its means over the row; with delta shuffled in time."""

BLOCK_BYTES = 2**22
"""Most bytes of one (token, head) array that is worked on, in float64: about ten of them live at once, in cache."""
READ_BYTES = 2**26
"""Most bytes of one (token, head) array that is read from a store at once, in float64: several live at once."""


@dataclass(frozen=True)
class Block:
    """Some heads of one layer and prompt.

    Attributes:
        heads: which, on the head axis.
        row: delta and its cumulative sum.
        A: decays of these heads.
        groups: the group that each of them reads.
        order: permutation of the row's tokens, for the null that shuffles delta.
        values: other variables of these heads that were asked for.
    """

    heads: slice
    row: Row
    A: Inexact[np.ndarray, "head decay"]
    selection: Selection
    groups: Int[np.ndarray, " head"]
    zoh: bool
    order: Int[np.ndarray, " token"]
    values: dict[str, Float[np.ndarray, "token head head_channel"]]

    def alpha(self, kind: str, at: int) -> Float[np.ndarray, "source head"]:
        """The weights of the sources up to the token `at`, one of `KINDS`."""
        return {"executed": self._executed, "null_lti": self._lti, "null_shuffle": self._shuffled}[kind](at)

    def _executed(self, at: int) -> Float[np.ndarray, "source head"]:
        return self._along(self.row.delta, self.row.cumulative, at)

    def _shuffled(self, at: int) -> Float[np.ndarray, "source head"]:
        return self._along(*self._shuffle, at)

    @cached_property
    def _shuffle(self) -> tuple[Float[np.ndarray, "token head"], Float[np.ndarray, "token head"]]:
        delta = self.row.delta[self.order]
        return delta, np.cumsum(delta, axis=0)

    def _along(
        self, delta: Float[np.ndarray, "token head"], cumulative: Float[np.ndarray, "token head"], at: int
    ) -> Float[np.ndarray, "source head"]:
        seen, chosen = slice(at + 1), self.selection
        elapsed = cumulative[at] - cumulative[seen]
        return attention_row(delta[seen], elapsed, self.A, chosen.B[seen], chosen.C[at], self.groups, self.zoh)

    def _lti(self, at: int) -> Float[np.ndarray, "source head"]:
        mean = self.row.delta.mean(axis=0)
        elapsed = mean * np.arange(at, -1, -1.0)[:, None]
        delta, B, C = np.broadcast_to(mean, elapsed.shape), self.selection.B_mean[None], self.selection.C_mean
        return attention_row(delta, elapsed, self.A, B, C, self.groups, self.zoh)


def blocks(
    view: Canonical, layer: int, row: int, queries: Sequence[int], seed: int, names: Sequence[str] = ()
) -> Iterator[Block]:
    """The heads of a layer and prompt, a block after another, to be read at `queries`, with the variables of `names`;
    values are read once."""
    A, groups, selection = view.matrix(layer), view.groups(), Selection.of(view, layer, row, queries)
    n_tokens = len(view.positions(row))
    order = np.random.default_rng((seed, int(view.layers[layer]), row)).permutation(n_tokens)
    width = max([1, *(view.trace[name].sizes.get("head_channel", 1) for name in names)])
    step = max(1, BLOCK_BYTES // (8 * n_tokens * width))
    chunks = np.cumsum(view.trace["delta"].chunksizes.get(view.head_dim, ()))
    for span in runs(view.n_heads, chunks, max(1, READ_BYTES // (8 * n_tokens * width))):
        read, held = view.row(layer, row, span), {name: view.load(name, layer, row, span) for name in names}
        held = {name: values.reshape(*values.shape[:2], -1) for name, values in held.items()}
        for start in range(span.start, span.stop, step):
            heads = slice(start, min(start + step, span.stop))
            inner = slice(start - span.start, heads.stop - span.start)
            part = replace(read, delta=read.delta[:, inner], cumulative=read.cumulative[:, inner])
            values = {name: array[:, inner] for name, array in held.items()}
            yield Block(heads, part, A[heads], selection, groups[heads], view.zoh, order, values)


def subset(trace: xr.Dataset, heads: Sequence[int] | np.ndarray | None) -> xr.Dataset:
    """The trace of the labelled heads only, in the order asked for.

    Raises:
        ValueError: not integers, none, one twice, or one that the trace lacks.
    """
    if heads is None:
        return trace
    dim = str(trace["delta"].dims[-1])
    asked = np.asarray(heads)
    known = trace[dim].values if dim in trace.coords else np.arange(trace.sizes[dim])
    if asked.ndim != 1 or not asked.size or asked.dtype.kind not in "iu" or len(np.unique(asked)) < len(asked):
        raise ValueError(f"heads needs distinct integers, labels of `{dim}`; got {heads!r}")
    absent = sorted(set(asked.tolist()) - set(known.tolist()))
    if absent:
        raise ValueError(f"heads {absent} are not in `{dim}` of this trace: {known.min()} .. {known.max()}")
    at = np.argsort(known)[np.searchsorted(np.sort(known), asked)]
    total = trace.attrs.get("n_heads", trace.sizes[dim])
    return trace.isel({dim: at}).assign_coords({dim: known[at]}).assign_attrs(n_heads=total)
