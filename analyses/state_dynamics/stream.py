"""The heads of one (layer, prompt), some at a time, and their tokens a tile at a time: never token x head x state."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical, read, runs
from mamba_probe.analyses.state_dynamics import core

__all__ = ["KINDS", "Block", "blocks"]

KINDS = ("executed", "null_lti", "null_shuffle")
"""The layer as it ran; frozen to its means over the row; with delta shuffled in time."""

READ_BYTES = 2**26
"""Most bytes of one (token, head, head_channel) array that is read at once, in float64."""
TILE = 2**18
"""Most numbers of one (token, head, state) array that is worked on."""
GONE = -746.0
"""Exponents below it give 0 exactly in float64."""


@dataclass(frozen=True)
class Block:
    """Some heads of one layer and prompt.

    Attributes:
        heads: which, on the head axis.
        B, C: of each token, or one row for all (S4D, and the layer frozen to its means).
        x: inputs of the scan, where they were recorded.
        h: states after the tokens asked for, where they were recorded.
    """

    heads: slice
    delta: Float[np.ndarray, "token head"]
    A: Inexact[np.ndarray, "head decay"]
    B: Inexact[np.ndarray, "_ group state"]
    C: Inexact[np.ndarray, "_ group state"]
    groups: Int[np.ndarray, " head"]
    zoh: bool
    x: Float[np.ndarray, "token head head_channel"] | None = None
    h: Inexact[np.ndarray, "sample head head_channel state"] | None = None

    def only(self, chosen: Int[np.ndarray, " head"]) -> "Block":
        """Some of these heads, without x and h."""
        return replace(self, delta=self.delta[:, chosen], A=self.A[chosen], groups=self.groups[chosen], x=None, h=None)

    def as_kind(self, kind: str, order: Int[np.ndarray, " token"]) -> "Block":
        """The same heads under one of `KINDS`."""
        if kind == "null_lti":
            mean = np.broadcast_to(self.delta.mean(axis=0), self.delta.shape)
            return replace(self, delta=mean, B=self.B.mean(axis=0)[None], C=self.C.mean(axis=0)[None])
        return self if kind == "executed" else replace(self, delta=self.delta[order])

    def reordered(self, order: Int[np.ndarray, " token"]) -> "Block":
        """The same tokens, each with its delta, B and x, in another order."""
        B = self.B if len(self.B) == 1 else self.B[order]
        return replace(self, delta=self.delta[order], B=B, x=None if self.x is None else self.x[order], h=None)

    def states(self, samples: Int[np.ndarray, " sample"]) -> Iterator[Inexact[np.ndarray, "head head_channel state"]]:
        """The state after each of `samples`, ascending: as it was recorded, else computed from delta, A, B and x.

        Raises:
            ValueError: neither h nor x is here.
        """
        if self.h is not None:
            yield from self.h
            return
        if self.x is None:
            raise ValueError("the states need `h` or `x` in the trace: name one of them in variables=")
        held, start = np.zeros((), dtype=np.result_type(self.A, self.B)), 0
        for end in (samples + 1).tolist():
            for tile in self._tiles(start, end, 1):
                held = self._advanced(held, tile, self.x[tile])
            start = end
            yield held

    def _advanced(self, held: np.ndarray, tile: slice, x: np.ndarray) -> np.ndarray:
        """exp(A Cum) h + K x over the tokens of a tile."""
        delta = self.delta[tile]
        ahead = np.cumsum(delta[::-1], axis=0)[::-1]
        whole, elapsed = ahead[0], np.concatenate([ahead[1:], np.zeros((1, delta.shape[1]))])
        K = core.written(delta, elapsed, self.A, self._of("B", tile), self.groups, self.zoh)
        kept = np.exp(self.A * whole[:, None])[:, None]
        return kept * held + np.transpose(x, (1, 2, 0)) @ np.swapaxes(K, 0, 1)

    def singular(self, at: int) -> Float[np.ndarray, "head size"]:
        """Singular values of T[at:, :at] by head, `at` an index among the tokens, at least 1."""
        return core.singular(core.triangle(self._reads(at)), core.triangle(self._writes(at)))

    def scale(self, at: int) -> Float[np.ndarray, " head"]:
        """The largest weight that T[at:, :at] could hold if nothing decayed: max |C_t| max delta_s |B_s|."""
        reads = _norm(self.C[at:] if len(self.C) > 1 else self.C).max(axis=0)[self.groups]
        norms = _norm(self.B[:at] if len(self.B) > 1 else self.B)[:, self.groups]
        pair = 2 if np.iscomplexobj(self.A) else 1
        return pair * reads * (norms * self.delta[:at]).max(axis=0)

    def _reads(self, at: int) -> Iterator[np.ndarray]:
        elapsed = np.cumsum(self.delta[at:], axis=0)
        for tile in self._tiles(0, len(elapsed)):
            if tile.start and self._gone(elapsed[tile.start]):
                return
            C = self._of("C", slice(at + tile.start, at + tile.stop))
            yield core.real_parts(core.reading(elapsed[tile], self.A, C, self.groups), True)

    def _writes(self, at: int) -> Iterator[np.ndarray]:
        """Tiles from the latest source to the first."""
        delta = self.delta[at - 1 :: -1]
        elapsed = np.concatenate([np.zeros((1, delta.shape[1])), np.cumsum(delta[:-1], axis=0)])
        for tile in self._tiles(0, at):
            if tile.start and self._gone(elapsed[tile.start]):
                return
            B = self._of("B", slice(at - tile.stop, at - tile.start))[::-1]
            yield core.real_parts(core.written(delta[tile], elapsed[tile], self.A, B, self.groups, self.zoh), False)

    def _gone(self, elapsed: np.ndarray) -> bool:
        return bool((np.real(self.A) * elapsed[:, None] < GONE).all())

    def _of(self, name: str, tile: slice) -> np.ndarray:
        values = getattr(self, name)
        return values if len(values) == 1 else values[tile]

    def _tiles(self, start: int, end: int, least: int = 0) -> Iterator[slice]:
        """Runs of tokens from `start` to `end`; for a QR that is worth it of twice as many as there are states."""
        n_states = self.B.shape[-1]
        most = max(least or 2 * n_states, TILE // (n_states * self.delta.shape[1]))
        for part in runs(end - start, [], most):
            yield slice(start + part.start, start + part.stop)


def _norm(values: Inexact[np.ndarray, "token group state"]) -> Float[np.ndarray, "token group"]:
    return np.linalg.norm(values, axis=-1)


def blocks(view: Canonical, layer: int, row: int, samples: Int[np.ndarray, " sample"]) -> Iterator[Block]:
    """The heads of a layer and prompt, a block after another; x, and h after `samples`, where they were recorded."""
    A, groups = view.matrix(layer), view.groups()
    B, C = (_selection(view, name, layer, row) for name in "BC")
    n_tokens = len(view.positions(row))
    width = view.trace["x"].sizes.get("head_channel", 1) if "x" in view.trace else 1
    apart = int(samples[0]) + 1 if len(samples) else n_tokens
    step = max(1, TILE // (min(64, apart) * B.shape[-1]))
    chunks = np.cumsum(view.trace["delta"].chunksizes.get(view.head_dim, ()))
    for span in runs(view.n_heads, chunks, max(1, READ_BYTES // (8 * n_tokens * width))):
        delta = view.row(layer, row, span).delta
        x = view.load("x", layer, row, span).reshape(*delta.shape, -1) if "x" in view.trace else None
        for start in range(span.start, span.stop, step):
            heads = slice(start, min(start + step, span.stop))
            inner = slice(start - span.start, heads.stop - span.start)
            own = None if x is None else x[:, inner]
            h = _recorded(view, layer, row, heads, samples) if "h" in view.trace else None
            yield Block(heads, delta[:, inner], A[heads], B, C, groups[heads], view.zoh, own, h)


def _recorded(view: Canonical, layer: int, row: int, heads: slice, samples: Int[np.ndarray, " sample"]) -> np.ndarray:
    h = view.load("h", layer, row, heads, samples)
    return h.reshape(*h.shape[:2], -1, h.shape[-1])


def _selection(view: Canonical, name: str, layer: int, row: int) -> np.ndarray:
    """B or C of the valid tokens; one row for all where it is constant."""
    if not view.constant:
        return view.load(name, layer, row)
    values = read(view.trace[name].isel(layer=layer).transpose(view.head_dim, "state")).values
    return values.astype(np.promote_types(values.dtype, np.float64))[None]
