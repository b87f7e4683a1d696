"""The wavelet alignment of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, listed, name_layers, number, shown, span
from mamba_probe.analyses.common.queries import answerable_queries
from mamba_probe.analyses.wavelet_alignment.measure import measure
from mamba_probe.analyses.wavelet_alignment.plot import plot

__all__ = ["ANALYSIS"]


def _of_run(run: Any, seed: int) -> xr.Dataset:
    queries = answerable_queries(run.trace)
    twin = None if run.twin is None else run.twin[0]
    result = measure(run.trace, query_tokens=queries, seed=seed, baseline=twin)
    rule = (
        "the last valid token" if queries is None else "the last query whose answer lies in its window, else the last"
    )
    return result.assign_attrs(queries=f"of each row: {rule}")


_ALIGNMENT = (
    ("best_cosine", "|cos| with the best single wavelet"),
    ("effective_rank", "effective number of coefficients (1: a single one)"),
    ("wavelet_capture", "energy in the coarse wavelets"),
)


NULL = {"null_": "time-invariant"}
BESIDE = {"null_shuffle_": "steps shuffled", "baseline_": "untrained"}
"""The other nulls that a layer has, by the prefix of their names."""
ROUNDING = 1e-6
"""Cosines that are no further apart are equal."""


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in shown(result):
        one = result.sel(layer=layer)
        for name, what in _ALIGNMENT:
            value, null = one[f"layer_{name}"].item(), one[f"layer_null_{name}"].item()
            interval = span(one[f"layer_{name}_low"].item(), one[f"layer_{name}_high"].item())
            others = "".join(
                f"; {which} {number(one[f'layer_{prefix}{name}'].item())}"
                for prefix, which in BESIDE.items()
                if f"layer_{prefix}{name}" in one
            )
            rows.append(Row(what, number(value), f"time-invariant {number(null)}{others}", interval, layer))
        dead = f"{int(one['n_dead'].sum())} of {one['best_cosine'].size}"
        rows.append(Row("kernels without energy, left out", dead, layer=layer))
    cosine = result["layer_best_cosine"].values
    live = np.flatnonzero(~np.isnan(cosine))
    if not live.size:
        return f"{name_layers(result)}: no kernel has energy at the query, so nothing is measured.", rows
    ends = dict.fromkeys([live[cosine[live].argmin()], live[cosine[live].argmax()]])
    layers = result["layer"].values
    said = "; ".join(f"{number(float(cosine[i]))} in layer {layers[i]}, {_beside(result.isel(layer=i))}" for i in ends)
    dead = f" {len(cosine) - live.size} layer(s) have no kernel with energy." if live.size < len(cosine) else ""
    head = f"Mean |cos| of the executed kernels with their best single {result.attrs['wavelet']} wavelet"
    return f"{head}: {said}.{dead}{listed(result)}", rows


def _beside(one: xr.Dataset) -> str:
    """Above which of the others a layer's interval lies (its value, where there is none), and above which not."""
    low, value = one["layer_best_cosine_low"].item(), one["layer_best_cosine"].item()
    others = {which: one[f"layer_{prefix}best_cosine"].item() for prefix, which in (NULL | BESIDE).items()
              if f"layer_{prefix}best_cosine" in one}  # fmt: skip
    others["a single token"] = one["spike_best_cosine"].item()
    least = (value if np.isnan(low) else low) - ROUNDING
    above = [f"{which} ({_energy(null)})" for which, null in others.items() if not least <= null]
    below = [f"{which} ({_energy(null)})" for which, null in others.items() if least <= null]
    parts = [f"above {_and(above)}"] * bool(above) + [f"not above {_and(below)}"] * bool(below)
    return ", but ".join(parts)


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _energy(null: float) -> str:
    return "no energy" if np.isnan(null) else number(null)


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    compaction, cosine = Panel(partial(plot, kind="compaction"), "xy"), Panel(partial(plot, kind="cosine"), "y")
    if all(one.sizes["layer"] == 1 for one in results):
        return (compaction,)
    return (compaction, cosine) if len(results) == 1 else (cosine,)  # compaction has other lines for one layer


ANALYSIS = Analysis(
    title="Wavelet alignment",
    question="Are the kernels that a layer executed wavelet-like?",
    reading=(
        "A kernel says how much a query reads from each earlier token. |cos| is 1 where it is a single wavelet; a"
        " kernel that is merely short scores high too, so compare it with that of one single token. Time-invariant: the"
        " same layer with delta, B and C at their means. Where that decays slowly it is nearly constant: one"
        " coefficient, of the scaling function, which is no wavelet."
    ),
    picture=(
        "Curves: the share of a kernel's energy in its largest wavelet coefficients; the further to the left a curve"
        " reaches 1, the fewer wavelets make the kernel. Of a model of one layer, orange is the time-invariant null,"
        " grey the steps shuffled, green (baseline) the untrained twin, and pink the same kernels in the DFT. Of one of"
        " several layers, each layer has its shade (the bar on the right), solid as executed, dashed once"
        " time-invariant. Marks, of several layers: |cos| with the best single wavelet, in the first colours; the grey"
        " line is a kernel that is one token."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    notes=("baseline_estimator", "queries", "window_rule"),
)
