"""The association of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.association.measure import measure
from mamba_probe.analyses.association.plot import plot
from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, number, shown, span

__all__ = ["ANALYSIS"]

SITES = ("mixer_in", "scan", "mixer_out")
ROWS = 24
"""Rows of the run that are asked: some 60 forwards each, and as many of the twin's."""


def _some(task: Any) -> Any:
    """The task's first rows."""
    return replace(
        task, **{name: getattr(task, name)[:ROWS] for name in ("input_ids", "role", "target", "source_token")}
    )


def _lacks(run: Any) -> str:
    task = None if run.task is None else _some(run.task)
    if task is None or not {"key", "value", "query"} <= set(np.unique(task.role).tolist()):
        return "a task of keys and values whose answers are known"
    if (task.role == "value").sum(axis=1).min() < 2:
        return "a task of two pairs a row at least"
    n_keys = len(np.unique(task.input_ids[task.role == "key"]))
    if max(len(np.unique(ids[role == "key"])) for ids, role in zip(task.input_ids, task.role, strict=True)) == n_keys:
        return "a key that a row does not hold, to put in another's place: draw more rows or a larger vocabulary"
    if "direction" in run.trace.dims:
        return "a model that scans in one direction: here nothing comes after a key"
    return run.lacks_model()


def _of_run(run: Any, seed: int) -> xr.Dataset:
    task = run.task
    with run.probe() as probe:
        found = probe.associating(_some(task), seed=seed, twin_seed=seed)
    rows = f"the first {found.sizes['batch']} of {len(task.role)} rows, one query each"
    return measure(found, seed=seed).assign_attrs(asked=rows)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    low, high = result["accuracy_low"].item(), result["accuracy_high"].item()
    counted = f" ({result['n_correct'].item()}/{result['n_query'].item()})"
    rows = [Row("accuracy, key as written", f"{number(result['accuracy'].item())}{counted}", "", span(low, high))]
    rows.append(Row("accuracy, key corrupted", number(result["corrupt_accuracy"].item())))
    verdict = result.attrs["verdict"]
    sentence = f"{verdict[0].upper()}{verdict[1:]}."
    if not bool(result["solved"]) or not int(result["n_counted"]):
        return sentence, rows
    for layer in shown(result):
        for site in (site for site in SITES if site in result["site"].values):
            for role in result["role"].values:
                one = result.sel(layer=layer, site=site, role=role)
                if one["recovered"].item() == 0 or np.isnan(one["recovered"].item()):
                    continue
                rows.append(_row(one, f"answer given back by {site} at {role}", layer))
    return sentence, rows


def _row(one: xr.Dataset, what: str, layer: int) -> Row:
    null = f"another row {number(one['null_recovered'].item())}"
    if "twin_recovered" in one:
        null = f"{null}; twin {number(one['twin_recovered'].item())}"
    interval = span(one["recovered_low"].item(), one["recovered_high"].item())
    return Row(what, number(one["recovered"].item()), null, interval, layer)


def _panels(_results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    return (Panel(plot),)


def _drawn(result: xr.Dataset) -> bool:
    return bool(result["solved"]) and int(result["n_counted"]) > 0


ANALYSIS = Analysis(
    title="Association",
    question="At which token is a key joined to its value, and by which part?",
    reading=(
        "The asked pair's key is replaced wherever it was written; then one part of the run before that is put back, at"
        " one token. 1: the answer comes back whole, 0: not at all. Before the convolution (mixer input) only the key's"
        " own token can give it back in the first layer, and after the last scan only the query's: those two are 1"
        " whatever a one-layer model does. What it does is in between, in what the scan receives. Null: the same from"
        " another row; the twin is the same architecture untrained, of which all rows are taken, since it answers none."
        " Rows count that are answered right, and wrong once the key is corrupted; where the lower bound of the"
        " accuracy is not above .5, nothing is reported."
    ),
    picture=(
        "Each row of the map is one part of the model, from the first layer above to the last below; each column is"
        " a kind of token. Blue, towards 1: putting back that part at that token gives the whole answer back. White,"
        " 0: nothing. Follow the blue from the key's column to the query's: where it changes column the key has been"
        " joined to its value."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    lacks=_lacks,
    drawn=_drawn,
    notes=("verdict_rule", "corruption", "asked"),
)
