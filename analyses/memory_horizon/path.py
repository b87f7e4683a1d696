"""When a cumulative sum reaches a value, for many values: a table of equal cells in place of a search."""

import numpy as np
from jaxtyping import Float, Int

__all__ = ["TIE", "Path"]

TIE = 1e-9
"""A threshold counts as reached within this relative distance, so that rounding of a sum cannot add a token."""

CELLS = 4
"""Cells for each token: then most hold no token or one."""

ROUNDS = 3
"""Tokens that are passed one by one in a cell that holds several; what is left is searched."""

SMALLEST = 1e-290
"""Of a path that is shorter, all tokens lie in one cell."""


class Path:
    """Cumulative delta of one channel along a row.

    Args:
        cumulative: sum of delta up to and with each token: at least 0, and never falling.

    >>> Path(np.array([1.0, 2.0, 3.0, 4.0])).reached(np.array([2.0, np.inf]))
    array([[2, 3, 4, 4],
           [4, 4, 4, 4]])
    """

    def __init__(self, cumulative: Float[np.ndarray, " token"]):
        self.cumulative = np.append(cumulative, np.inf)
        self.cells = CELLS * len(cumulative)
        self.scale = self.cells / cumulative[-1] if cumulative[-1] > SMALLEST else 1.0
        tokens = np.bincount(self._cell(cumulative), minlength=self.cells + 1)
        self.before = np.append(0, np.cumsum(tokens))

    def reached(self, threshold: Float[np.ndarray, " state"]) -> Int[np.ndarray, "state token"]:
        """First later token at which each token has passed each threshold; the number of tokens where there is none.

        min{t > s : Cum(t) - Cum(s) >= threshold}, to within `TIE`. A handful of passes over tokens and states.

        Args:
            threshold: elapsed delta at which each state has decayed to the level (`core.reach`).
        """
        n_tokens = len(self.cumulative) - 1
        target = (self.cumulative[:-1] + (threshold * (1 - TIE))[:, None]).ravel()
        found = self.before.take(self._cell(target))
        behind = self.cumulative.take(found) < target
        found += behind
        left = np.flatnonzero(behind)
        for _ in range(ROUNDS):
            left = left[self.cumulative.take(found.take(left)) < target.take(left)]
            found[left] += 1
        found[left] = np.searchsorted(self.cumulative, target.take(left))
        reached = found.reshape(-1, n_tokens)
        return np.maximum(reached, np.arange(1, n_tokens + 1), out=reached)

    def _cell(self, values: Float[np.ndarray, " value"]) -> Int[np.ndarray, " value"]:
        """Cell of each value, never falling as values grow: any scale is right, one is fast."""
        passed = np.minimum(values, (self.cells + 1) / self.scale)
        passed *= self.scale
        return passed.astype(int)
