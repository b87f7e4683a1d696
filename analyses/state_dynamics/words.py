"""What each number of a result means: names, units, dimensions and the rules it was made by."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.state_dynamics.rows import Rows
from mamba_probe.analyses.state_dynamics.summary import QUANTILES

__all__ = ["attributes", "coordinates", "entry"]

_TEXT = {
    "lyapunov": ("mean over tokens of A delta, the Lyapunov exponent", "1/token"),
    "half_life": ("tokens after which a state halves at its mean step, ln 2 / (|A| mean delta)", "token"),
    "closed_share": ("share of steps with softplus saturated low: next to nothing is written", "1"),
    "held_share": ("share of steps that keep every state", "1"),
    "erased_share": ("share of steps that erase every state", "1"),
    "ess_entropy": ("effective state size, entropy form", "state"),
    "ess_rank": ("effective state size, singular values above the tolerance", "state"),
    "ess_share": ("effective state size, entropy form, over the number of states", "1"),
    "state_mean": ("mean of the state", "1"),
    "state_variance": ("variance of the state over its numbers", "1"),
    "state_rms": ("root mean square of the state", "1"),
    "rms": ("root mean square of the states of all heads", "1"),
    "growth": ("exponent a of state size ~ tokens^a over the later half of a row", "1"),
    "loss_by_position": ("mean loss of the tokens since the sample before", "nat"),
    "loss_trend": ("slope of the loss per doubling of the position, within rows, over the later half of each", "nat"),
}
_NULL = {
    "null_lti_": "null: delta, B and C frozen to their means",
    "null_shuffle_loss": "null: the losses of a row shuffled",
    "null_shuffle_": "null: delta shuffled in time",
    "null_order_": "null: the tokens of a row in random order",
}
_END = {"_low": "lower end of the interval", "_high": "upper end of the interval"}
_BASELINE = "baseline_"


def entry(name: str, values: np.ndarray, head_dim: str) -> Entry:
    """Dimensions, values, long name and units of a result."""
    base, said = name, []
    if base.startswith(_BASELINE):
        base, said = base.removeprefix(_BASELINE), ["of the baseline"]
    layer = base.startswith("layer_")
    base = base.removeprefix("layer_")
    null = next((prefix for prefix in _NULL if base.startswith(prefix)), "")
    base = base.removeprefix(null.removesuffix("loss"))
    end = next((end for end in _END if base.endswith(end)), "")
    base = base.removesuffix(end)
    text, units = _TEXT[base]
    said += [words for words in (_NULL.get(null, ""), _END.get(end, "")) if words]
    return _dims(base, layer, values.ndim, head_dim), values, ", ".join([text, *said]), units


def _dims(base: str, layer: bool, ndim: int, head_dim: str) -> tuple[str, ...]:
    if base in ("lyapunov", "half_life", "growth") and layer:
        return "quantile", "layer"
    if layer:
        return ("layer", "sample_token")[:ndim]
    if base.startswith("loss"):
        return ("sample_token",)[:ndim]
    if base.startswith("ess"):
        return "layer", "batch", "query_token", f"sized_{head_dim}"
    if base.startswith("state"):
        return "layer", "sample_token", head_dim
    return ("layer", head_dim, "state")[:ndim]


def coordinates(view: Canonical, rows: Rows) -> dict[str, Any]:
    """Labels of a result."""
    asked = rows.asked
    coords = view.coords() | {
        "quantile": list(QUANTILES),
        "query_token": asked.label,
        "query_position": (
            ("batch", "query_token"), asked.at, {"long_name": "first token that reads", "units": "token"},
        ),
        f"sized_{view.head_dim}": view.heads[asked.sized],
        "sample_token": ("sample_token", rows.samples, {"long_name": "position of the token before", "units": "token"}),
    }  # fmt: skip
    if view.n_states > 1 and "state" in view.trace.coords:
        coords["state"] = view.trace["state"].values
    return coords


def attributes(view: Canonical, rows: Rows) -> dict[str, str]:
    """The rules that a result was made by."""
    asked, sized = rows.asked, rows.view.heads[rows.asked.sized].tolist()
    sources = {
        "h": "as recorded",
        "x": "computed from delta, A, B and x",
        "": "not measured: neither h nor x was recorded",
    }
    order = "null_order: delta, B and x of a row's tokens in one random order"
    lti = "null_lti: delta, B and C frozen to means over the row; null_shuffle: delta shuffled in time"
    return {
        "analysis": "state_dynamics",
        "model": str(view.trace.attrs.get("model", "unnamed model")),
        "estimator": "lyapunov = mean of A delta; state moments over the numbers of a head's state, a complex one with "
        "its conjugate; growth: slope of ln(root mean square) on ln(tokens), later half of the row; effective state "
        "size of T[i:, :i], i = query_position",
        "null": f"{lti}; {order if 'x' in view.trace else 'null_order: not measured, x was not recorded'}",
        "interval": "95 % percentile bootstrap over rows (too narrow with few: it covers .54 of the time with 2 rows, "
        ".79 with 4, .86 with 8, .92 with 16)"
        if view.n_rows > 1
        else "NaN: one row, nothing to resample",
        "reduces_over": "lyapunov, half_life and *_share by head: tokens of all rows pooled, a longer row counts for "
        "more; layer_lyapunov and layer_half_life: quantiles of those over heads and states; layer_growth: quantiles "
        "over heads of the mean over rows; other layer_*, shares too: mean over rows, each row alike, and heads; ess: "
        "over query_token and sized heads too; loss_trend: within rows, each row's own mean removed; loss_by_position "
        "and states: the rows that reach there",
        "states": sources[rows.source],
        "every": str(asked.every),
        "head_dim": view.head_dim,
        "sized": f"{len(sized)} of {view.n_heads} {view.head_dim}s: {', '.join(map(str, sized))}",
        "n_states": str(rows.n_states),
        "tolerance": f"{asked.tolerance:g} of max |C_t| max delta_s |B_s| of the block's reads and writes",
        "saturation": f"eps = {asked.saturation:g}: closed where 1 - exp(-delta) < eps, held where exp(A delta) > "
        "1 - eps in every state, erased where exp(A delta) < eps in every state",
        "baseline": "none",
        "longest": f"{int(view.valid.sum(axis=1).max())}",
        "n_rows": str(view.n_rows),
        "n_heads": str(view.n_heads),
        "n_bootstrap": str(asked.n_bootstrap),
        "seed": str(asked.seed),
    }
