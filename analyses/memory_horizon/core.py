"""Memory horizons of one channel: arrays in, arrays out.

A state decays at rate |A| in the time that delta measures, so the step written at s has shrunk to `level` once
|A| (Cum(s + k) - Cum(s)) >= -ln(level). A horizon that the recording does not reach is censored: all that is known is
the least it can be. Definitions and estimators are ours.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.memory_horizon.path import TIE

__all__ = [
    "backward",
    "counts",
    "elapsed",
    "forward",
    "frozen",
    "least_log_spread",
    "log_spread",
    "lti",
    "mirrored",
    "quantiles",
    "ratio",
    "reach",
]


def reach(level: float, A: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Elapsed delta after which retention is `level`: -ln(level) / |A|, infinite for A = 0.

    >>> reach(np.exp(-1), np.array([-0.5])).tolist()
    [2.0]
    """
    rate = np.abs(A)
    return np.divide(-np.log(level), rate, out=np.full(A.shape, np.inf), where=rate > 0)


def forward(
    reached: Int[np.ndarray, "state token"], position: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "state token"], Bool[np.ndarray, "state token"]]:
    """How long each token lives: H(s) = min{k >= 1 : Cum(s + k) - Cum(s) >= threshold}.

    Args:
        reached: the first later token by which each has decayed (`Path.reached`), the number of tokens where there is
            none.
        position: token counts; where tokens are missing a horizon is rounded up to the next one present.

    Returns:
        The horizon in tokens, and whether it is censored: then the number is the least that the horizon can be.

    >>> forward(np.array([[2, 3, 4, 4]]), np.arange(4))
    (array([[2, 2, 2, 1]]), array([[False, False,  True,  True]]))
    """
    steps = np.append(position, position[-1] + 1).take(reached)
    steps -= position
    return steps, reached == len(position)


def backward(
    reached: Int[np.ndarray, "state token"], position: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "state token"], Bool[np.ndarray, "state token"]]:
    """How far each step sees: min{k >= 1 : Cum(t) - Cum(t - k) >= threshold}.

    The tokens that have decayed by t are the first of the row, as many as have `reached` at most t; t sees up to the
    last of these.

    >>> backward(np.array([[2, 3, 4, 4]]), np.arange(4))
    (array([[1, 2, 2, 2]]), array([[ True,  True, False, False]]))
    """
    n_tokens = len(position)
    decayed = np.empty(reached.shape, dtype=int)
    for of, out in zip(reached, decayed, strict=True):
        np.cumsum(np.bincount(of, minlength=n_tokens)[:n_tokens], out=out)
    return position - np.append(position[0] - 1, position).take(decayed), decayed == 0


def mirrored(
    least: Int[np.ndarray, "*counted size"], first: Int[np.ndarray, "*counted"]
) -> Int[np.ndarray, "*counted size"]:
    """Counts of `backward` horizons, the censored in the last bin, from those of `forward` of a row without gaps.

    With each censored one at its least the two have the same counts. Backward, the censored are those of the tokens
    that the first one's write still reaches: their least horizons are 1 .. the first one's, once each.

    Args:
        least: forward horizons counted, each censored one at its least.
        first: forward horizon of the first token, or the least that it can be.

    >>> mirrored(np.array([0, 1, 3, 0]), np.array(2)).tolist()
    [0, 0, 2, 2]
    """
    lag = np.arange(least.shape[-1])
    exact = least - ((lag >= 1) & (lag <= first[..., None]))
    exact[..., -1] = first
    return exact


def frozen(
    horizon: Float[np.ndarray, " state"], position: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "state token"], Bool[np.ndarray, "state token"]]:
    """`forward` of a time-invariant layer: its real-valued horizon (`lti`) in whole tokens, the same at every token.

    >>> frozen(np.array([1.5]), np.arange(4))
    (array([[2, 2, 2, 1]]), array([[False, False,  True,  True]]))
    """
    end = position[-1] + 1
    whole = np.minimum(np.ceil(horizon), end - position[0]).astype(int)
    due = np.minimum(position + np.maximum(whole, 1)[:, None], end)
    if end - position[0] > len(position):
        ends = np.append(position, end)
        due = ends.take(np.searchsorted(ends, due))
    return due - position, due == end


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
) -> tuple[Int[np.ndarray, "state size"], Int[np.ndarray, "state size"]]:
    """How often each horizon 0 .. size - 2 occurs, twice: the censored in the last bin, and at the least each can be.

    >>> [count.tolist() for count in counts(np.array([[1, 1, 2]]), np.array([[False, False, True]]), 4)]
    [[[0, 2, 0, 1]], [[0, 2, 1, 0]]]
    """
    bins = steps + size * np.arange(len(steps))[:, None]
    least, unseen = (
        np.bincount(of, minlength=len(steps) * size).reshape(-1, size) for of in (bins.ravel(), bins[censored])
    )
    exact = least - unseen
    exact[:, -1] = unseen.sum(axis=-1)
    return exact, least


def quantiles(count: Int[np.ndarray, "*shape size"], at: Sequence[float]) -> Float[np.ndarray, "*shape quantile"]:
    """Smallest horizon whose share of the counts is at least each quantile; inf where that falls on censored ones.

    >>> quantiles(np.array([0, 2, 0, 1]), (0.5, 0.9)).tolist()
    [1.0, inf]
    """
    cumulative = np.cumsum(count, axis=-1)
    needed = np.maximum(np.ceil(np.asarray(at) * cumulative[..., -1:] * (1 - TIE)), 1)
    below = (cumulative[..., None, :] < needed[..., None]).sum(axis=-1)
    return np.where(below < count.shape[-1] - 1, below, np.inf)


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
