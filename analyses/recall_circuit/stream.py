"""The tokens of one prompt in one layer, read a run after another: memory does not grow with their number."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical, read, runs
from mamba_probe.analyses.recall_circuit.core import Prompt, Run

__all__ = ["RUN_BYTES", "Stream", "selection"]

RUN_BYTES = 2**25
"""Most bytes of one (token, channel) array that is read at once, in float64: about eight live at once."""


def selection(
    canonical: Canonical, layer: int, row: int, tokens: slice, name: str
) -> Inexact[np.ndarray, "token group state"]:
    """B or C of valid tokens; where it is constant (S4D) one copy stands for all tokens."""
    if not canonical.constant:
        return canonical.load(name, layer, row, tokens=tokens)
    one = read(canonical.trace[name].isel(layer=layer)).values
    n = len(canonical.positions(row)[tokens])
    return np.broadcast_to(one.astype(np.promote_types(one.dtype, np.float64)), (n, *one.shape))


@dataclass(frozen=True)
class Stream:
    """The valid tokens of one prompt in one layer, by position in a trace; they follow one another."""

    canonical: Canonical
    layer: int
    row: int

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.canonical.positions(self.row))

    @cached_property
    def A(self) -> Inexact[np.ndarray, "head decay"]:
        """The layer's A."""
        return self.canonical.matrix(self.layer)

    def tokens(self, until: int | None = None) -> Iterator[slice]:
        """Runs of the tokens before `until` (all of them) that are read at once: by whole chunks of stored x."""
        x = self.canonical.trace["x"].isel(layer=self.layer, batch=self.row)
        width = int(np.prod([size for dim, size in x.sizes.items() if dim != "token"]))
        first = int(np.flatnonzero(self.canonical.valid[self.row])[0])
        ends = np.cumsum(x.chunksizes.get("token", ())) - first
        return runs(self.size if until is None else until, ends, max(1, RUN_BYTES // (8 * width)))

    def prompts(self) -> Iterator[tuple[slice, Prompt]]:
        """Every token, with what it reads with."""
        for tokens, run in self.runs(self.size):
            C, z = selection(self.canonical, self.layer, self.row, tokens, "C"), self.load("z", tokens)
            z = z.reshape(run.x.shape)
            yield tokens, Prompt(run.delta, run.cumulative, run.A, run.B, C, run.x, z, run.zoh)

    def runs(self, until: int) -> Iterator[tuple[slice, Run]]:
        """What the tokens before `until` write, their cumulative sums going on from run to run."""
        before: float | Float[np.ndarray, " head"] = 0.0
        for tokens in self.tokens(until):
            step = self.canonical.row(self.layer, self.row, tokens=tokens, before=before)
            before = step.cumulative[-1].copy()
            x = self.load("x", tokens).reshape(*step.delta.shape, -1)
            B = selection(self.canonical, self.layer, self.row, tokens, "B")
            yield tokens, Run(step.delta, step.cumulative, self.A, B, x, self.canonical.zoh)

    def load(self, name: str, tokens: slice | Int[np.ndarray, " token"]) -> np.ndarray:
        """A variable of some of the tokens."""
        return self.canonical.load(name, self.layer, self.row, tokens=tokens)
