"""The receptive field of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, listed, name_layers, number, shown, span
from mamba_probe.analyses.receptive_field.measure import measure
from mamba_probe.analyses.receptive_field.plot import plot

__all__ = ["ANALYSIS"]

JACOBIAN_ROWS, READ_OUTS, REMEMBRANCE_ROWS = 4, 4, 8
"""Rows whose derivatives are taken, random read-outs of +1 and -1 of each, and rows run without their first tokens."""


QUERIES, FEW = 8, 8
"""Queries, one in each of as many equal parts of the shortest row; rows below which an interval is too narrow."""


def _of_run(run: Any, seed: int) -> xr.Dataset:
    trace, asked = run.trace, _asked(run.trace)
    queries = _queries(trace, asked)
    given: dict[str, Any] = {
        "train_length": trace.attrs.get("train_length"),
        "baseline": None if run.twin is None else run.twin[0],
        "query_tokens": queries,
        "seed": seed,
    }
    lack = "token ids" if "token_id" not in trace.coords else run.lacks_model()
    if lack:
        result = measure(trace, **given)
        return result.assign_attrs(left_out=f"{result.attrs['left_out']} (the run lacks {lack})")
    ids, mask = run.inputs()
    with run.probe() as probe:
        rows = np.argsort(~asked[:, queries[-1]], kind="stable")[:JACOBIAN_ROWS]
        given["jacobian"] = _jacobian(probe, trace, ids[rows], mask[rows], queries[-1:], seed)
        if "prediction" in trace.coords:
            last = np.where(asked, np.arange(asked.shape[1]), -1).max(axis=1)
            rows = slice(REMEMBRANCE_ROWS)
            given["remembrance"] = probe.remembrance(ids[rows], mask[rows], queries=last[rows])
    return measure(trace, **given)


def _asked(trace: xr.Dataset) -> np.ndarray:
    """Where each row is asked for an answer (batch, position); its last token where it is not."""
    valid = trace["valid"].values
    counts = valid.sum(axis=1)
    found = np.zeros((len(valid), counts.max()), dtype=bool)
    if "role" in trace.coords:
        row, token = np.nonzero((trace["role"].values == "query") & valid)
        found[row, trace["position"].values[row, token]] = True
    silent = ~found.any(axis=1)
    found[silent, counts[silent] - 1] = True
    return found


def _queries(trace: xr.Dataset, asked: np.ndarray) -> np.ndarray:
    """In each part of the shortest row, the latest of the positions where most rows are asked."""
    shortest = int(trace["valid"].sum("token").min())
    edges = np.unique(shortest * np.arange(QUERIES + 1) // QUERIES)
    rows = asked.sum(axis=0)
    return np.array([b - 1 - np.argmax(rows[a:b][::-1]) for a, b in pairwise(edges)])


def _jacobian(
    probe: Any, trace: xr.Dataset, ids: np.ndarray, mask: np.ndarray, query: np.ndarray, seed: int
) -> list[xr.Dataset]:
    """Of every layer, read out by random signs."""
    layers = trace["layer"].values.tolist()
    width = probe.weights([layers[0]]).sizes["model"]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(READ_OUTS, width))
    return [probe.jacobian(ids, mask, layer=layer, query_tokens=query, read_out=signs) for layer in layers]


_NUMBERS = (
    ("layer_mixer_slope", "slope of log |alpha| on lag, nats a token"),
    ("layer_block_slope", "slope of log |d out / d u| on lag, nats a token"),
    ("layer_mixer_spread", "how far two inputs' mixer profiles differ"),
    ("layer_block_spread", "how far two inputs' block profiles differ"),
    ("layer_global_share", "share of global heads"),
    ("layer_token_distance_u", "distance of two tokens, mixer's input"),
    ("layer_token_distance_out", "distance of two tokens, mixer's output"),
)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    last = result.isel(query_token=-1)
    rows = []
    for layer in shown(result):
        one = last.sel(layer=layer)
        rows.append(_row("layer_mean_distance", f"mean distance read, after {_tokens(result)} tokens", one, layer))
        for name in ("layer_train_mean_distance", "layer_collapse_ratio"):
            rows += _prefixes(name, one, layer)
        rows += [_row(name, what, one, layer) for name, what in _NUMBERS if name in result]
    if "remembrance" in result:
        rows += [_remembered(result.isel(start=at)) for at in _few(result)]
    return f"{_sentence(result)}{listed(result)}", rows


def _tokens(result: xr.Dataset) -> int:
    return int(result["query_token"].values[-1]) + 1


def _row(name: str, what: str, one: xr.Dataset, layer: int) -> Row:
    words = {"lti": "time-invariant", "shuffle": "shuffled"}
    base = name.removeprefix("layer_")
    nulls = [f"{said} {number(one[key].item())}" for kind, said in words.items()
             if (key := f"layer_null_{kind}_{base}") in one]  # fmt: skip
    nulls += [f"untrained twin {number(one[key].item())}" for key in [f"baseline_{name}"] if key in one]
    ends = (one[f"{name}_{end}"].item() for end in ("low", "high"))
    detail = _narrow(one[f"n_rows_{base}"].item())
    return Row(what, number(one[name].item()), "; ".join(nulls), span(*ends), layer, detail)


def _narrow(n_rows: int) -> str:
    """How few rows an interval rests on, or what it cannot be taken of."""
    if n_rows >= FEW:
        return ""
    return f"; {n_rows} rows: the interval is too narrow" if n_rows > 1 else f"; {n_rows} row: no interval"


def _prefixes(name: str, one: xr.Dataset, layer: int) -> list[Row]:
    """A row for each prefix that the recording reaches, in units of the length trained on."""
    if name not in one:
        return []
    words = {"layer_collapse_ratio": "collapse ratio", "layer_train_mean_distance": "mean distance read"}[name]
    wanted = [at for at in one["fraction"].values if name != "layer_collapse_ratio" or at > 1]
    parts = [one.sel(fraction=at) for at in wanted]
    known = [part for part in parts if np.isfinite(part[name])]
    return [_row(name, f"{words}, {part['fraction'].item():g} x length trained on", part, layer) for part in known]


def _few(result: xr.Dataset) -> list[int]:
    """One token removed, and a quarter, a half and all of what comes before the query."""
    start = result["start"].values
    wanted = [1, start[-1] // 4, start[-1] // 2, start[-1]]
    return sorted({int(np.abs(start - at).argmin()) for at in wanted} - {0})


def _remembered(one: xr.Dataset) -> Row:
    ends = (one[f"remembrance_{end}"].item() for end in ("low", "high"))
    null = f"another row's context {number(one['null_other_row'].item())}"
    what = f"change of the prediction without its first {one['start'].item()} tokens"
    detail = _narrow(one["n_rows_remembrance"].item())
    return Row(what, number(one["remembrance"].item()), null, span(*ends), detail=detail)


def _sentence(result: xr.Dataset) -> str:
    distance = result["layer_mean_distance"].isel(query_token=-1).values
    live = np.flatnonzero(~np.isnan(distance))
    if not live.size:
        return f"{name_layers(result)}: no query reads anything."
    null = result["layer_null_lti_mean_distance"].isel(query_token=-1).values
    said = []
    for at in dict.fromkeys([live[distance[live].argmin()], live[distance[live].argmax()]]):
        far, lti = number(float(distance[at])), number(float(null[at]))
        said.append(f"{far} tokens in layer {result['layer'].values[at]} (time-invariant {lti})")
    head = f"After {_tokens(result)} tokens, a query reads from a mean distance of"
    return f"{head} {' to '.join(said)}.{_collapse(result)}"


def _collapse(result: xr.Dataset) -> str:
    """What becomes of it past the length trained on, where the recording goes so far."""
    if "layer_collapse_ratio" not in result:
        return ""
    longer = result["layer_collapse_ratio"].where(result["fraction"] > 1, drop=True).dropna("fraction", how="all")
    if not longer.sizes["fraction"]:
        return ""
    end = longer.isel(fraction=-1)
    low, high = (number(float(edge(end.values))) for edge in (np.nanmin, np.nanmax))
    ratio = low if low == high else f"{low} to {high}"
    trained = result["prefix_role"].sel(fraction=1.0).item()
    roles = " after ".join(dict.fromkeys([end["prefix_role"].item(), trained]))
    at = f"{end['fraction'].item():g} times the length trained on"
    return f" At {at} it has kept {ratio} of the pace of the length{f' (read at: {roles})' if roles else ''}."


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    several = any(one.sizes["layer"] > 1 for one in results)
    kinds = [("distance", "xy"), ("profile", "xy")]
    kinds += [("remembrance", "xy")] * all("remembrance" in one for one in results)
    held = all(f"layer_token_distance_{name}" in one for one in results for name in ("u", "out"))
    kinds += [("tokens", "y")] * (several and held)
    return tuple(Panel(partial(plot, kind=kind), alike) for kind, alike in kinds)


ANALYSIS = Analysis(
    title="Receptive field",
    question="How far does a layer see, past the length it was trained on too, and what of its input moves its output?",
    reading=(
        "Mean distance: of the sources of a query, weighted by |alpha| (Mamba Mean Distance). Collapse ratio: that"
        " distance over the one at the length trained on; 1 keeps pace with the row, 1/2 at twice the length stands"
        " still. Both at the asked token nearest to each length where a task asks there, else at that very token."
        " A negative slope is recency. Profiles: shares of the sources in a query's output, the mixer's without its"
        " skip D; two inputs of a time-invariant mixer have the same. A global head keeps more than 5 % over the length"
        " trained on. Distance of two tokens: 1 unrelated, 0 all alike (over-smoothed). Change of a prediction: total"
        " variation."
    ),
    picture=(
        "From above. How far back a query reads as the row grows: dashed is the null, the grey dots read all tokens"
        " alike. The share of each source in a query's output by its distance, in the whole block (full) and in its"
        " mixer alone (dotted). Where they were measured: how much the prediction changes without the row's first"
        " tokens, beside another row's context; and how alike two tokens are in each layer (1 unrelated, 0 all"
        " alike)."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    notes=("left_out", "prefixes", "beyond", "lags", "clamp", "jacobian", "remembrance"),
)
