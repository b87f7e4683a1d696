"""Relevance of tokens in, what it says of a row out: shares by class, entropy, distance; means with intervals."""

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.common import interval

__all__ = ["by_class", "entropy", "mean_distance", "own_share", "positive_share", "summary"]

Tokens = Float[np.ndarray, "*place token"]
Places = Float[np.ndarray, "*some"]


def positive_share(relevance: Tokens) -> Tokens:
    """max(R, 0) over its sum; NaN where nothing is positive, 0 where R is NaN.

    >>> positive_share(np.array([3.0, -2.0, 1.0, np.nan])).tolist()
    [0.75, 0.0, 0.25, 0.0]
    """
    return _ratio(np.maximum(np.nan_to_num(relevance), 0.0))


def _ratio(values: Tokens) -> Tokens:
    total = values.sum(-1, keepdims=True)
    return np.where(total > 0, values / np.where(total > 0, total, 1.0), np.nan)


def by_class(share: Tokens, member: Bool[np.ndarray, "class *place token"]) -> Places:
    """The part of each class of tokens.

    >>> by_class(np.array([0.75, 0.25]), np.array([[True, False], [False, True]])).tolist()
    [0.75, 0.25]
    """
    return np.where(member, share, 0.0).sum(-1) + np.where(np.isnan(share).any(-1), np.nan, 0.0)


def entropy(share: Tokens) -> Float[np.ndarray, "*place"]:
    """- sum p ln p, in nats.

    >>> round(float(entropy(np.array([0.5, 0.5, 0.0])) / np.log(2)), 6)
    1.0
    """
    return np.asarray(-np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1))


def mean_distance(share: Tokens, distance: Int[np.ndarray, "*place token"]) -> Float[np.ndarray, "*place"]:
    """Mean of the tokens' distances to the query, weighted by their share."""
    return np.sum(share * distance, axis=-1)


def own_share(relevance: Tokens, own: Bool[np.ndarray, "*#place token"]) -> Float[np.ndarray, "*place"]:
    """Share of |R| at the query's own token; NaN where no token has any.

    >>> own_share(np.array([-3.0, 1.0]), np.array([False, True])).item()
    0.25
    """
    share = _ratio(np.abs(np.nan_to_num(relevance)))
    return np.asarray(np.where(own, share, 0.0).sum(-1) + np.where(np.isnan(share).any(-1), np.nan, 0.0))


def summary(
    values: Float[np.ndarray, "*over batch query"], n_bootstrap: int, seed: int
) -> dict[str, Float[np.ndarray, "*over"]]:
    """Mean over rows and queries, NaN left out, and its interval over rows, by the end of a variable's name.

    >>> summary(np.array([[1.0], [3.0], [np.nan]]), 100, 0)[""].item()
    2.0
    """
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(float)

    def statistic(draws: Int[np.ndarray, " row"]) -> Float[np.ndarray, "*over"]:
        some, of = total @ draws.astype(float), count @ draws.astype(float)
        return np.where(of > 0, some / np.where(of > 0, of, 1.0), np.nan)

    low, high = interval(statistic, values.shape[-2], n_bootstrap, seed)
    ends = {"": statistic(np.ones(values.shape[-2], dtype=int)), "_low": low, "_high": high}
    return {end: np.asarray(each) for end, each in ends.items()}
