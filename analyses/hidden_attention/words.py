"""What each number of a result means: names, units, coordinates and the rules it was made by."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.hidden_attention.identity import Identity
from mamba_probe.analyses.hidden_attention.plan import Plan
from mamba_probe.analyses.hidden_attention.summary import TOKEN_BLOCKS

__all__ = ["AGGREGATE_WORDS", "attributes", "coordinates", "entry"]

AGGREGATE_WORDS = {
    "signed_mean": "signed mean over {}s",
    "mean_absolute": "mean |alpha| over {}s",
    "l2": "L2 norm over {}s",
    "none": "each {} for itself",
}

_TEXT = {
    "alpha": ("weight of a source in the scan's output at the query; 0 after the query", "1"),
    "entropy": ("entropy of the shares of |alpha|", "nat"),
    "first_share": ("share of |alpha| on the row's first token", "1"),
    "mean_distance": ("mean distance of the sources, weighted by |alpha| (mass horizon)", "token"),
    "negative_share": ("share of |alpha| that is negative", "1"),
    "top_share": ("share of |alpha| on the source of largest |alpha|", "1"),
    "top_source": ("position of the source of largest |alpha|", "token"),
    "by_lag": ("mean |alpha| of the sources of a bin of lags", "1"),
    "identity_error": ("largest |alpha . x + D x - y| over the largest sum of |terms|, over heads", "1"),
}
_OVER = {
    "aggregate_": "of the aggregated row",
    "head_": "mean over rows and queries",
    "layer_": "mean over rows, queries and heads that read something",
}
_NULL = {
    "null_lti_": "null: delta, B and C frozen to their means",
    "null_shuffle_": "null: delta shuffled in time",
}
_END = {"_low": "lower end of the interval", "_high": "upper end of the interval"}
_PLACE = ("layer", "batch", "query_token")


def entry(name: str, values: np.ndarray, head_dim: str) -> Entry:
    """Dimensions, values, long name and units of a result."""
    over = next((prefix for prefix in _OVER if name.startswith(prefix)), "")
    base = name.removeprefix(over)
    null = next((prefix for prefix in _NULL if base.startswith(prefix)), "")
    end = next((end for end in _END if base.endswith(end)), "")
    base = base.removeprefix(null).removesuffix(end)
    text, units = _TEXT[base]
    said = [text, *(words[key] for words, key in ((_OVER, over), (_NULL, null), (_END, end)) if key)]
    return _dims(base, over, values.ndim, head_dim), values, ", ".join(said), units


def _dims(base: str, over: str, ndim: int, head_dim: str) -> tuple[str, ...]:
    if over == "layer_":
        return ("layer", "lag")[:ndim]
    if over == "head_":
        return "layer", head_dim
    if base == "alpha":
        return (*_PLACE, *([head_dim] if ndim == 5 else []), "token")
    return _PLACE if ndim == 3 else (*_PLACE, head_dim)


def coordinates(view: Canonical, plan: Plan, lags: np.ndarray) -> dict[str, Any]:
    """Labels of a result; a lag names the first of its bin."""
    tokens = ("batch", "token")
    return view.coords() | {
        "query_token": plan.label,
        "query_position": (("batch", "query_token"), plan.at, {"long_name": "position of the query", "units": "token"}),
        "token": view.token,
        "valid": (tokens, view.valid),
        "position": (tokens, view.position),
        "lag": ("lag", lags, {"long_name": "first lag of the bin 0, 1, 2-3, 4-7, ..", "units": "token"}),
    }


def attributes(view: Canonical, plan: Plan, identity: Identity, n_units: int, n_bootstrap: int) -> dict[str, str]:
    """The rules that a result was made by."""
    if view.n_rows > 1:
        drawn = "95 % percentile bootstrap over rows"
    elif n_units > 1:
        drawn = f"95 % percentile bootstrap over {TOKEN_BLOCKS} token blocks: consecutive queries of the one row"
    else:
        drawn = f"NaN: one row with fewer than {TOKEN_BLOCKS} queries, nothing to resample"
    asserted = f"asserted at every query, tolerance {identity.tolerance:g} of the largest sum of |terms| over heads"
    return {
        "analysis": "hidden_attention",
        "model": str(view.trace.attrs.get("model", "unnamed model")),
        "estimator": "alpha_t[s] = sum_n C_t exp(A Cum(s, t)) w_s B_s, w = delta or, with zoh, delta phi1(delta A); "
        "selection as executed (Ali et al. 2024); statistics ours",
        "aggregate": plan.aggregate,
        "aggregation": AGGREGATE_WORDS[plan.aggregate].format(view.head_dim),
        "normalise": plan.normalise,
        "head_dim": view.head_dim,
        "null": "null_lti: delta, B and C frozen to means over the row's valid tokens; null_shuffle: delta shuffled in "
        "time, B and C as executed",
        "interval": drawn,
        "reduces_over": "head_*: batch, query_token; layer_*: these and heads; rows without any |alpha| left out",
        "lag_bins": "a bin starts at its lag and ends before the next: 0, 1, 2-3, 4-7, ..; no interval where a draw "
        "may miss it",
        "identity": asserted if identity.skip is not None else f"not measured: {identity.absent}",
        "n_rows": str(view.n_rows),
        "n_heads": str(view.n_heads),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(plan.seed),
    }
