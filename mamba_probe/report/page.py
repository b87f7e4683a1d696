"""One self-contained HTML page: what was found, against which null, from what."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import number
from mamba_probe.pages import embedded, write_page
from mamba_probe.reference import describe, is_closed_form
from mamba_probe.report.figures import draw
from mamba_probe.report.findings import finding
from mamba_probe.run import Run

__all__ = ["write_report"]

TEMPLATE = Path(__file__).parent / "page.html"


def write_report(
    run: Run, results: dict[str, xr.Dataset], directory: str | PathLike[str], *,
    beside: Mapping[str, xr.Dataset] | None = None, figures: str = "figures/", stored: str = "results/",
) -> Path:  # fmt: skip
    """Draw every result to DIRECTORY/FIGURES and write DIRECTORY/report.html, which needs no other file.

    `stored` is the folder that the results were written to, which the page names.

    `beside` has the results of the reference `run.beside`, by analysis: a column of the tables, a half of the pictures.
    """
    directory, others = Path(directory), beside or {}
    sections = []
    for name, result in results.items():
        png, svg = draw(name, result, directory / figures, beside=others.get(name))[:2]
        found = finding(name, result, others.get(name))
        sections.append({"name": name, "finding": found, "png": embedded(png), "svg": svg.name})
    return write_page(
        directory / "report.html", TEMPLATE.read_text(), model=run.trace.attrs["model"], subject=_subject(run.trace),
        sections=sections, beside=_beside(run), figures=figures, stored=stored, provenance=_provenance(run),
        parity=_parity(run), parity_error=run.parity.attrs["error"], parity_parting=run.parity.attrs["parting"],
    )  # fmt: skip


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


def _subject(trace: xr.Dataset) -> str:
    """What the model ran on, in words."""
    n_tokens = int(trace["valid"].sum())
    size = f"{trace.sizes['batch']} rows, {n_tokens:,} tokens, {trace.sizes['layer']} layer(s)"
    if "task" in trace.attrs:
        chosen = {key: value for key, value in json.loads(trace.attrs["task_params"]).items() if key != "batch"}
        return f"task {trace.attrs['task']} ({', '.join(f'{k} {v}' for k, v in chosen.items())}); {size}"
    left = trace.attrs.get("tokens_left_out", 0)
    return f"text {Path(trace.attrs.get('text', '')).name}; {size}" + (
        f"; {left:,} tokens of the file left out" if left else ""
    )


def _provenance(run: Run) -> list[tuple[str, ...]]:
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
    return [(key.replace("_", " "), *(str(one.trace.attrs[key]) for one in _both(run))) for key in shown]


def _both(run: Run) -> list[Run]:
    return [run] if run.beside is None else [run, run.beside]


def _parity(run: Run) -> list[tuple[str, ...]]:
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
    return [
        (what, *(_worst(one.parity, name) for one in _both(run))) for name, what in text.items() if name in run.parity
    ]


def _worst(parity: xr.Dataset, name: str) -> str:
    if name not in parity:
        return "not compared"
    worst = np.atleast_1d(parity[name].values)
    where = f" (layer {parity['layer'].values[worst.argmax()]})" if worst.size > 1 else ""
    return f"{number(worst.max(), 2)}{where}"
