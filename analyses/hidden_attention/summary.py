"""Means over rows, queries and heads, with intervals; nulls alike."""

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import interval
from mamba_probe.analyses.hidden_attention import core
from mamba_probe.analyses.hidden_attention.stream import KINDS

__all__ = ["AVERAGED", "TOKEN_BLOCKS", "summaries", "units"]

TOKEN_BLOCKS = 8
"""Blocks of consecutive queries that stand for rows where there is one row."""

AVERAGED = tuple(name for name in core.STATISTICS if name != "top_source")
"""A mean place would mean nothing."""


def units(at: Int[np.ndarray, "batch query_token"]) -> tuple[Int[np.ndarray, "batch query_token"], int]:
    """What the bootstrap draws: the unit of each query, and how many units: rows, or token blocks of one row, or 1.

    >>> units(np.array([[5, 9]]))[1], units(np.array([[5, 9], [1, 2]]))[1], units(np.arange(16)[None])[1]
    (1, 2, 8)
    """
    if len(at) > 1:
        return np.broadcast_to(np.arange(len(at))[:, None], at.shape), len(at)
    if at.shape[1] < TOKEN_BLOCKS:
        return np.zeros(at.shape, dtype=int), 1
    rank = np.argsort(np.argsort(at[0]))
    return (rank * TOKEN_BLOCKS // at.shape[1])[None], TOKEN_BLOCKS


def summaries(
    found: dict[str, np.ndarray], at: Int[np.ndarray, "batch query_token"], unit: Int[np.ndarray, "batch query_token"],
    n_units: int, n_bootstrap: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Summaries by name; takes the lags and the nulls' rows by head out of `found`."""
    summary = _of_aggregates(found["alpha"], at) if found["alpha"].ndim == 4 else {}
    for name in AVERAGED:
        values = found[name]
        summary[f"head_{name}"] = _ratio(np.nansum(values, axis=(1, 2)), (~np.isnan(values)).sum((1, 2)))
    parts = {}
    for kind in KINDS:
        prefix = "" if kind == "executed" else f"{kind}_"
        parts[f"{prefix}by_lag"] = tuple(found.pop(f"{prefix}lag_{part}") for part in ("total", "count"))
        for name in core.STATISTICS:
            values = found[name] if kind == "executed" else found.pop(f"{prefix}{name}")
            if name in AVERAGED:
                live = np.sum(~np.isnan(values), axis=-1, keepdims=True)
                parts[f"{prefix}{name}"] = np.nansum(values, axis=-1, keepdims=True), live
    total, count = (np.concatenate(columns, axis=-1) for columns in zip(*parts.values(), strict=True))
    means = _mean(total, count.astype(float), unit, n_units, n_bootstrap, seed)
    ends = np.cumsum([columns.shape[-1] for columns, _ in parts.values()])
    for end, values in means.items():
        for name, columns in zip(parts, np.split(values, ends[:-1], axis=-1), strict=True):
            summary[f"layer_{name}{end}"] = columns if name.endswith("by_lag") else columns[..., 0]
    return summary


def _of_aggregates(
    alpha: Float[np.ndarray, "layer batch query_token token"], at: Int[np.ndarray, "batch query_token"]
) -> dict[str, np.ndarray]:
    """Statistics of the aggregated rows; NaN where no head reads anything."""
    each = {f"aggregate_{name}": np.full(alpha.shape[:3], np.nan) for name in core.STATISTICS}
    for place in np.ndindex(alpha.shape[:3]):
        sources = alpha[place][~np.isnan(alpha[place])][: at[place[1:]] + 1]
        if len(sources):
            for name, values in core.statistics(sources[:, None]).items():
                each[f"aggregate_{name}"][place] = values[0]
    return each


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _mean(
    total: Float[np.ndarray, "layer batch query_token column"],
    count: Float[np.ndarray, "layer batch query_token column"],
    unit: Int[np.ndarray, "batch query_token"], n_units: int, n_bootstrap: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Mean over batch and query of each layer, with its interval over units."""
    member = (unit.ravel()[None] == np.arange(n_units)[:, None]).astype(float)
    by_unit = [
        np.einsum("uq,lqc->luc", member, values.reshape(len(values), unit.size, -1)) for values in (total, count)
    ]

    def statistic(draws: np.ndarray) -> np.ndarray:
        return _ratio(*(np.einsum("u,luc->lc", draws.astype(float), values) for values in by_unit))

    low, high = interval(statistic, n_units, n_bootstrap, seed)
    return {"": statistic(np.ones(n_units, dtype=int)), "_low": low, "_high": high}
