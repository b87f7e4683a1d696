"""The primitive beneath every kernel: how much one token reads from each earlier one, selection as executed.

    alpha_t[s] = sum_n C_t[n] exp(A_n Cum(s, t)) w_s[n] B_s[n]      w = delta (euler), delta phi1(delta A) (zoh)

twice the real part where A is complex. Then alpha_t . x + D x_t is the scan's output before its gate. Source: the
hidden attention of Ali et al. 2024, arXiv 2403.01590; the zoh and complex forms: ours.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Inexact, Int

__all__ = ["attention_row"]

TILE = 2**14
"""Terms of one state worked on at once: few enough that its arrays stay in a core's cache."""
GONE = -746.0
"""Exponents below it give 0 exactly in float64, whose smallest number is exp(-745.13): such terms are not formed."""


def attention_row(
    delta: Float[np.ndarray, "source head"],
    elapsed: Float[np.ndarray, "source head"],
    A: Inexact[np.ndarray, "head decay"],
    B: Inexact[np.ndarray, "#source group state"],
    C: Inexact[np.ndarray, "group state"],
    groups: Int[np.ndarray, " head"],
    zoh: bool = False,
) -> Float[np.ndarray, "source head"]:
    r"""Weight of each source in the scan's output at one query, by head; O(source head state), a tile at a time.

    Sources before the first whose decay is not 0 in float64 cost no more than a comparison.

    Args:
        delta: step sizes of the sources.
        elapsed: Cum(s, t), the sum of delta after each source up to and with the query.
        A: one decay where all states share it (Mamba-2), else one a state; complex for S4D.
        B: input vectors of the sources, promoted to C's type a tile at a time; one row stands for all (constant).
        C: output vector at the query.
        groups: group that each head reads.
        zoh: whether the write is delta phi1(delta A) B instead of delta B.

    >>> one = np.ones((2, 1, 1))
    >>> elapsed, groups = np.array([[1.0], [0.0]]), np.array([0])
    >>> attention_row(one[:, 0], elapsed, -one[0], one, one[0], groups).round(3).ravel().tolist()
    [0.368, 1.0]
    """
    n_sources, n_heads = elapsed.shape
    weight: Any = np.zeros((n_heads, n_sources), dtype=np.result_type(A, B, C, delta, elapsed))
    width = TILE // max(1, min(n_sources, TILE))
    for start in range(0, n_sources, TILE):
        sources = slice(start, start + TILE)
        matched = _matched(B if len(B) == 1 else B[sources], C, A.shape[1] == 1)
        for head in range(0, n_heads, width):
            heads = slice(head, head + width)
            step = np.ascontiguousarray(delta[sources, heads].T) if zoh else None
            tile = np.ascontiguousarray(elapsed[sources, heads].T)
            _add(weight[heads, sources], tile, A[heads], matched, groups[heads], step)
    weight = 2 * weight.real if np.iscomplexobj(weight) else weight
    weight *= delta.T
    return weight.T


def _matched(
    B: Inexact[np.ndarray, "#source group state"], C: Inexact[np.ndarray, "group state"], joined: bool
) -> Inexact[np.ndarray, "group decay #source"]:
    """B times C of each source, summed over states where they share their decay; sources lie side by side."""
    matched = B * C
    if joined:
        matched = matched.sum(axis=-1, keepdims=True)
    return np.ascontiguousarray(np.moveaxis(matched, 0, -1))


def _add(
    weight: Inexact[np.ndarray, "head source"],
    elapsed: Float[np.ndarray, "head source"],
    A: Inexact[np.ndarray, "head decay"],
    matched: Inexact[np.ndarray, "group decay #source"],
    groups: Int[np.ndarray, " head"],
    step: Float[np.ndarray, "head source"] | None,
) -> None:
    """Add the sum over states to a tile; `step` is delta where the write is zoh's."""
    for n in range(A.shape[1]):
        rate = A[:, n, None]
        exponent: Any = np.multiply(rate, elapsed, dtype=weight.dtype)
        live = (exponent.real > GONE).any(axis=0)
        first = int(live.argmax())
        if not live[first]:
            continue
        term = np.exp(exponent[:, first:], out=exponent[:, first:])
        term *= matched[groups, n, first if matched.shape[-1] > 1 else 0 :]
        if step is not None:
            term *= _phi1(step[:, first:] * rate)
        weight[:, first:] += term


def _phi1(z: Inexact[np.ndarray, "*shape"]) -> Inexact[np.ndarray, "*shape"]:
    """(exp(z) - 1) / z, and 1 at 0."""
    safe = np.where(z == 0, 1.0, z)
    return np.where(z == 0, 1.0, np.expm1(safe) / safe)
