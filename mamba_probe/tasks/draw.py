"""Random draws, one a row, without a loop over the rows."""

import numpy as np
from jaxtyping import Float, Int

__all__ = ["distinct", "separate"]


def distinct(
    rng: np.random.Generator, batch: int, weight: Float[np.ndarray, " choice"], size: int
) -> Int[np.ndarray, "batch size"]:
    """Draw `size` of the choices a row, in order and without replacement, by a race of exponential clocks."""
    return np.argsort(rng.standard_exponential((batch, weight.size)) / weight, axis=1)[:, :size]


def separate(rng: np.random.Generator, batch: int, places: int, size: int) -> Int[np.ndarray, "batch size"]:
    """Draw `size` increasing places of `0 .. places - 1` a row, no two adjacent, every such set as likely.

    Sets without neighbours are the sets of `0 .. places - size` with their i-th member moved up by i. Source: ours.
    """
    drawn = distinct(rng, batch, np.ones(places - size + 1), size)
    return np.sort(drawn, axis=1) + np.arange(size)
