"""Rows of hidden attention in numbers: arrays in, arrays out. Rows are alpha (source, head), sources oldest first.

The last source of a row is its query, so that a source's lag is counted from the end. Signs are kept: where a number is
of sizes only, its text says |alpha|.
"""

import numpy as np
from jaxtyping import Float, Int

__all__ = ["AGGREGATES", "NORMALISATIONS", "STATISTICS", "Total", "by_lag", "lag_bins", "normalised", "statistics"]

AGGREGATES = ("signed_mean", "mean_absolute", "l2", "none")
"""How rows of heads become one: mean, mean of |alpha|, square root of the sum of squares; or each for itself."""
NORMALISATIONS = ("raw", "absolute_share")
"""A head's row as it is, or divided by its sum of |alpha|, sign kept."""
STATISTICS = ("entropy", "first_share", "mean_distance", "negative_share", "top_share", "top_source")


def _shares(alpha: Float[np.ndarray, "source head"]) -> Float[np.ndarray, "source head"]:
    """|alpha| as shares of a head's row; NaN where a head reads nothing."""
    size = np.abs(alpha)
    peak = size.max(axis=0)
    size /= np.where(peak > 0, peak, np.nan)  # first by the largest: sums of tiny weights underflow
    size /= size.sum(axis=0)
    return size


def normalised(alpha: Float[np.ndarray, "source head"], rule: str) -> Float[np.ndarray, "source head"]:
    """Rows under a normalisation; a head that reads nothing has no share: NaN.

    >>> normalised(np.array([[1.0, 0.0], [-3.0, 0.0]]), "absolute_share").tolist()
    [[0.25, nan], [-0.75, nan]]
    """
    return alpha if rule == "raw" else np.sign(alpha) * _shares(alpha)


def statistics(alpha: Float[np.ndarray, "source head"]) -> dict[str, Float[np.ndarray, " head"]]:
    """Statistics of each head's row, with p = |alpha| / sum |alpha|; NaN where a head reads nothing.

    entropy -sum p ln p (nats); first_share p[0]; mean_distance sum p (t - s), in tokens (the mass horizon);
    negative_share, the sum of p where alpha < 0; top_share max p, and top_source its place (the latest of equals).

    >>> found = statistics(np.array([[0.5], [0.0], [-0.5]]))
    >>> [(name, round(value.item(), 4)) for name, value in found.items()][:4]
    [('entropy', 0.6931), ('first_share', 0.5), ('mean_distance', 1.0), ('negative_share', 0.5)]
    """
    p = _shares(alpha)
    lag = np.arange(len(p) - 1, -1, -1.0)
    top = len(p) - 1 - np.argmax(p[::-1], axis=0)
    return {
        "entropy": np.abs(np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=0)),
        "first_share": p[0],
        "mean_distance": lag @ p,
        "negative_share": np.sum(np.where(alpha < 0, p, 0.0), axis=0) + 0.0 * p[0],
        "top_share": p.max(axis=0),
        "top_source": top + 0.0 * p[0],
    }


def lag_bins(n_tokens: int) -> Int[np.ndarray, " bin"]:
    """First lag of each bin: 0, 1, 2 to 3, 4 to 7, .. up to the longest of `n_tokens`.

    >>> lag_bins(9).tolist()
    [0, 1, 2, 4, 8]
    """
    return np.concatenate([[0], 2 ** np.arange(max(0, (n_tokens - 1).bit_length()))])


def by_lag(
    alpha: Float[np.ndarray, "source head"], bins: Int[np.ndarray, " bin"]
) -> tuple[Float[np.ndarray, " bin"], Int[np.ndarray, " bin"]]:
    """Sum of |alpha| in each bin of lags over sources and heads (NaN left out), and how many weights that were.

    >>> by_lag(np.array([[1.0], [2.0], [-4.0]]), lag_bins(4))
    (array([4., 2., 1.]), array([1, 1, 1]))
    """
    live = ~np.isnan(alpha[-1])
    size = np.abs(alpha[::-1][:, live]).sum(axis=1)
    starts = bins[bins < len(alpha)]
    total, count = np.zeros(len(bins)), np.zeros(len(bins), dtype=int)
    total[: len(starts)] = np.add.reduceat(size, starts)
    count[: len(starts)] = np.diff(np.append(starts, len(alpha))) * int(live.sum())
    return total, count


class Total:
    """Rows of heads as they come in, block after block, turned into one row; "none" keeps them apart.

    >>> total = Total("l2")
    >>> total.add(np.array([[3.0, np.nan]]))
    >>> total.add(np.array([[4.0]]))
    >>> total.row().tolist()
    [5.0]
    """

    def __init__(self, aggregate: str):
        self.aggregate, self.n_live = aggregate, 0
        self.parts: list[np.ndarray] = []

    def add(self, alpha: Float[np.ndarray, "source head"]) -> None:
        """Take in the rows of some heads; those that are NaN (no share) are left out of a mean."""
        if self.aggregate == "none":
            self.parts.append(alpha.T)
            return
        live = alpha[:, ~np.isnan(alpha[-1])]
        self.n_live += live.shape[1]
        term = {"signed_mean": lambda: live, "mean_absolute": lambda: np.abs(live), "l2": lambda: live**2}
        summed = term[self.aggregate]().sum(axis=1)
        self.parts = [self.parts[0] + summed] if self.parts else [summed]

    def row(self) -> Float[np.ndarray, "*head source"]:
        """The row of all heads; NaN where none of them has one."""
        if self.aggregate == "none":
            return np.concatenate(self.parts)
        if not self.n_live:
            return np.full_like(self.parts[0], np.nan)
        return np.sqrt(self.parts[0]) if self.aggregate == "l2" else self.parts[0] / self.n_live
