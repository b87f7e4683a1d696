"""What taking parts out does, row by row against the same rows intact: means, intervals, and p-values of many parts."""

import numpy as np
from jaxtyping import Float

from mamba_probe.analyses.common import interval

__all__ = ["FEWEST_ROWS", "FLIPS", "P_VALUES", "by_row", "paired", "signs"]

FEWEST_ROWS = 6
"""Rows, below which no sign flip can give a p-value of 0.05."""
FLIPS = 999
"""Random signs a row, where there are more rows than all of them can be tried for."""
P_VALUES = (
    "two-sided sign-flip test of the mean over rows; family-wise over all units by the largest |mean| of each flip "
    "(Westfall and Young's step-down), which allows for any dependence between units; no less than 2^(1 - rows)"
)


def by_row(values: Float[np.ndarray, "*unit batch token"]) -> Float[np.ndarray, "*unit batch"]:
    """Mean over the scored tokens of each row; NaN where it has none.

    >>> by_row(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])).tolist()
    [2.0, nan]
    """
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.divide(
        np.where(known, values, 0.0).sum(axis=-1), count, out=np.full(count.shape, np.nan), where=count > 0
    )


def signs(n_rows: int, seed: int) -> Float[np.ndarray, "flip row"]:
    """Signs of the rows: all of them but the given one where they are few, else random ones.

    >>> signs(2, seed=0).tolist()
    [[-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]
    """
    if 2**n_rows - 1 <= FLIPS:
        every = np.arange(1, 2**n_rows)[:, None] >> np.arange(n_rows)
        return 1.0 - 2.0 * (every & 1)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, n_rows))


def paired(change: Float[np.ndarray, "row unit"], n_bootstrap: int, seed: int) -> dict[str, Float[np.ndarray, " unit"]]:
    """Mean change over rows of each unit, its 95 % interval over rows, and its p-value among all units.

    Rows without a number are left out; rows weigh alike. With one row: NaN intervals and p-values.

    >>> found = paired(np.array([[1.0, 0.0]] * 6), 50, seed=0)
    >>> found[""].tolist(), found["_low"].tolist(), found["_p"].tolist()
    ([1.0, 0.0], [1.0, 0.0], [0.03125, 1.0])
    """
    change = change[~np.isnan(change).all(axis=1)]
    mean = change.mean(axis=0)
    low, high = interval(lambda draws: draws @ change / draws.sum(), len(change), n_bootstrap, seed)
    if len(change) < 2:
        return {"": mean, "_low": low, "_high": high, "_p": np.full(mean.shape, np.nan)}
    return {"": mean, "_low": low, "_high": high, "_p": _stepped(change, mean, signs(len(change), seed))}


def _stepped(
    change: Float[np.ndarray, "row unit"], mean: Float[np.ndarray, " unit"], flips: Float[np.ndarray, "flip row"]
) -> Float[np.ndarray, " unit"]:
    """The largest mean is held against the largest of all units, the next against the largest of those below, .."""
    order = np.argsort(np.abs(mean), kind="stable")
    largest = np.maximum.accumulate(np.abs(flips @ change[:, order] / len(change)), axis=1)
    reached = (largest >= np.abs(mean[order]) * (1 - 1e-12)).sum(axis=0)
    rising = np.maximum.accumulate(reached[::-1])[::-1]  # no smaller mean has a smaller p-value
    return ((1 + rising) / (1 + len(flips)))[np.argsort(order)]
