"""Percentile bootstrap over prompts."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

__all__ = ["COVERAGE", "interval", "resamples"]

COVERAGE = 0.95
"""Two-sided coverage of every interval in the results."""


def resamples(n_rows: int, n_bootstrap: int, seed: int) -> Int[np.ndarray, "replicate row"]:
    """How often each row is drawn in each bootstrap replicate.

    >>> resamples(3, 2, seed=0).sum(axis=1).tolist()
    [3, 3]
    """
    uniform = np.full(n_rows, 1.0 / n_rows)
    return np.random.default_rng(seed).multinomial(n_rows, uniform, size=n_bootstrap)


def interval(
    statistic: Callable[[Int[np.ndarray, " row"]], Float[np.ndarray, "..."]], n_rows: int, n_bootstrap: int, seed: int
) -> Float[np.ndarray, "bound=2 ..."]:
    """Percentile interval of `statistic`, a function of how often each row is drawn.

    Infinite replicates (censored horizons) are ordered, never averaged; with one row nothing can be resampled: NaN.
    Few rows are often drawn alike: each distinct draw is computed once.

    Args:
        statistic: draws (row,) -> values of any shape.
        n_rows: number of prompts.
        n_bootstrap: number of replicates.
        seed: seed of the draws.

    Raises:
        ValueError: fewer than 2 replicates.

    >>> rows = np.array([0.0, 1.0])
    >>> interval(lambda draws: draws @ rows / 2, 2, 100, seed=0).tolist()
    [0.0, 1.0]
    """
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")
    if n_rows < 2:
        return np.full((2, *np.shape(statistic(np.ones(n_rows, dtype=int)))), np.nan)
    distinct, of_replicate = np.unique(resamples(n_rows, n_bootstrap, seed), axis=0, return_inverse=True)
    replicates = np.stack([statistic(draws) for draws in distinct])[of_replicate]
    tail = (1 - COVERAGE) / 2
    bounds = np.quantile(replicates, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return np.where(np.isnan(replicates).any(axis=0), np.nan, bounds)
