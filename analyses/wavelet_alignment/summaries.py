"""Means and medians of each layer over rows, queries and kernels, with bootstrap intervals."""

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import interval
from mamba_probe.analyses.wavelet_alignment.statistics import MEDIANS

__all__ = ["interval_rule", "summarised"]

FEWEST_QUERIES = 4
MOST_BLOCKS = 16


def summarised(totals: dict[str, np.ndarray], prefix: str, n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """`layer_*` of one variant: value, `_low` and `_high`.

    Args:
        totals: sums over live kernels (layer, batch, query, ..), their count `live` (layer, batch, query), and the
            values whose median is taken (layer, batch, query, kernel).
        prefix: of the variant.
        n_bootstrap, seed: of the replicates.
    """
    n_rows, n_queries = totals["live"].shape[1:]
    unit = _units(n_rows, n_queries)
    n_units, found = int(unit.max()) + 1, {}
    for name, values in totals.items():
        if name == "live":
            continue
        statistic = _Median(values, unit) if name in MEDIANS else _Mean(values, totals["live"], unit)
        low, high = interval(statistic, n_units, n_bootstrap, seed)
        ends = {"": statistic(np.ones(n_units, dtype=int)), "_low": low, "_high": high}
        found |= {f"layer_{prefix}{name}{end}": value for end, value in ends.items()}
    return found


def interval_rule(n_rows: int, n_queries: int) -> str:
    """What is resampled, in words.

    >>> interval_rule(1, 1)
    'NaN: one row, nothing to resample'
    """
    if n_rows > 1:
        return "95 % percentile bootstrap over rows"
    if n_queries < FEWEST_QUERIES:
        return "NaN: one row, nothing to resample"
    return (
        f"95 % percentile bootstrap over token blocks: {min(n_queries, MOST_BLOCKS)} runs of consecutive queries of the"
        " one row (their windows overlap: too narrow for other texts)"
    )


def _units(n_rows: int, n_queries: int) -> Int[np.ndarray, "batch query"]:
    """What is resampled together: a row; with one row a run of consecutive queries."""
    if n_rows > 1:
        return np.broadcast_to(np.arange(n_rows)[:, None], (n_rows, n_queries))
    n_blocks = min(n_queries, MOST_BLOCKS) if n_queries >= FEWEST_QUERIES else 1
    return (np.arange(n_queries) * n_blocks // n_queries)[None]


class _Mean:
    """Mean over live kernels, as a function of how often each unit is drawn."""

    def __init__(self, total: Float[np.ndarray, "layer batch query *rest"], live: np.ndarray, unit: np.ndarray) -> None:
        member = (unit.ravel() == np.arange(unit.max() + 1)[:, None]).astype(float)
        self.total, self.count = (
            np.einsum("ui,li...->lu...", member, values.reshape(len(values), unit.size, *values.shape[3:]))
            for values in (total, live)
        )

    def __call__(self, draws: Int[np.ndarray, " unit"]) -> Float[np.ndarray, "*layer_and_rest"]:
        summed, counted = np.einsum("u,lu...->l...", draws, self.total), self.count @ draws
        return summed / np.where(counted > 0, counted, np.nan).reshape(-1, *[1] * (summed.ndim - 1))


class _Median:
    """Lower median over the values that are there, as a function of how often each unit is drawn."""

    def __init__(self, values: Float[np.ndarray, "layer batch query kernel"], unit: np.ndarray) -> None:
        of = np.broadcast_to(unit[:, :, None], values.shape[1:]).ravel()
        self.ordered = []
        for layer in values.reshape(len(values), -1):
            order = np.argsort(layer, kind="stable")[: np.count_nonzero(~np.isnan(layer))]
            self.ordered.append((layer[order], of[order]))

    def __call__(self, draws: Int[np.ndarray, " unit"]) -> Float[np.ndarray, " layer"]:
        return np.array([self._of(values, np.cumsum(draws[unit])) for values, unit in self.ordered])

    @staticmethod
    def _of(values: np.ndarray, weight: np.ndarray) -> float:
        if not len(weight) or weight[-1] == 0:
            return np.nan
        return float(values[np.searchsorted(weight, weight[-1] / 2)])
