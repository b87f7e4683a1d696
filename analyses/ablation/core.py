"""What units cost against what they read: rank correlation with its interval and its null. Arrays in, arrays out."""

import numpy as np
from jaxtyping import Float

from mamba_probe.analyses.common import interval

__all__ = ["FEWEST", "correlation", "spearman", "unit_entropy"]

FEWEST = 4
"""Units, below which a correlation between them says nothing."""
SHUFFLES = 999
"""Random pairings of units for the null."""


def spearman(a: Float[np.ndarray, " unit"], b: Float[np.ndarray, " unit"]) -> float:
    """Rank correlation over units that have both; ties share their mean rank; NaN where one of them is constant.

    >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0, 5.0]))
    1.0
    """
    from scipy.stats import rankdata

    known = ~np.isnan(a) & ~np.isnan(b)
    if known.sum() < 2 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(np.clip(np.corrcoef(rankdata(a[known]), rankdata(b[known]))[0, 1], -1.0, 1.0))


def unit_entropy(
    entropy: Float[np.ndarray, "layer batch head"], at: list[tuple[int, int, int] | None]
) -> Float[np.ndarray, "batch unit"]:
    """Mean entropy of the heads of each unit, (place of its layer, first head, number), by row; NaN of None."""
    found = np.full((entropy.shape[1], len(at)), np.nan)
    for index, place in enumerate(at):
        if place is not None:
            layer, first, size = place
            heads = entropy[layer, :, first : first + size]
            known = ~np.isnan(heads)
            np.divide(
                np.where(known, heads, 0.0).sum(axis=1), known.sum(axis=1), out=found[:, index], where=known.any(axis=1)
            )
    return found


def correlation(
    harm: Float[np.ndarray, "row unit"], entropy: Float[np.ndarray, "row unit"], n_bootstrap: int, seed: int
) -> dict[str, float]:
    """Spearman correlation of two means over rows, across units: interval over rows, null over pairings of units."""
    nan = float("nan")
    found = {"": nan, "_low": nan, "_high": nan, "_null_low": nan, "_null_high": nan}
    if harm.shape[1] < FEWEST:
        return found

    def statistic(draws: np.ndarray) -> np.ndarray:
        return np.array(spearman(_mean(harm, draws), _mean(entropy, draws)))

    every = np.ones(len(harm), dtype=int)
    low, high = interval(statistic, len(harm), n_bootstrap, seed)
    rng, (a, b) = np.random.default_rng(seed), (_mean(harm, every), _mean(entropy, every))
    null = np.array([spearman(a, rng.permutation(b)) for _ in range(SHUFFLES)])
    null_low, null_high = (nan, nan) if np.isnan(null).any() else np.quantile(null, [0.025, 0.975])
    values = (statistic(every), low, high, null_low, null_high)
    return {name: float(value) for name, value in zip(found, values, strict=True)}


def _mean(values: Float[np.ndarray, "row unit"], draws: np.ndarray) -> Float[np.ndarray, " unit"]:
    """Over rows that have a number, each as often as it is drawn."""
    known = ~np.isnan(values)
    count = draws.astype(float) @ known
    total = draws.astype(float) @ np.where(known, values, 0.0)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
