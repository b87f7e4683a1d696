"""Mass horizon: how far back the weight lies that a query puts on its sources, by hidden attention.

    M(t) = sum_s (t - s) |k_t[s]| / sum_s |k_t[s]|,   k_t a row of hidden attention

The mean distance is DeciMamba's (Ben-Kish et al. 2024, arXiv 2406.14528); per query token and head, with |.|: ours.
"""

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, Row, attention_row, read
from mamba_probe.analyses.memory_horizon.layer import blocks
from mamba_probe.analyses.memory_horizon.options import Options
from mamba_probe.analyses.memory_horizon.summary import with_interval

__all__ = ["mean_distance", "measure_mass"]


def measure_mass(view: Canonical, options: Options) -> dict[str, np.ndarray]:
    """Mass horizon of each requested token, (batch, query_token, head), as executed and once time-invariant.

    `view` holds one layer.

    Raises:
        ValueError: tokens of a row are missing.
    """
    shape = (view.n_rows, len(options.tokens), view.n_heads)
    found = {"mass_horizon": np.full(shape, np.nan), "null_lti_mass_horizon": np.full(shape, np.nan)}
    for row in range(view.n_rows):
        if not view.contiguous(row):
            raise ValueError(
                f"mass needs every token before a query, and those of row {row} are not contiguous: record all tokens"
            )
        for heads in blocks(view):
            frame = _Frame(view, row, heads)
            for q, token in enumerate(options.tokens):
                at = frame.row.index(token)
                found["mass_horizon"][row, q, heads] = frame.executed(at)
                found["null_lti_mass_horizon"][row, q, heads] = frame.frozen(at)

    def pooled(draws: Int[np.ndarray, " row"]) -> dict[str, np.ndarray]:
        return {f"layer_{name}": _median(draws, values) for name, values in list(found.items())}

    return found | with_interval(pooled, view.n_rows, options)


def mean_distance(
    kernel: Float[np.ndarray, "source head"], distance: Int[np.ndarray, " source"]
) -> Float[np.ndarray, " head"]:
    """Mean of the distance weighted by |kernel|; NaN where the kernel is 0.

    >>> mean_distance(np.array([[1.0], [0.0], [-3.0]]), np.array([2, 1, 0])).tolist()
    [0.5]
    """
    weight = np.abs(kernel)
    total = weight.sum(axis=0)
    return np.divide(distance @ weight, total, out=np.full(total.shape, np.nan), where=total > 0)


def _median(draws: Int[np.ndarray, " row"], values: np.ndarray) -> np.ndarray:
    """Median over drawn rows, queries and heads of what is known."""
    pooled = np.repeat(values, draws, axis=0)
    known = pooled[~np.isnan(pooled)]
    return np.asarray(np.median(known) if known.size else np.nan)


class _Frame:
    """delta, A, B and C of some heads of one row, and the rows of hidden attention they make."""

    def __init__(self, view: Canonical, row: int, heads: slice):
        self.row: Row = view.row(0, row, heads)
        self.zoh, self.A = view.zoh, view.matrix(0)[heads]
        if view.constant:  # one B and C for all tokens: kept so
            index = {"layer": 0, view.head_dim: heads}
            self.B, self.C = (read(view.trace[name].isel(index)).values[None].astype(complex) for name in ("B", "C"))
            self.groups = np.arange(len(self.A))
        else:
            (self.B, self.C), self.groups = view.selection(0, row), view.groups()[heads]
        self.means = (self.row.delta.mean(0), self.B.mean(0, keepdims=True), self.C.mean(0))

    def executed(self, at: int) -> Float[np.ndarray, " head"]:
        delta, elapsed = self.row.delta[: at + 1], self.row.cumulative[at] - self.row.cumulative[: at + 1]
        B, C = (self.B, self.C[0]) if len(self.B) == 1 else (self.B[: at + 1], self.C[at])
        return self._distance(delta, elapsed, B, C)

    def frozen(self, at: int) -> Float[np.ndarray, " head"]:
        """With delta, B and C at their means over the row."""
        delta, B, C = self.means
        lag = np.arange(at, -1, -1.0)[:, None]
        return self._distance(np.broadcast_to(delta, (at + 1, len(delta))), lag * delta, B, C)

    def _distance(self, delta: np.ndarray, elapsed: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
        kernel = attention_row(delta, elapsed, self.A, B, C, self.groups, self.zoh)
        return mean_distance(kernel, np.arange(len(delta))[::-1])
