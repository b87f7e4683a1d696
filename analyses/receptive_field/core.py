"""Receptive fields in numbers: arrays in, arrays out. The sources of a query lie oldest first."""

import numpy as np
from jaxtyping import Float, Int

__all__ = ["clamped", "mean", "norm", "profile", "retention", "slope", "spread", "token_distance"]

FEWEST = 3
"""Sources that a slope needs."""


def norm(values: Float[np.ndarray, "term ..."]) -> Float[np.ndarray, "..."]:
    """Root of the sum of squares over the first axis; numbers whose squares underflow are not lost.

    >>> norm(np.array([[3e-200], [4e-200]])).tolist()
    [5e-200]
    """
    size = np.abs(values)
    peak = size.max(axis=0)
    return peak * np.sqrt(np.sum((size / np.where(peak > 0, peak, 1.0)) ** 2, axis=0))


def profile(size: Float[np.ndarray, "*place source"]) -> Float[np.ndarray, "*place source"]:
    r"""Share of each source, $S_k = |J_k| / \sum_j |J_j|$; NaN where a query reads nothing.

    Source: the relative gradient of "Block-Biased Mamba for Long-Range Sequence Processing", arXiv 2505.09022.

    >>> profile(np.array([1.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    peak = size.max(axis=-1, keepdims=True)
    shares = size / np.where(peak > 0, peak, np.nan)
    return shares / shares.sum(axis=-1, keepdims=True)


def spread(shares: Float[np.ndarray, "row source"]) -> Float[np.ndarray, " row"]:
    r"""Total variation between the profiles of each row and the next, around the batch: 0 where all inputs have one.

    $$\tfrac12 \sum_k |S_{r,k} - S_{r+1,k}|$$

    Its mean over rows is that over pairs of different rows, in expectation, and costs what the rows do. Rows that read
    nothing are NaN and passed over; one row has no other: NaN. Two rows have one pair, seen twice: no interval can be
    taken of them. Source: ours.

    >>> spread(np.array([[1.0, 0.0], [np.nan, np.nan], [0.0, 1.0]])).tolist()
    [1.0, nan, 1.0]
    """
    found, live = np.full(len(shares), np.nan), ~np.isnan(shares[:, 0])
    rows = shares[live]
    if len(rows) > 1:
        found[live] = np.abs(rows - np.roll(rows, -1, axis=0)).sum(axis=1) / 2
    return found


def slope(
    size: Float[np.ndarray, " source"], lag: Int[np.ndarray, " source"], first: int, last: int | None
) -> tuple[float, float]:
    """Least squares of log size on lag, over lags `first` to `last`: nats a token, and the share of those sources used.

    A source of size 0 has no logarithm and is left out; fewer than 3 sources have no slope: NaN.

    >>> value, used = slope(np.exp(-0.5 * np.arange(8)), np.arange(8), 2, None)
    >>> round(value, 12), used
    (-0.5, 1.0)
    """
    asked = (lag >= first) & (lag <= (np.inf if last is None else last))
    seen = asked & (size > 0)
    used = float(seen.sum() / asked.sum()) if asked.any() else np.nan
    if seen.sum() < FEWEST:
        return np.nan, used
    x, y = lag[seen] - lag[seen].mean(), np.log(size[seen])
    return float(x @ (y - y.mean()) / (x @ x)), used


def clamped(delta: Float[np.ndarray, "token head"], top: float) -> Float[np.ndarray, "token head"]:
    """Step sizes cut at the smallest of each head's largest `top` share of tokens, at least one token.

    Source: LongMamba's published code (arXiv 2504.16053).

    >>> clamped(np.array([[1.0], [2.0], [9.0], [3.0]]), 0.5).ravel().tolist()
    [1.0, 2.0, 3.0, 3.0]
    """
    n_top = max(1, int(len(delta) * top))
    return np.minimum(delta, np.partition(delta, len(delta) - n_top, axis=0)[len(delta) - n_top])


def retention(
    delta: Float[np.ndarray, "token head"], decay: Float[np.ndarray, "head decay"]
) -> Float[np.ndarray, " head"]:
    """exp(A sum delta), mean over the states of a head: what is left of a write after these tokens.

    >>> retention(np.full((4, 1), 0.25), np.log(np.array([[0.5, 0.25]]))).tolist()
    [0.375]
    """
    return np.exp(decay * delta.sum(axis=0)[:, None]).mean(axis=1)


def token_distance(n_tokens: int, total: Float[np.ndarray, " feature"], square: float) -> float:
    r"""Mean squared distance of two tokens over twice their mean squared size: 0 alike, 1 unrelated, from sums alone.

    $$\frac{\tfrac1{n(n-1)} \sum_{i \ne j} |v_i - v_j|^2}{\tfrac2n \sum_i |v_i|^2}
      = \frac{n}{n-1} \Bigl(1 - \frac{|\sum_i v_i|^2}{n \sum_i |v_i|^2}\Bigr)$$

    Source: after the over-smoothing of arXiv 2501.00658; the squares and the scale: ours.

    Args:
        n_tokens: how many tokens.
        total, square: sum of their vectors, and of their squared sizes.

    >>> token_distance(2, np.array([1.0, 1.0]), 2.0), token_distance(2, np.array([2.0, 0.0]), 2.0)
    (1.0, 0.0)
    """
    if n_tokens < 2 or square == 0:
        return np.nan
    return float(n_tokens / (n_tokens - 1) * (1 - total @ total / (n_tokens * square)))


def mean(values: Float[np.ndarray, "row ..."], draws: Int[np.ndarray, " row"]) -> Float[np.ndarray, "..."]:
    """Mean over rows as often as each is drawn, NaN left out; NaN where none is.

    >>> mean(np.array([1.0, np.nan, 4.0]), np.array([1, 1, 2])).tolist()
    3.0
    """
    live = ~np.isnan(values)
    count = np.tensordot(draws, live, 1)
    total = np.tensordot(draws, np.where(live, values, 0.0), 1)
    return np.asarray(np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0))
