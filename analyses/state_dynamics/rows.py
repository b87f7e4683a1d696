"""What each (layer, prompt) gives, filled one block of heads at a time."""

from copy import copy
from itertools import product

import numpy as np
from jaxtyping import Int

from mamba_probe.analyses.common import Canonical, by_layer, stacked
from mamba_probe.analyses.state_dynamics import core
from mamba_probe.analyses.state_dynamics.asked import Asked
from mamba_probe.analyses.state_dynamics.stream import KINDS, Block, blocks

__all__ = ["SATURATED", "SIZES", "Rows"]

SATURATED = ("closed", "held", "erased")
SIZES = ("ess_entropy", "ess_rank")
MOMENTS = ("state_mean", "state_variance", "state_rms")
AT_ONCE = 16
"""Heads whose triangles are made at once."""
RESULT_BYTES = 2**30
"""Most bytes that the samples of the states may take."""


class Rows:
    """Numbers by layer, prompt and head.

    Attributes:
        found: by name: rate, the decay (layer, head, decay); mean_delta and shares (layer, batch, head); sizes
            (layer, batch, query_token, sized); growth
            (layer, batch, head) and layer_mean_square (layer, batch, sample), each with its null_order; sums of the
            moments over rows (layer, sample, head).
        samples: tokens after which states are taken, in the longest row.
        source: where the states came from: "h", "x" or "".
    """

    def __init__(self, view: Canonical, asked: Asked):
        self.view, self.asked = view, asked
        self.samples = asked.samples(int(view.valid.sum(axis=1).max()))
        self.source = next((name for name in "hx" if name in view.trace), "")
        self.kinds = ("", "null_order_") if "x" in view.trace else ("",)
        self.found: dict[str, np.ndarray] = {}
        wide = (view.n_layers, len(self.samples), view.n_heads)
        if self.source and 8 * len(MOMENTS) * np.prod(wide, dtype=float) > RESULT_BYTES:
            raise ValueError(
                f"{wide[1]} samples of the states of {wide[0]} layers and {wide[2]} heads would take more than "
                f"{RESULT_BYTES / 2**30:.1f} GiB: give a larger every=, or fewer layers (trace.sel)"
            )

    def _blank(self) -> dict[str, np.ndarray]:
        """What a layer fills."""
        by_head = (self.view.n_rows, self.view.n_heads)
        sized = (self.view.n_rows, self.asked.at.shape[1], len(self.asked.sized))
        found = {"mean_delta": np.full(by_head, np.nan)}
        for name in SATURATED:
            found |= {f"{null}{name}_share": np.full(by_head, np.nan) for null in ("", "null_lti_")}
        for kind in KINDS:
            found |= {_named(kind, name): np.full(sized, np.nan) for name in SIZES}
        if self.source:
            found |= {name: np.zeros((len(self.samples), self.view.n_heads)) for name in MOMENTS}
            for null in self.kinds:
                found[f"{null}growth"] = np.full(by_head, np.nan)
                found[f"{null}layer_mean_square"] = np.full((self.view.n_rows, len(self.samples)), np.nan)
        return found

    @property
    def n_states(self) -> int:
        """States of a head in real numbers: a complex one counts for two."""
        return self.view.trace["B"].sizes["state"] * (2 if np.iscomplexobj(self.view.trace["A"]) else 1)

    def measured(self) -> "Rows":
        """Go through every layer and prompt."""
        self.found = stacked(by_layer([self.view.trace], self._layer))
        return self

    def _layer(self, layer: int) -> dict[str, np.ndarray]:
        one = copy(self)
        one.found = self._blank() | {"rate": self.view.decay(layer)}
        for row in range(self.view.n_rows):
            one._prompt(layer, row)
        return one.found

    def _prompt(self, layer: int, row: int) -> None:
        view, n_tokens = self.view, len(self.view.positions(row))
        order = np.random.default_rng((self.asked.seed, int(view.layers[layer]), row)).permutation(n_tokens)
        samples = self.asked.samples(n_tokens)
        squares = {null: np.zeros(len(samples)) for null in self.kinds}
        for block in blocks(view, layer, row, samples):
            self._steps(block, row)
            self._sizes(block, row, order)
            if self.source and len(samples):
                for null in self.kinds:
                    self._states(null, block, row, samples, order, squares[null])
        if self.source:
            for null, square in squares.items():
                self.found[f"{null}layer_mean_square"][row, : len(samples)] = square / view.n_heads

    def _steps(self, block: Block, row: int) -> None:
        mean, place = block.delta.mean(axis=0), (row, block.heads)
        self.found["mean_delta"][place] = mean
        rate = np.abs(np.real(block.A))
        for name, of in core.saturation(block.delta, rate, self.asked.saturation).items():
            self.found[f"{name}_share"][place] = of.mean(axis=0)
        for name, of in core.saturation(mean[None], rate, self.asked.saturation).items():
            self.found[f"null_lti_{name}_share"][place] = of[0]

    def _sizes(self, block: Block, row: int, order: Int[np.ndarray, " token"]) -> None:
        sized = self.asked.sized
        inside = np.flatnonzero((sized >= block.heads.start) & (sized < block.heads.stop))
        for start, kind in product(range(0, len(inside), AT_ONCE), KINDS):
            here = inside[start : start + AT_ONCE]
            taken = block.only(sized[here] - block.heads.start).as_kind(kind, order)
            for query, at in enumerate(self.asked.at[row].tolist()):
                sizes = core.effective(taken.singular(at), self.asked.tolerance * taken.scale(at))
                for name, values in zip(SIZES, sizes, strict=True):
                    self.found[_named(kind, name)][row, query, here] = values

    def _states(
        self, null: str, block: Block, row: int, samples: Int[np.ndarray, " sample"],
        order: Int[np.ndarray, " token"], square: np.ndarray,
    ) -> None:  # fmt: skip
        source = block.reordered(order) if null else block
        moments = np.stack([core.moments(h) for h in source.states(samples)], axis=1)
        self.found[f"{null}growth"][row, block.heads] = core.growth(moments[2], samples + 1)
        square += (moments[2] ** 2).sum(axis=1)
        if not null:
            for name, values in zip(MOMENTS, moments, strict=True):
                self.found[name][: len(samples), block.heads] += values


def _named(kind: str, name: str) -> str:
    return name if kind == "executed" else f"{kind}_{name}"
