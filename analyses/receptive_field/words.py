"""What each number of a result means: names, units, coordinates and the rules it was made by."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.receptive_field import core
from mamba_probe.analyses.receptive_field.asked import FRACTIONS, Asked

__all__ = ["attributes", "coordinates", "entry"]

_TEXT = {
    "mean_distance": ("mean distance of the sources, weighted by |alpha|", "token"),
    "train_mean_distance": ("mean distance at the end of a prefix (prefix_length) of the length trained on", "token"),
    "collapse_ratio": ("mean distance over that at the length trained on, over what reading all alike would give", "1"),
    "mixer_profile": (
        "share of a source in the scan's output without the skip D, at the last query, selection frozen",
        "1",
    ),
    "block_profile": ("share of a source in the block's output at the query, selection moving", "1"),
    "mixer_spread": ("total variation between the mixer profiles (without the skip D) of two rows", "1"),
    "block_spread": ("total variation between the block profiles of two rows", "1"),
    "mixer_slope": ("slope of log |alpha| on lag at the last query", "nat/token"),
    "block_slope": ("slope of log |d out_t / d u_s| on lag", "nat/token"),
    "mixer_slope_used": ("share of the asked lags whose size is not 0", "1"),
    "block_slope_used": ("share of the asked lags whose size is not 0", "1"),
    "global_share": ("share of heads that retain more than theta over the length trained on", "1"),
    "train_retention": ("exp(A sum delta) over the length trained on, delta clamped, mean over states and rows", "1"),
    "token_distance_u": ("mean squared distance of two tokens of the mixer's input, unrelated ones 1", "1"),
    "token_distance_out": ("mean squared distance of two tokens of the mixer's output, unrelated ones 1", "1"),
    "remembrance": ("total variation between predictions with and without the first tokens", "1"),
    "null_other_row": ("total variation to the prediction from as many tokens of another row", "1"),
}
_OVER = {"layer_": "mean over rows", "head_": "mean over rows"}
_NULL = {
    "null_lti_": "null: delta, B and C frozen to their means over the row",
    "null_shuffle_": "null: delta shuffled in time",
}
_BASELINE = "baseline_"
_COUNT = "n_rows_"
_BY_START = ("remembrance", "null_other_row")
_END = {"_low": "lower end of the interval", "_high": "upper end of the interval"}
_AXIS = {
    "mean_distance": ("query_token",),
    "train_mean_distance": ("fraction",),
    "collapse_ratio": ("fraction",),
    "mixer_profile": ("lag",),
    "block_profile": ("block_lag",),
}


def entry(name: str, values: np.ndarray, head_dim: str) -> Entry:
    """Dimensions, values, long name and units of a result."""
    plain = name.removeprefix(_BASELINE)
    over = next((prefix for prefix in _OVER if plain.startswith(prefix)), "")
    base = plain.removeprefix(over)
    null = next((prefix for prefix in _NULL if base.startswith(prefix)), "")
    end = next((end for end in _END if base.endswith(end)), "")
    base, counted = base.removeprefix(null).removesuffix(end), base.startswith(_COUNT)
    base = base.removeprefix(_COUNT)
    text, units = _TEXT[base]
    text, units = (f"rows with a value of: {text}", "row") if counted else (text, units)
    said = [text, *(words[key] for words, key in ((_OVER, over), (_NULL, null), (_END, end)) if key)]
    said += ["of the baseline"] * (plain != name)
    dims = (
        *(["start"] if base in _BY_START else ["layer"]),
        *_AXIS.get(base, ()),
        *([head_dim] if over == "head_" else []),
    )
    return dims, values, ", ".join(said), units


def coordinates(view: Canonical, asked: Asked, found: dict[str, np.ndarray], starts: np.ndarray) -> dict[str, Any]:
    """Labels of a result."""
    coords: dict[str, Any] = {
        "layer": view.layers,
        view.head_dim: view.heads,
        "query_token": ("query_token", asked.shown, {"long_name": "position of the query", "units": "token"}),
        "lag": ("lag", np.arange(asked.shown[-1] + 1), {"long_name": "tokens from source to query", "units": "token"}),
    }
    if asked.train_length is not None:
        words = {"long_name": "length of the prefix over the length trained on", "units": "1"}
        coords["fraction"] = ("fraction", np.array(FRACTIONS), words)
        words = {"long_name": "tokens of the prefix, mean over the rows that have it", "units": "token"}
        lengths = core.mean(asked.lengths, np.ones(view.n_rows, dtype=int))
        coords["prefix_length"] = ("fraction", lengths, words)
        words = {"long_name": "role of the last token of the prefix", "units": "1"}
        coords["prefix_role"] = ("fraction", np.array(asked.roles, dtype=str), words)
    if "layer_block_profile" in found:
        lags = np.arange(found["layer_block_profile"].shape[1])
        coords["block_lag"] = ("block_lag", lags, {"long_name": "tokens from source to query", "units": "token"})
    if "remembrance" in found:
        coords["start"] = ("start", starts, {"long_name": "first tokens removed", "units": "token"})
    return coords


def attributes(
    view: Canonical, asked: Asked, left_out: list[str], live: dict[str, str], n_bootstrap: int, seed: int
) -> dict[str, str]:
    """The rules that a result was made by."""
    first, last = asked.lags
    length = asked.train_length
    return {
        "analysis": "receptive_field",
        "model": str(view.trace.attrs.get("model", "unnamed model")),
        "estimator": "mean_distance: DeciMamba, arXiv 2406.14528; global_share: LongMamba, arXiv 2504.16053; profile: "
        "relative gradient, arXiv 2505.09022; slope and token_distance: after arXiv 2501.00658; remembrance: arXiv "
        "2507.02782; collapse_ratio, spread, intervals and nulls: ours",
        "null": "null_lti: delta, B and C frozen to means over the row's valid tokens (global_share: delta as it is, "
        "not clamped, whose sum is that of its mean); null_shuffle: delta shuffled in time; baseline_*: an untrained "
        "twin; null_other_row: another row's context",
        "interval": _interval(view.n_rows),
        "reduces_over": f"layer_*: {view.n_rows} rows, and {view.head_dim}s (mean_distance: those that read something; "
        "mixer_*: root of the sum of alpha^2, without the skip D); head_*: rows",
        "lags": f"slopes over lags {first} to {'the longest' if last is None else last}; sources of size 0 left out",
        "clamp": f"delta cut at the smallest of each {view.head_dim}'s largest {asked.top:g} of its first train_length "
        "tokens, as in LongMamba's published code, whose shares are 0.1, 0.15 and 0.2",
        "theta": f"{asked.theta:g}",
        "train_length": "unknown" if length is None else str(length),
        "beyond": _beyond(asked),
        "prefixes": _prefixes(asked),
        "left_out": "; ".join(left_out) or "nothing",
        "head_dim": view.head_dim,
        "n_rows": str(view.n_rows),
        "n_heads": str(view.n_heads),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
        **live,
    }


def _interval(n_rows: int) -> str:
    if n_rows == 1:
        return "NaN: one row, nothing to resample"
    return (
        "95 % percentile bootstrap over the n_rows_* rows that have a value; of a mean over few rows it is too narrow: "
        "it covers .54 with 2 rows, .67 with 3, .79 with 4, .86 with 8, .92 with 16; spreads: NaN below 3 rows, whose "
        "pairs are one"
    )


def _beyond(asked: Asked) -> str:
    """Prefixes that no row has."""
    over = [f"{fraction:g}" for fraction, ends in zip(FRACTIONS, asked.ends.T, strict=False) if (ends < 0).all()]
    if not over:
        return ""
    if asked.on_asked:
        return f"no row is asked near {', '.join(over)} of train_length"
    return f"rows of {asked.shortest} tokens end before {', '.join(over)} of train_length"


def _prefixes(asked: Asked) -> str:
    """Which tokens the prefixes end at."""
    if asked.train_length is None:
        return "none: no train_length= given"
    if asked.on_asked:
        rows = ", ".join(f"{f:g}: {(e >= 0).sum()}" for f, e in zip(FRACTIONS, asked.ends.T, strict=True))
        near = "end at the asked token nearest to each length, within a factor of sqrt 2, with its own length"
        return f"{near}; rows {rows}"
    roles = "; ".join(f"{f:g}: {role}" for f, role in zip(FRACTIONS, asked.roles, strict=True) if role)
    return f"end at the same position in every row{f'; roles there: {roles}' if roles else ''}"
