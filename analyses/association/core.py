"""How much of an answer comes back when a part of a run is restored, over rows; arrays in, arrays out."""

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["LEAST", "gain", "held_at", "share"]

LEAST = 0.1
"""What a place must give back, at the lower bound, to be named."""


def gain(
    change: Float[np.ndarray, "*place row"], span: Float[np.ndarray, " row"], draws: Int[np.ndarray, " row"]
) -> Float[np.ndarray, "*place"]:
    r"""Least squares through the origin: change = gain . span, over rows.

    $\mathrm{gain} = \sum_i c_i s_i / \sum_i s_i^2$: 0 nothing comes back, 1 all of it. A row whose span is near 0
    hardly weighs, where a mean of c_i / s_i would be carried away. Source: ours.

    Args:
        change: patched - corrupt; NaN where a row has no such place.
        span: clean - corrupt.
        draws: how often each row counts.

    >>> gain(np.array([[1.0, 2.0], [0.0, np.nan]]), np.array([2.0, 4.0]), np.array([1, 1])).tolist()
    [0.5, 0.0]
    """
    there = ~np.isnan(change)
    product = (np.where(there, change, 0.0) * span) @ draws.astype(float)
    square = (there * span**2) @ draws.astype(float)
    return np.where(square > 0, product / np.where(square > 0, square, 1.0), np.nan)


def share(
    right: Bool[np.ndarray, "*place row"], there: Bool[np.ndarray, "*place row"], draws: Int[np.ndarray, " row"]
) -> Float[np.ndarray, "*place"]:
    """Share of the rows that have a place whose answer is right.

    >>> share(np.array([[True, False]]), np.array([[True, True]]), np.array([1, 3])).tolist()
    [0.25]
    """
    count = there @ draws.astype(float)
    return np.where(count > 0, ((right & there) @ draws.astype(float)) / np.where(count > 0, count, 1.0), np.nan)


def held_at(
    value: Float[np.ndarray, " role"], low: Float[np.ndarray, " role"], null: Float[np.ndarray, " role"]
) -> list[int]:
    """Roles that give the answer back, most first: at their lower bound by `LEAST`, and more than another row's.

    Args:
        value, low: gain and its lower bound; NaN counts as nothing.
        null: upper bound of what another row gives back; NaN where there is no null.

    >>> held_at(np.array([0.0, 0.9, 0.3]), np.array([0.0, 0.8, 0.2]), np.array([np.nan, 0.1, 0.4]))
    [1]
    """
    least = np.fmax(LEAST, null)
    return [int(role) for role in np.argsort(-np.nan_to_num(value), kind="stable") if low[role] > least[role]]
