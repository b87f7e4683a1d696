"""The primitive beneath every kernel: how much one token reads from each earlier one, selection as executed.

    alpha_t[s] = sum_n C_t[n] exp(A_n Cum(s, t)) w_s[n] B_s[n]      w = delta (euler), delta phi1(delta A) (zoh)

twice the real part where A is complex. Then alpha_t . x + D x_t is the scan's output before its gate. Source: the
hidden attention of Ali et al. 2024, arXiv 2403.01590; the zoh and complex forms: ours.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Inexact, Int

__all__ = ["attention_row"]


def attention_row(
    delta: Float[np.ndarray, "source head"],
    elapsed: Float[np.ndarray, "source head"],
    A: Inexact[np.ndarray, "head decay"],
    B: Inexact[np.ndarray, "#source group state"],
    C: Inexact[np.ndarray, "group state"],
    groups: Int[np.ndarray, " head"],
    zoh: bool = False,
) -> Float[np.ndarray, "source head"]:
    r"""Weight of each source in the scan's output at one query, by head; O(source head state), a state at a time.

    Args:
        delta: step sizes of the sources.
        elapsed: Cum(s, t), the sum of delta after each source up to and with the query.
        A: one decay where all states share it (Mamba-2), else one a state; complex for S4D.
        B: input vectors of the sources; one row stands for all (constant).
        C: output vector at the query.
        groups: group that each head reads.
        zoh: whether the write is delta phi1(delta A) B instead of delta B.

    >>> one = np.ones((2, 1, 1))
    >>> elapsed, groups = np.array([[1.0], [0.0]]), np.array([0])
    >>> attention_row(one[:, 0], elapsed, -one[0], one, one[0], groups).round(3).ravel().tolist()
    [0.368, 1.0]
    """
    matched = B * C
    if A.shape[1] == 1:
        matched = matched.sum(axis=-1, keepdims=True)
    weight: Any = np.zeros(elapsed.shape, dtype=np.result_type(A, matched))
    for n in range(A.shape[1]):
        rate = A[:, n]
        write = _phi1(delta * rate) if zoh else 1.0
        weight += np.exp(rate * elapsed) * write * matched[:, groups, n]
    return delta * (2 * weight.real if np.iscomplexobj(weight) else weight)


def _phi1(z: Inexact[np.ndarray, "*shape"]) -> Inexact[np.ndarray, "*shape"]:
    """(exp(z) - 1) / z, and 1 at 0."""
    safe = np.where(z == 0, 1.0, z)
    return np.where(z == 0, 1.0, np.expm1(safe) / safe)
