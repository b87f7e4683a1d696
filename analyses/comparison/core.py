"""Rows by cells in, differences out: locations, bootstrap over rows, swap tests, Holm's adjustment."""

from collections.abc import Iterator
from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.common import resamples
from mamba_probe.analyses.common.bootstrap import COVERAGE

__all__ = [
    "EXACT", "PERMUTATIONS", "STATISTICS", "apart", "bounds", "drawn", "holm", "least", "located", "patterns",
    "permuted", "pseudovalues", "replicates", "swapped",
]  # fmt: skip

STATISTICS = ("mean", "median")
EXACT = 4096
"""Up to so many swaps, or ways to part the rows, are all tried; above, PERMUTATIONS are drawn."""
PERMUTATIONS = 9999
_REACHES, _ROUNDING, _CANCELLED = 1 + 1e-9, 1e-12, 1e-7

Cells = Float[np.ndarray, " cell"]
Rows = Float[np.ndarray, "row cell"]
OtherRows = Float[np.ndarray, "other_row cell"]


def located(values: Rows, statistic: str) -> Cells:
    """Mean over rows, or median: the lower one, which is an observed value, so that infinite ones are ordered.

    >>> located(np.array([[1.0], [2.0], [np.inf], [np.inf]]), "median").tolist()
    [2.0]
    """
    if statistic == "mean":
        with np.errstate(invalid="ignore"):  # of both infinities: NaN
            return values.mean(axis=0)
    middle = (len(values) - 1) // 2
    return np.partition(values, middle, axis=0)[middle]


def patterns(known: Bool[np.ndarray, "row cell"]) -> Iterator[tuple[Int[np.ndarray, " known"], Int[np.ndarray, " at"]]]:
    """Which rows are known, and the cells of which they are."""
    found, of = np.unique(known, axis=1, return_inverse=True)
    for i in range(found.shape[1]):
        yield np.flatnonzero(found[:, i]), np.flatnonzero(of.ravel() == i)


def drawn(n_rows: int, n_bootstrap: int, seed: int) -> Int[np.ndarray, "replicate row"]:
    """The rows of each bootstrap replicate, in order.

    >>> drawn(3, 2, seed=0).shape
    (2, 3)
    """
    rows = np.arange(n_rows)
    return np.stack([np.repeat(rows, draws) for draws in resamples(n_rows, n_bootstrap, seed)])


def replicates(values: Rows, statistic: str, n_bootstrap: int, seed: int) -> Float[np.ndarray, "replicate cell"]:
    """The statistic of each replicate; the same rows are drawn for as many rows and the same seed."""
    return np.stack([located(values[rows], statistic) for rows in drawn(len(values), n_bootstrap, seed)])


def bounds(found: Float[np.ndarray, "replicate cell"]) -> Float[np.ndarray, "bound=2 cell"]:
    """Percentile interval; NaN where a replicate has no value."""
    tail = (1 - COVERAGE) / 2
    ends = np.quantile(found, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return np.where(np.isnan(found).any(axis=0), np.nan, ends)


def swapped(ours: Rows, reference: Rows, statistic: str, seed: int) -> Cells:
    r"""Two-sided p of a difference between pairs: the share of swaps within pairs that part the two as far (exact).

    $p = \#\{s \in \{\pm 1\}^n : |T(s)| \ge |T(1)|\} / 2^n$; where $2^n$ > EXACT, over PERMUTATIONS drawn s and s = 1.
    The randomisation test of R. A. Fisher: exact where each pair is exchangeable under the null.

    >>> swapped(np.arange(1.0, 9.0)[:, None], np.zeros((8, 1)), "mean", 0).tolist() == [2 / 256]
    True
    """
    n = len(ours)
    if 2**n <= EXACT:
        swap = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1
    else:
        swap = np.random.default_rng(seed).random((PERMUTATIONS + 1, n)) < 0.5
        swap[0] = False
    if statistic == "mean":
        pairs = ours - reference
        return _share((1.0 - 2.0 * swap) @ pairs / n, np.abs(pairs).mean(axis=0))
    parted = [
        apart(np.where(row[:, None], reference, ours), np.where(row[:, None], ours, reference), statistic)
        for row in swap
    ]
    return _share(np.stack(parted), np.zeros(ours.shape[1]))


def permuted(ours: Rows, reference: OtherRows, statistic: str, seed: int) -> Cells:
    """Two-sided p of a difference between unpaired rows, which are parted anew into groups of the same sizes.

    Of means the distance is Welch's t, so that the groups may differ in variance (Janssen 1997); of medians the
    difference, for groups that differ in nothing under the null.
    """
    pooled, n, own = np.concatenate([ours, reference]), len(ours), np.arange(len(ours))
    if comb(len(pooled), n) <= EXACT:
        from itertools import combinations

        groups = np.array(list(combinations(range(len(pooled)), n)))  # the first is the one observed
    else:
        draw = np.random.default_rng(seed)
        groups = np.stack([own, *(draw.permutation(len(pooled))[:n] for _ in range(PERMUTATIONS))])
    member = np.zeros((len(groups), len(pooled)), bool)
    np.put_along_axis(member, groups, True, axis=1)
    if statistic == "mean":
        return _share(_welch(pooled, member), np.ones(pooled.shape[1]))
    parted = np.stack([apart(pooled[one], pooled[~one], statistic) for one in member])
    return _share(parted, np.zeros(pooled.shape[1]))


def apart(ours: Rows, reference: OtherRows, statistic: str) -> Cells:
    """The difference of two locations."""
    with np.errstate(invalid="ignore"):  # of two infinite medians: NaN
        return located(ours, statistic) - located(reference, statistic)


def _welch(pooled: Rows, member: Bool[np.ndarray, "way row"]) -> Float[np.ndarray, "way cell"]:
    """Welch's t; 0 where the means are equal, infinite where only the variances are 0, NaN for a group of one row."""
    values, mean, error = pooled - pooled.mean(axis=0), [], []
    for group in (member.astype(float), 1.0 - member):
        n = group.sum(axis=1, keepdims=True)
        mean.append(group @ values / n)
        with np.errstate(invalid="ignore", divide="ignore"):
            error.append(np.maximum(group @ values**2 / n - mean[-1] ** 2, 0.0) / (n - 1))
    between, within, scale = mean[0] - mean[1], np.sqrt(error[0] + error[1]), np.abs(values).max(axis=0)
    between = np.where(np.abs(between) <= _ROUNDING * scale, 0.0, between)
    within = np.where(within <= _CANCELLED * scale, 0.0, within)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((between == 0) & ~np.isnan(within), 0.0, between / within)


def _share(found: Float[np.ndarray, "way cell"], scale: Cells) -> Cells:
    """Share of the ways that reach the first, the one observed; one without a value counts as reaching it."""
    distance = np.abs(np.where(np.isnan(found), np.inf, found))
    reached = distance * _REACHES + _ROUNDING * scale >= distance[0]
    return np.where(np.isnan(found[0]), np.nan, reached.mean(axis=0))


def pseudovalues(whole: Cells, without: Rows) -> Rows:
    r"""What each row brings to a measure of all rows pooled: $n \theta - (n - 1) \theta_{(i)}$ (Tukey's jackknife).

    Of a mean they are the rows' own values. NaN where a measure without a row has no value.

    Args:
        whole: of all rows.
        without: of all but one row, for each row.

    >>> pseudovalues(np.array([2.0]), np.array([[2.5], [2.0], [1.5]])).ravel().tolist()
    [1.0, 2.0, 3.0]
    """
    n = len(without)
    with np.errstate(invalid="ignore"):  # of infinite values: NaN
        return n * whole - (n - 1) * without


def least(n_rows: int, paired: bool) -> float:
    """The least p that so many rows of each trace can give."""
    ways = 2**n_rows if paired else comb(2 * n_rows, n_rows)
    return (2 if paired else 1) / ways if ways <= EXACT else 1 / (PERMUTATIONS + 1)


def holm(p: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Holm's adjusted p over all entries that are not NaN: it bounds the chance of any false one, however dependent.

    >>> holm(np.array([0.01, 0.04, 0.03, np.nan])).tolist()
    [0.03, 0.06, 0.06, nan]
    """
    flat = p.ravel()
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(flat[order] * np.arange(len(order), 0, -1)))
    return adjusted.reshape(p.shape)
