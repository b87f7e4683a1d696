"""Step sizes at a class of tokens against the rest of the same row, in numbers: arrays in, arrays out."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

__all__ = ["adjusted", "logarithm", "mean", "shifted", "sums", "usable"]

BLOCK_BYTES = 2**25
"""Most bytes of the shifted labels of a row at once, in float64."""


def usable(member: Bool[np.ndarray, "class token"]) -> Bool[np.ndarray, " class"]:
    """Whether a row has tokens of the class and others: a row without either says nothing of it."""
    return np.asarray(member.any(axis=1) & ~member.all(axis=1))


def sums(
    member: Float[np.ndarray, "*label token"], delta: Float[np.ndarray, "token head"]
) -> tuple[Float[np.ndarray, "*label head"], Float[np.ndarray, "*label head"]]:
    """Sum of delta over the class's tokens, and what it would be were each of them as the mean of the row's rest.

    >>> found = sums(np.array([[1.0, 0.0, 0.0]]), np.array([[6.0], [1.0], [3.0]]))
    >>> [part.tolist() for part in found]
    [[[6.0]], [[2.0]]]
    """
    n = member.sum(axis=-1, keepdims=True)
    rest = len(delta) - n
    live = n * rest > 0
    mean = np.divide((1.0 - member) @ delta, rest, out=np.zeros((*rest.shape[:-1], delta.shape[1])), where=rest > 0)
    return np.where(
        live, member @ delta, 0.0
    ), n * mean  # the rest summed by itself: a difference would lose small steps


def shifted(
    member: Bool[np.ndarray, "class token"], n: int, seed: tuple[int, ...]
) -> Iterator[tuple[slice, Float[np.ndarray, "class shift token"]]]:
    """The labels of a row shifted circularly by random numbers of tokens, the same for all classes, some at a time."""
    rng, (n_classes, n_tokens) = np.random.default_rng(seed), member.shape
    step = max(1, BLOCK_BYTES // (8 * n_classes * n_tokens))
    for start in range(0, n, step):
        size = min(step, n - start)
        order = (np.arange(n_tokens) + rng.integers(n_tokens, size=(size, 1))) % n_tokens
        yield slice(start, start + size), member[:, order].astype(float)


def logarithm(parts: Float[np.ndarray, "part=2 *shape"]) -> Float[np.ndarray, "*shape"]:
    """Logarithm of the ratio of the two sums: infinite where one of them is 0, NaN where both are.

    >>> logarithm(np.array([[2.0, 0.0, 1.0, 0.0], [2.0, 1.0, 0.0, 0.0]])).tolist()
    [0.0, -inf, inf, nan]
    """
    class_, rest = np.log(parts, out=np.full(parts.shape, -np.inf), where=parts > 0)
    return np.subtract(class_, rest, out=np.full(class_.shape, np.nan), where=(parts > 0).any(axis=0))


def mean(values: Float[np.ndarray, "*shape head"]) -> Float[np.ndarray, "*shape"]:
    """Over the heads that have a finite number; NaN where none has.

    >>> mean(np.array([[1.0, np.nan, 3.0, -np.inf], [np.nan, np.nan, np.nan, np.inf]])).tolist()
    [2.0, nan]
    """
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    return np.divide(
        np.where(known, values, 0.0).sum(axis=-1), count, out=np.full(count.shape, np.nan), where=count > 0
    )


def adjusted(score: Float[np.ndarray, "*shape"], largest: Float[np.ndarray, " shift"]) -> Float[np.ndarray, "*shape"]:
    """Family-wise p-values of scores: how often the largest of all of them is as large by chance (max-T).

    >>> adjusted(np.array([5.0, 1.5]), np.array([1.0, 2.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    reached = len(largest) - np.searchsorted(np.sort(largest), score, side="left")
    return np.where(np.isnan(score), np.nan, (1 + reached) / (1 + len(largest)))
