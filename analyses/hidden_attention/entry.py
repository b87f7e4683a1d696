"""The hidden attention of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, listed, name_layers, number, shown, span
from mamba_probe.analyses.common.queries import answerable_queries
from mamba_probe.analyses.hidden_attention.measure import measure
from mamba_probe.analyses.hidden_attention.plot import plot

__all__ = ["ANALYSIS"]

SPREAD = 8
"""Queries a row of a text, evenly spread over it."""


def _of_run(run: Any, seed: int) -> xr.Dataset:
    queries, rule = answerable_queries(run.trace), "the last query whose answer lies in its window, else the last"
    if queries is None:
        n_valid = run.trace["valid"].sum("token").values[:, None]
        queries, rule = n_valid * np.arange(1, SPREAD + 1) // SPREAD - 1, f"{SPREAD} tokens, evenly spread"
    result = measure(run.trace, query_tokens=queries, weights=run.weights, seed=seed)
    return result.assign_attrs(queries=f"of each row: {rule}")


_ATTENTION = (
    ("mean_distance", "mean distance read, tokens"),
    ("entropy", "entropy of |alpha|, nats"),
    ("first_share", "share of |alpha| on the first token"),
    ("negative_share", "share of |alpha| that is negative"),
)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in shown(result):
        one = result.sel(layer=layer)
        for name, what in _ATTENTION:
            lti, shuffled = (number(one[f"layer_null_{which}_{name}"].item()) for which in ("lti", "shuffle"))
            ends = (one[f"layer_{name}_{end}"].item() for end in ("low", "high"))
            value, nulls = number(one[f"layer_{name}"].item()), f"time-invariant {lti}; shuffled {shuffled}"
            rows.append(Row(what, value, nulls, span(*ends), layer))
    distance = result["layer_mean_distance"].values
    live = np.flatnonzero(~np.isnan(distance))
    if not live.size:
        return f"{name_layers(result)}: no query reads anything.", rows
    said = []
    for i in dict.fromkeys([live[distance[live].argmin()], live[distance[live].argmax()]]):
        null = number(result["layer_null_lti_mean_distance"].values[i].item())
        said.append(f"{number(distance[i].item())} tokens in layer {result['layer'].values[i]} (time-invariant {null})")
    return f"Weighted by |alpha|, a query reads from a distance of {' to '.join(said)}.{listed(result)}", rows


def _panels(_results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    return (Panel(plot),)


ANALYSIS = Analysis(
    title="Hidden attention",
    question="From which tokens does a query's scan output read, and with which sign?",
    reading=(
        "alpha is the weight of a source token in the scan's output at a query, selection as executed; alpha . x + D x"
        " is that output. Shares are of |alpha|. Time-invariant: the same layer with delta, B and C at their means;"
        " shuffled: the same deltas in random order."
    ),
    picture=(
        "Each curve is the mean weight with which a query reads tokens so many places back (to the right: further);"
        " the scale of the height is logarithmic where there are several layers. Executed curves that leave their"
        " time-invariant null are what the selection does."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    notes=("queries", "aggregation", "identity"),
    apart=True,
)
