"""Memory horizons of one channel, from cumulative delta: arrays in, arrays out.

A state decays at rate |A| in the time that delta measures, so the step written at s has shrunk to `level` once
|A| (Cum(s + k) - Cum(s)) >= -ln(level). A horizon that the recording does not reach is censored: all that is known is
the least it can be. Definitions and estimators are ours.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = [
    "backward",
    "counts",
    "elapsed",
    "forward",
    "least_log_spread",
    "log_spread",
    "lti",
    "quantiles",
    "ratio",
    "reach",
]

TIE = 1e-9
"""A threshold counts as reached within this relative distance, so that rounding of a sum cannot add a token."""


def reach(level: float, A: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Elapsed delta after which retention is `level`: -ln(level) / |A|, infinite for A = 0.

    >>> reach(np.exp(-1), np.array([-0.5])).tolist()
    [2.0]
    """
    rate = np.abs(A)
    return np.divide(-np.log(level), rate, out=np.full(A.shape, np.inf), where=rate > 0)


def forward(
    cumulative: Float[np.ndarray, " token"], threshold: Float[np.ndarray, " state"], position: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "state token"], Bool[np.ndarray, "state token"]]:
    """How long each token lives: H(s) = min{k >= 1 : Cum(s + k) - Cum(s) >= threshold}.

    Args:
        cumulative: sum of delta up to and with each token, non-decreasing.
        threshold: elapsed delta at which each state has decayed to the level (`reach`).
        position: token counts; where tokens are missing a horizon is rounded up to the next one present.

    Returns:
        The horizon in tokens, and whether it is censored: then the number is the least that the horizon can be.

    >>> forward(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0]), np.arange(4))
    (array([[2, 2, 2, 1]]), array([[False, False,  True,  True]]))
    """
    n_tokens = len(cumulative)
    target = cumulative + (threshold * (1 - TIE))[:, None]
    reached = np.searchsorted(cumulative, target.ravel(), side="left").reshape(target.shape)
    reached = np.maximum(reached, np.arange(1, n_tokens + 1))
    ends = np.append(position, position[-1] + 1)
    return ends[reached] - position, reached == n_tokens


def backward(
    cumulative: Float[np.ndarray, " token"], threshold: Float[np.ndarray, " state"], position: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "state token"], Bool[np.ndarray, "state token"]]:
    """How far each step sees: min{k >= 1 : Cum(t) - Cum(t - k) >= threshold}; `forward` of the mirrored sequence.

    >>> backward(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0]), np.arange(4))
    (array([[1, 2, 2, 2]]), array([[ True,  True, False, False]]))
    """
    steps, censored = forward(-cumulative[::-1], threshold, -position[::-1])
    return steps[:, ::-1], censored[:, ::-1]


def lti(
    threshold: Float[np.ndarray, "*shape"], mean_delta: Float[np.ndarray, "*#shape"]
) -> Float[np.ndarray, "*shape"]:
    """H_eq = threshold / mean delta: real-valued horizon in tokens of the layer with delta frozen to its mean.

    >>> lti(np.array([1.0]), np.array([0.25])).tolist()
    [4.0]
    """
    mean = np.broadcast_to(mean_delta, threshold.shape)
    return np.divide(threshold, mean, out=np.full(threshold.shape, np.inf), where=mean > 0)


def counts(
    steps: Int[np.ndarray, "state token"], censored: Bool[np.ndarray, "state token"], size: int
) -> Int[np.ndarray, "state size"]:
    """How often each horizon 0 .. size - 2 occurs; the last bin holds the censored ones.

    >>> counts(np.array([[1, 1, 2]]), np.array([[False, False, True]]), 4).tolist()
    [[0, 2, 0, 1]]
    """
    n_states = len(steps)
    bins = np.where(censored, size - 1, steps) + size * np.arange(n_states)[:, None]
    return np.bincount(bins.ravel(), minlength=n_states * size).reshape(n_states, size)


def quantiles(count: Int[np.ndarray, "*shape size"], at: Sequence[float]) -> Float[np.ndarray, "*shape quantile"]:
    """Smallest horizon whose share of the counts is at least each quantile; inf where that falls on censored ones.

    >>> quantiles(np.array([0, 2, 0, 1]), (0.5, 0.9)).tolist()
    [1.0, inf]
    """
    cumulative = np.cumsum(count, axis=-1)
    values = np.append(np.arange(count.shape[-1] - 1, dtype=float), np.inf)
    needed = [np.ceil(q * cumulative[..., -1:] * (1 - TIE)) for q in at]
    return np.stack([values[np.argmax(cumulative >= np.maximum(need, 1), axis=-1)] for need in needed], axis=-1)


def elapsed(
    delta: Float[np.ndarray, "token head"],
    cumulative: Float[np.ndarray, "token head"],
    position: Int[np.ndarray, " token"],
) -> tuple[Float[np.ndarray, " head"], int]:
    """Sum of delta and the number of tokens it spans; across gaps, from the first token present to the last.

    >>> elapsed(np.ones((3, 1)), np.array([[1.0], [2.0], [3.0]]), np.arange(3))
    (array([3.]), 3)
    """
    if np.all(np.diff(position) == 1):
        return delta.sum(axis=0), len(position)
    return cumulative[-1] - cumulative[0], int(position[-1] - position[0])


def log_spread(horizon: Float[np.ndarray, "head state quantile"]) -> Float[np.ndarray, "head state"]:
    """ln of the last quantile over the first: inf where the last is censored, NaN where the first is too.

    >>> log_spread(np.array([[[1.0, 2.0, np.e]]])).item()
    1.0
    """
    low = np.where(np.isfinite(horizon[..., 0]), horizon[..., 0], np.nan)
    return np.log(horizon[..., -1] / low)


def least_log_spread(
    horizon: Float[np.ndarray, "head state quantile"], at_least: Float[np.ndarray, "head state quantile"]
) -> Float[np.ndarray, "head state"]:
    """The least that `log_spread` can be: ln of the least last quantile over the most that the first can be.

    >>> least_log_spread(np.array([[[1.0, 2.0, np.inf]]]), np.array([[[1.0, 2.0, np.e]]])).item()
    1.0
    """
    return np.log(np.maximum(at_least[..., -1] / horizon[..., 0], 1.0))


def ratio(horizon: Float[np.ndarray, "*shape"], reference: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Horizon over reference; NaN where the reference never decays.

    >>> ratio(np.array([4.0, np.inf]), np.array([2.0, np.inf])).tolist()
    [2.0, nan]
    """
    return horizon / np.where(np.isfinite(reference), reference, np.nan)
