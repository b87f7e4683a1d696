r"""State dynamics in numbers: arrays in, arrays out.

With h before it, a state after some tokens is exp(A Cum) h + K x, and what later tokens read of it is O h:

    K[n, s] = exp(A_n Cum(s, i-1)) w_s B_s[n],  s < i        O[t, n] = C_t[n] exp(A_n Cum(i-1, t)),  t >= i

w = delta (euler) or delta phi1(delta A) (zoh). So the block T[i:, :i] of the token-mixing matrix is O K; decays are
taken from i on both sides and are at most 1: nothing overflows, and what underflows is 0 in T as well.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Inexact, Int

__all__ = [
    "effective",
    "growth",
    "moments",
    "reading",
    "real_parts",
    "saturation",
    "singular",
    "slope",
    "triangle",
    "written",
]

LATEST = 3
"""Fewest samples that a growth is fitted to."""
EMPTY = 1e-6
"""Share of its largest size below which a state counts as not there yet, or there no longer."""


def written(
    delta: Float[np.ndarray, "token head"], elapsed: Float[np.ndarray, "token head"],
    A: Inexact[np.ndarray, "head decay"], B: Inexact[np.ndarray, "#token group state"],
    groups: Int[np.ndarray, " head"], zoh: bool,
) -> Inexact[np.ndarray, "token head state"]:  # fmt: skip
    """What an x of 1 at each token leaves in the states, `elapsed` being the sum of delta since: K, transposed.

    >>> one = np.ones((2, 1))
    >>> written(one, np.array([[np.log(2)], [0.0]]), -one[:1], one[..., None], np.array([0]), False).ravel().tolist()
    [0.5, 1.0]
    """
    weight = np.exp(A * elapsed[..., None]) * delta[..., None]
    if zoh:
        step = A * delta[..., None]
        weight = weight * np.where(step == 0, 1.0, np.expm1(step) / np.where(step == 0, 1.0, step))
    return weight * B[:, groups]


def reading(
    elapsed: Float[np.ndarray, "token head"], A: Inexact[np.ndarray, "head decay"],
    C: Inexact[np.ndarray, "#token group state"], groups: Int[np.ndarray, " head"],
) -> Inexact[np.ndarray, "token head state"]:  # fmt: skip
    """What each token reads of a state `elapsed` ago: O.

    >>> reading(np.array([[np.log(4)]]), -np.ones((1, 1)), np.full((1, 1, 1), 2.0), np.array([0])).item()
    0.5
    """
    return np.exp(A * elapsed[..., None]) * C[:, groups]


def real_parts(
    values: Inexact[np.ndarray, "token head state"], reads: bool
) -> Float[np.ndarray, "token head real_state"]:
    """Factors of 2 Re(O K) in real numbers, [Re O, -Im O] and 2 [Re K, Im K]: a complex state is two real ones.

    >>> pair = np.array([[[1.0 + 2.0j]]])
    >>> (real_parts(pair, True) * real_parts(pair, False)).sum().item(), 2 * (pair * pair).real.item()
    (-6.0, -6.0)
    """
    if not np.iscomplexobj(values):
        return values
    if reads:
        return np.concatenate([np.real(values), -np.imag(values)], axis=-1)
    return 2 * np.concatenate([np.real(values), np.imag(values)], axis=-1)


def triangle(tiles: Iterable[Float[np.ndarray, "_ head state"]]) -> Float[np.ndarray, "head rank state"]:
    """R of the QR decomposition of each head's rows, taken in a tile of tokens at a time.

    >>> abs(triangle([np.full((1, 1, 1), 3.0), np.full((1, 1, 1), 4.0)]).item())
    5.0
    """
    found: Any = None
    for tile in tiles:
        rows = np.swapaxes(tile, 0, 1)
        found = np.linalg.qr(rows if found is None else np.concatenate([found, rows], axis=1), mode="r")
    if found is None:
        raise ValueError("triangle needs at least one tile of rows; got none")
    return found


def singular(
    reads: Float[np.ndarray, "head rank_o state"], writes: Float[np.ndarray, "head rank_k state"]
) -> Float[np.ndarray, "head size"]:
    """Singular values of O K, from the triangles of O and of K transposed, largest first.

    >>> singular(np.array([[[3.0]]]), np.array([[[2.0]]])).tolist()
    [[6.0]]
    """
    return np.linalg.svd(reads @ np.swapaxes(writes, 1, 2), compute_uv=False)


def effective(
    values: Float[np.ndarray, "head size"], floor: Float[np.ndarray, " head"]
) -> tuple[Float[np.ndarray, " head"], Float[np.ndarray, " head"]]:
    """Two effective sizes: exp(-sum p ln p) with p = sv / sum sv, 0 where all are 0; and how many exceed `floor`.

    >>> effective(np.array([[2.0, 2.0, 1e-9], [0.0, 0.0, 0.0]]), np.full(2, 1e-6))
    (array([2.00000001, 0.        ]), array([2., 0.]))
    """
    total = values.sum(axis=1, keepdims=True)
    p = values / np.where(total > 0, total, 1.0)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)
    return np.where(total[:, 0] > 0, np.exp(entropy), 0.0), np.sum(values > floor[:, None], axis=1).astype(float)


def moments(h: Inexact[np.ndarray, "*sample head head_channel state"]) -> Float[np.ndarray, "moment *sample head"]:
    """Mean, variance and root mean square of a head's state, over its numbers; a complex one counts with its conjugate.

    >>> moments(np.array([[[1.0, 3.0]]])).ravel().round(3).tolist(), moments(np.array([[[3 + 4j]]])).ravel().tolist()
    ([2.0, 1.0, 2.236], [3.0, 16.0, 5.0])
    """
    mean, square = np.real(h).mean(axis=(-2, -1)), (np.abs(h) ** 2).mean(axis=(-2, -1))
    spread = (np.abs(h - mean[..., None, None]) ** 2).mean(axis=(-2, -1))
    return np.stack([mean, spread, np.sqrt(square)])


def growth(size: Float[np.ndarray, "*sample_series"], count: Int[np.ndarray, " sample"]) -> Float[np.ndarray, "..."]:
    """Exponent a of size ~ count^a: the slope of ln size on ln count over the later half of the counts.

    NaN with fewer than three samples there, or where a size is at most 1e-6 of the series' largest: nothing is held.

    >>> count = np.arange(1, 9)
    >>> growth(3.0 * np.sqrt(count), count).round(6).item()
    0.5
    >>> growth(np.where(count < 7, 1.0, 1e-9), count).item()
    nan
    """
    late = count >= count[-1] / 2
    if late.sum() < LATEST:
        return np.full(size.shape[1:], np.nan)
    lasting = size[late] > EMPTY * size.max(axis=0)
    return slope(np.log(np.where(lasting, size[late], np.nan)), np.log(count[late]))


def slope(values: Float[np.ndarray, "*sample_series"], at: Float[np.ndarray, " sample"]) -> Float[np.ndarray, "..."]:
    """Slope of the least squares line; NaN where a value is.

    >>> slope(np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0])).item()
    2.0
    """
    centred = at - at.mean()
    return np.asarray(np.tensordot(centred, values, axes=1) / np.sum(centred**2))


def saturation(
    delta: Float[np.ndarray, "token head"], rate: Float[np.ndarray, "head decay"], threshold: float
) -> dict[str, Bool[np.ndarray, "token head"]]:
    """Whether a step is saturated, eps being `threshold`.

    closed: 1 - exp(-delta) < eps, which is the slope of softplus where it gives delta: next to nothing is written.
    held: exp(-|A| delta) > 1 - eps in every state. erased: exp(-|A| delta) < eps in every state.

    >>> found = saturation(np.array([[1e-9], [1.0], [99.0]]), np.ones((1, 1)), 1e-3)
    >>> {name: of.ravel().astype(int).tolist() for name, of in found.items()}
    {'closed': [1, 0, 0], 'held': [1, 0, 0], 'erased': [0, 0, 1]}
    """
    near_one, gone = -np.log1p(-threshold), -np.log(threshold)
    return {
        "closed": delta < near_one,
        "held": delta * rate.max(axis=1) < near_one,
        "erased": delta * rate.min(axis=1) > gone,
    }
