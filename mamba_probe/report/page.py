"""One self-contained HTML page: what was found, against which null, from what."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import FEW, number
from mamba_probe.pages import Table, picture, read_template, write_page
from mamba_probe.reference import describe, is_closed_form
from mamba_probe.report.figures import draw
from mamba_probe.report.findings import Finding, described, finding
from mamba_probe.run import Run

__all__ = ["write_report"]

INTERVAL = "95 % interval"


def write_report(
    run: Run, results: dict[str, xr.Dataset], directory: str | PathLike[str], *,
    beside: Mapping[str, xr.Dataset] | None = None, figures: str = "figures/", stored: str = "results/",
) -> Path:  # fmt: skip
    """Draw every result to DIRECTORY/FIGURES and write DIRECTORY/report.html, which needs no other file.

    `stored` is the folder that the results were written to, which the page names.

    `beside` has the results of the reference `run.beside`, by analysis: a column of the tables, a half of the pictures.
    """
    directory, others, other = Path(directory), beside or {}, _beside(run)
    column = [] if other is None else [other["column"]]
    sections = [
        _section(run, name, result, directory / figures, others.get(name), column) for name, result in results.items()
    ]
    model, titles = str(run.trace.attrs["model"]), [(each["name"], each["finding"].title) for each in sections]
    return write_page(
        directory / "report.html", read_template("report.html"), model=model, subject=_subject(run.trace),
        few=_few(run.trace.sizes["batch"]),
        title=f"{model} on {_given(run.trace)}: findings of mamba_probe",
        contents=[("found", "In short"), *titles, ("parity", "Parity"), ("provenance", "Provenance")],
        sections=sections, beside=other, figures=figures, stored=stored,
        provenance=_recorded(run, column), parity=_errors(run, column),
        parity_error=run.parity.attrs["error"], parity_parting=run.parity.attrs["parting"],
    )  # fmt: skip


def _section(
    run: Run, name: str, result: xr.Dataset, folder: Path, other: xr.Dataset | None, column: list[str]
) -> dict[str, Any]:  # fmt: skip
    """An analysis: what it says, its numbers, its picture, and the reference's where that is drawn apart."""
    found = finding(name, result, other)
    pngs = [path for path in draw(name, result, folder, beside=other) if path.suffix == ".png"]
    models = [str(one.trace.attrs["model"]) for one in _both(run)]
    together = models if len(pngs) == 1 else models[:1]
    pictures = [picture(pngs[0], f"{found.title} of {' and '.join(together)}", described(found, together))]
    if len(pngs) > 1 and other is not None:
        shown = finding(name, other)
        pictures.append(picture(pngs[1], f"{found.title} of {models[1]}", described(shown, models[1:])))
    return {"name": name, "finding": found, "pictures": pictures, "table": _table(found, column)}


def _table(found: Finding, column: list[str]) -> Table:
    """The numbers of a finding."""
    rows = [[row.what, row.value, row.null, row.interval, *([row.beside] if column else [])] for row in found.rows]
    numbers = ("value", "null", INTERVAL, *column)
    return Table(f"{found.title} in numbers", ["quantity", *numbers], rows, numbers)


def _beside(run: Run) -> dict[str, str] | None:
    """What the reference is, on which rows it ran, and what its column is called."""
    if run.beside is None:
        return None
    own, trace = run.trace, run.beside.trace
    name, given = str(trace.attrs["model"]), run.beside.model is not None
    same = np.array_equal(own["token_id"].values, trace["token_id"].values)
    alike = "other rows, drawn alike from its own vocabulary"
    return {
        "name": name,
        "what": describe(name, given),
        "rows": "the same rows" if same else f"{alike}: {_subject(trace)}",
        "column": "construction" if is_closed_form(name, given) else "beside it",
        "layer": "the only layer" if trace.sizes["layer"] == 1 else "the layer of the same number",
    }


def _few(rows: int) -> str:
    """So many rows, where a bootstrap over them is too narrow."""
    return f"{rows} rows" if 1 < rows < FEW else ""


def _subject(trace: xr.Dataset) -> str:
    """What the model ran on, in words."""
    n_tokens = int(trace["valid"].sum())
    size = f"{trace.sizes['batch']} rows, {n_tokens:,} tokens, {trace.sizes['layer']} layer(s)"
    if "task" in trace.attrs:
        chosen = {key: value for key, value in json.loads(trace.attrs["task_params"]).items() if key != "batch"}
        return f"{_given(trace)} ({', '.join(f'{k} {v}' for k, v in chosen.items())}); {size}"
    left = trace.attrs.get("tokens_left_out", 0)
    return f"{_given(trace)}; {size}" + (f"; {left:,} tokens of the file left out" if left else "")


def _given(trace: xr.Dataset) -> str:
    """The task, or the text, by name."""
    if "task" in trace.attrs:
        return f"task {trace.attrs['task']}"
    return f"text {Path(trace.attrs.get('text', '')).name}"


def _recorded(run: Run, column: list[str]) -> Table:
    """Of what the recording is, by what and when it was made."""
    shown = (
        "model",
        "model_hash",
        "family",
        "discretization",
        "dtype",
        "backend",
        "created_at",
        "schema_version",
        "versions",
    )
    rows = [(key.replace("_", " "), *(str(one.trace.attrs[key]) for one in _both(run))) for key in shown]
    return Table("The recording, and what made it", ["of the recording", "value", *column], rows, sortable=False)


def _both(run: Run) -> list[Run]:
    return [run] if run.beside is None else [run, run.beside]


def _errors(run: Run, column: list[str]) -> Table:
    """The worst layer of each comparison."""
    text = {
        "out_vs_native": "mixer output: probe against the untouched model",
        "out_vs_oracle": "mixer output: probe against the float64 oracle",
        "native_vs_oracle": "mixer output: untouched model against the float64 oracle",
        "delta": "delta: recorded against the float64 oracle",
        "B": "B: recorded against the float64 oracle",
        "C": "C: recorded against the float64 oracle",
        "logits_vs_native": "logits: probe against the untouched model",
    }
    rows = [
        (what, *(_worst(one.parity, name) for one in _both(run))) for name, what in text.items() if name in run.parity
    ]
    return Table("The largest error over layers", ["comparison", "error", *column], rows, ("error", *column))


def _worst(parity: xr.Dataset, name: str) -> str:
    if name not in parity:
        return "not compared"
    worst = np.atleast_1d(parity[name].values)
    where = f" (layer {parity['layer'].values[worst.argmax()]})" if worst.size > 1 else ""
    return f"{number(worst.max(), 2)}{where}"
