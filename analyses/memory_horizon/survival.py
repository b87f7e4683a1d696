"""Horizons of which some are censored: the Kaplan-Meier curve, its quantiles and its restricted mean.

Counts are `core.counts` twice: `exact` holds the censored in its last bin, `least` at the least each can be. A horizon
that is at least c was watched for c - 1 steps. The estimator (Kaplan and Meier 1958) assumes that a token's horizon
does not depend on where it stands, since the end of a recording censors by position: stated, not tested. The bounds
assume nothing.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

__all__ = ["at_risk", "curve", "curve_quantiles", "mean_bounds", "restricted_mean", "share_bounds"]

TIE = 1e-9
"""Slack of a comparison with a product of ratios of counts."""

Counted = Int[np.ndarray, "*shape size"]


def at_risk(exact: Counted, least: Counted) -> Int[np.ndarray, "*shape step"]:
    """n_k: how many horizons are at least k and were watched for k steps.

    >>> at_risk(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])).tolist()
    [2, 2, 0]
    """
    later = np.cumsum(least[..., ::-1], axis=-1)[..., ::-1][..., :-1]
    return later - (least - exact)[..., :-1]


def curve(exact: Counted, least: Counted) -> Float[np.ndarray, "*shape step"]:
    """S(k) = P(H > k) = prod_{j <= k} (1 - d_j / n_j); NaN from where nobody is watched, unless it reached 0.

    >>> curve(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])).tolist()
    [1.0, 0.5, nan]
    """
    risk = at_risk(exact, least)
    ended = np.divide(exact[..., :-1], risk, out=np.zeros(risk.shape), where=risk > 0)
    survival = np.cumprod(1.0 - ended, axis=-1)
    return np.where((risk > 0) | (survival == 0), survival, np.nan)


def curve_quantiles(
    survival: Float[np.ndarray, "*shape step"], at: Sequence[float]
) -> Float[np.ndarray, "*shape quantile"]:
    """Smallest k with S(k) <= 1 - q; inf where the curve does not come down to it, NaN where nothing was counted.

    >>> curve_quantiles(np.array([1.0, 0.5, np.nan]), (0.5, 0.9)).tolist()
    [1.0, inf]
    """
    below = [survival <= 1 - q + TIE for q in at]
    found = np.stack([np.where(b.any(axis=-1), b.argmax(axis=-1), np.inf) for b in below], axis=-1)
    return np.where(np.isnan(survival[..., :1]), np.nan, found)


def restricted_mean(survival: Float[np.ndarray, "*shape step"], within: int) -> Float[np.ndarray, "*shape"]:
    """Mean of min(H, within) by the curve: the sum of S(k) over k < within.

    >>> restricted_mean(np.array([1.0, 0.5, 0.25]), 2).item()
    1.5
    """
    return np.asarray(survival[..., :within].sum(axis=-1))


def mean_bounds(exact: Counted, least: Counted, within: int) -> Float[np.ndarray, "bound=2 *shape"]:
    """The least and the most that the mean of min(H, within) can be, whatever the censored horizons are.

    >>> mean_bounds(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0]), 4).tolist()
    [1.5, 2.5]
    """
    steps = np.minimum(np.arange(exact.shape[-1]), within).astype(float)
    most = np.append(steps[:-1], within)
    total = exact.sum(axis=-1)
    return np.stack(
        [
            np.divide(count @ weight, total, out=np.full(total.shape, np.nan), where=total > 0)
            for count, weight in ((least, steps), (exact, most))
        ]
    )


def share_bounds(exact: Counted, least: Counted) -> Float[np.ndarray, "bound=2 *shape step"]:
    """The least and the most that the share of horizons above k can be, whatever the censored horizons are.

    >>> share_bounds(np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])).tolist()
    [[1.0, 0.5, 0.0], [1.0, 0.5, 0.5]]
    """
    total = exact.sum(axis=-1, keepdims=True).astype(float)
    ended = [np.cumsum(count[..., :-1], axis=-1) for count in (least, exact)]
    shape = exact[..., :-1].shape
    return np.stack([1 - np.divide(e, total, out=np.full(shape, np.nan), where=total > 0) for e in ended])
