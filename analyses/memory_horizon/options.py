"""What `measure` was asked for."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

__all__ = ["EVENTS", "QUANTILES", "Options", "lags"]

QUANTILES = (0.1, 0.5, 0.9)
"""Over (batch, token); a censored horizon counts as infinite."""

EVENTS = ("before", "at", "after")


@dataclass(frozen=True)
class Options:
    """Tokens and events are positions among a row's valid tokens.

    Attributes:
        tokens: whose horizons are returned in full.
        events: one a row, or none.
        epsilon: what may be lost of a write by the end of its row.
        units: what a bootstrap draws: (row, slice of its tokens), a whole row or a block of the only one.
        within: tokens up to which a restricted mean counts.
        longest: tokens from the first to the last of the longest row.
        mass: whether the mass horizon of `tokens` is measured.
    """

    tokens: tuple[int, ...]
    events: tuple[int, ...]
    epsilon: float
    units: tuple[tuple[int, slice], ...]
    within: int
    longest: int
    mass: bool
    n_bootstrap: int
    seed: int


def lags(longest: int) -> Int[np.ndarray, " lag"]:
    """Steps at which a survival curve is kept: 0, 1, .. up to the longest row, some 64 of them evenly in logarithm.

    >>> lags(9).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    spaced = np.unique(np.geomspace(1, max(1, longest), 64).round().astype(int))
    return np.append(0, spaced)
