"""Every analysis on every trained model, beside the same model untrained and our construction of its task."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses import hidden_attention, memory_horizon, recall_circuit, wavelet_alignment
from mamba_probe.analyses.common.queries import answerable_queries
from mamba_probe.constructions import Construction
from mamba_probe.probe import attach
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.finding import BETWEEN, LIES, NO_CIRCUIT, OUTSIDE, found, lies
from mamba_probe.reproduce.table import REPORT, Cell, Row
from mamba_probe.reproduce.trained import Checkpoint, absent, checkpoints, fresh_task, opened
from mamba_probe.reproduce.trained_analyses_figure import draw
from mamba_probe.trace.schema import DEFAULT_VARIABLES
from mamba_probe.training import TASKS

__all__ = ["ANALYSES", "TRAINED_ANALYSES", "cells"]

TOKENS, MOST = 2**12, 32  # of a recording, and rows of it
WIDEST = 128  # channels of a layer that horizons, wavelets and attention are taken of, evenly spaced
BOOTSTRAP = 100

Value = tuple[float, float, float]
"""A number and its interval."""


@dataclass(frozen=True)
class Figure:
    """One headline figure of a layer: as trained with its interval, untrained, and of the construction."""

    quantity: str
    layer: int
    trained: Value
    null: float
    ideal: float


@dataclass(frozen=True)
class Subject:
    """A recording and the weights of the model."""

    trace: xr.Dataset
    weights: xr.Dataset


def cells(models: Sequence[Checkpoint] | None = None) -> tuple[Cell, ...]:
    """Return the tables as data, of the zoo's trained checkpoints or of others."""
    models = checkpoints() if models is None else models
    return tuple(
        Cell(title, name, REPORT, {"path": each.path})
        for name, title in TITLES.items()
        for each in models
        if name != "recall_circuit" or _has_pairs(each)
    )


TITLES = {
    "recall_circuit": "Recall circuit: signatures of the strongest layer",
    "memory_horizon": "Memory horizon of each layer",
    "wavelet_alignment": "Wavelet alignment of each layer's executed kernels",
    "hidden_attention": "Hidden attention of each layer at a query",
}


def _has_pairs(checkpoint: Checkpoint) -> bool:
    """Whether a query has several pairs to choose from."""
    drawn = checkpoint.config.draw(1, 0)
    return int((drawn.role == "value").sum()) > 1


@lru_cache(maxsize=128)
def _subject(path: Path, which: str, seed: int) -> Subject | None:
    """Record the model as trained, its twin, or its construction on the same rows; None where there is no such."""
    checkpoint = opened(path)
    rows = max(2, min(MOST, TOKENS // checkpoint.said["sizes"]["T"]))
    task = fresh_task(checkpoint, rows, seed)
    model: Any = {"trained": checkpoint.model, "twin": checkpoint.twin, "ideal": checkpoint.ideal}[which]
    if model is None:
        return None
    inputs: Any = task
    if isinstance(model, Construction):
        bare = model.answer is not None or model.expected is not None
        model, inputs = model.model, (model.inputs(task.input_ids) if bare else task)
    with attach(model) as probe:
        trace = probe.record(inputs, variables=(*DEFAULT_VARIABLES, "x", "z", "u"), batch_size=8)
        return Subject(trace, probe.weights())


def _of(result: xr.Dataset, name: str, layer: int) -> Value:
    value, low, high = (float(result[f"{name}{end}"][layer]) for end in ("", "_low", "_high"))
    return value, low, high


def _by_layer(names: dict[str, str], results: dict[str, xr.Dataset | None]) -> Iterator[Figure]:
    """The figures of each layer; our constructions have one layer, or the last does the work."""
    trained, twin, ideal = (results[which] for which in ("trained", "twin", "ideal"))
    assert trained is not None
    assert twin is not None
    for layer in range(trained.sizes["layer"]):
        for name, quantity in names.items():
            best = np.nan if ideal is None else _of(ideal, name, -1)[0]
            yield Figure(quantity, layer, _of(trained, name, layer), _of(twin, name, layer)[0], best)


def _thinned(trace: xr.Dataset) -> xr.Dataset:
    """Every k-th channel of a wide layer; heads are few."""
    step = -(-trace.sizes.get("channel", 1) // WIDEST)
    return trace.isel(channel=slice(None, None, step)) if step > 1 else trace


def _horizon(trace: xr.Dataset, seed: int) -> xr.Dataset:
    rows = 2 if trace.attrs["family"] == "s4d" else None  # whose delta is constant: each row says the same
    return memory_horizon.measure(trace.isel(batch=slice(rows)), n_bootstrap=BOOTSTRAP, seed=seed)


def _wavelet(trace: xr.Dataset, seed: int) -> xr.Dataset:
    asked = answerable_queries(trace)
    return wavelet_alignment.measure(trace, query_tokens=asked, n_sampled=2, n_span=2, n_bootstrap=BOOTSTRAP, seed=seed)


def _attention(trace: xr.Dataset, seed: int) -> xr.Dataset:
    return hidden_attention.measure(trace, query_tokens=answerable_queries(trace), n_bootstrap=BOOTSTRAP, seed=seed)


LAYERED: dict[str, tuple[Callable[[xr.Dataset, int], xr.Dataset], dict[str, str]]] = {
    "memory_horizon": (_horizon, {"layer_forward_restricted_mean": "mean horizon, at most T/2"}),
    "wavelet_alignment": (_wavelet, {"layer_best_cosine": "|cos| with the best wavelet"}),
    "hidden_attention": (
        _attention,
        {"layer_mean_distance": "mean distance read", "layer_top_share": "share of the token read most"},
    ),
}


def _layered_rows(cell: Cell, seed: int) -> list[Row]:
    measure, names = LAYERED[cell.how]
    subjects = {which: _subject(cell.build["path"], which, seed) for which in ("trained", "twin", "ideal")}
    results = {which: None if each is None else measure(_thinned(each.trace), seed) for which, each in subjects.items()}
    return [_row(cell, seed, each) for each in _by_layer(names, results)]


def _recall_rows(cell: Cell, seed: int) -> list[Row]:
    """The signatures of the layer that is strongest as trained; of the construction, of its own."""
    trained, twin, ideal = (_subject(cell.build["path"], which, seed) for which in ("trained", "twin", "ideal"))
    assert trained is not None
    assert twin is not None
    options: dict[str, Any] = {"n_bootstrap": BOOTSTRAP, "seed": seed}
    result = recall_circuit.measure(
        trained.trace, weights=trained.weights, baseline=(twin.trace, twin.weights), **options
    )
    if not bool(result["solved"]):
        return [_no_circuit(cell, seed, result)]
    layer = int(result["strongest"].values.argmax())
    best = None if ideal is None else recall_circuit.measure(ideal.trace, weights=ideal.weights, **options)
    figures = []
    for name in result["signature"].values:
        one = result.sel(signature=name).isel(layer=layer)
        if np.isfinite(float(one["value"])) and np.isfinite(float(one["ideal"])):
            planted = np.nan if best is None else float(best["value"].sel(signature=name).max())
            value = (float(one["value"]), float(one["low"]), float(one["high"]))
            label = f"{name}: {one['label'].item()}"
            figures.append(Figure(label, layer, value, float(one["baseline"]), planted))
    offset = int(result["offset"].isel(layer=layer))
    return [_row(cell, seed, each, offset=offset) for each in figures]


def _no_circuit(cell: Cell, seed: int, result: xr.Dataset) -> Row:
    accuracy = (float(result["accuracy"]), float(result["accuracy_low"]), float(result["accuracy_high"]))
    one = Figure("task accuracy", -1, accuracy, float(result["chance"]), 1.0)
    row = _row(cell, seed, one)
    said = "scored where the lower 95 % end of the accuracy is above .5: the model does not solve its task"
    return replace(row, verdict=NO_CIRCUIT, criterion=said, interval="Wilson 95 %", null_is="chance")


def _row(cell: Cell, seed: int, figure: Figure, **sizes: Any) -> Row:
    checkpoint = opened(cell.build["path"])
    said, (value, low, high) = checkpoint.said, figure.trained
    layer = {"layer": figure.layer} if figure.layer >= 0 else {}
    said["sizes"] = {name: said["sizes"][name] for name in ("T", "pairs") if name in said["sizes"]}
    said["sizes"] |= {"solves": "yes" if checkpoint.solves else "no"} | layer | sizes
    ideal = "our construction of its task" if checkpoint.ideal is not None else "none: no layer of this kind does it"
    return found(
        cell, figure.quantity, value, (low, high), lies(value, (low, high), figure.null, figure.ideal), LIES, said,
        null=figure.null, ideal=figure.ideal, ideal_is=ideal, estimator=f"{cell.how}.measure on a recording",
        null_is=f"the same model untrained, seed {checkpoint.config.seed}, on the same sequences",
        over="fresh sequences; layers by direct attribution"
        if cell.how == "recall_circuit"
        else f"fresh sequences, at most {WIDEST} channels of a layer, evenly spaced",
    )  # fmt: skip


def _absent(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(each for task in TASKS for each in absent(task, cells))


def _says(rows: Sequence[Row]) -> tuple[str, ...]:
    """How many figures of each analysis lie between, in models that solve their task."""
    said = []
    for table in dict.fromkeys(row.table for row in rows):
        here = [row for row in rows if row.table == table and row.sizes["solves"] == "yes"]
        judged = [row for row in here if row.verdict in (BETWEEN, OUTSIDE)]
        out = ", ".join(f"{row.what} {row.quantity.split(':')[0]}" for row in judged if row.verdict == OUTSIDE)
        if judged:
            between = sum(row.verdict == BETWEEN for row in judged)
            said.append(f"{table}: {between} of {len(judged)} between" + (f"; outside: {out}." if out else "."))
    return (*(f"Of models that solve their task. {each}" for each in said[:1]), *said[1:])


TRAINED_ANALYSES = Claim(
    name="trained-analyses",
    title="Trained models beside untrained ones and constructions",
    paper="",
    ours=(
        "Every analysis on every trained model of the zoo, each headline figure beside the same model untrained and our"
        " construction of the task. A circuit is scored in a model that solves its task alone. Whether a figure lies"
        " between its null and its ideal is a finding, and is said either way."
    ),
    cells=cells,
    measures={"recall_circuit": _recall_rows, **dict.fromkeys(LAYERED, _layered_rows)},
    absent=_absent,
    says=_says,
    draw=draw,
    caption=(
        "How far each figure of a trained layer is on the way from the untrained model (0) to the construction (1);"
        " orange: outside of the two. Grey: nothing to measure, no construction, or no difference between the two."
        " Layers in italics belong to models that do not solve their task."
    ),
    left_out=(
        "A trained model need not do what the construction does: outside of the two is another solution, or none.",
        "Memory horizon, wavelets and attention compare each layer of a trained model with the construction's one layer"
        " (of two, its last).",
        "The recall circuit needs several pairs to choose from: a task that keeps one token, or shows one pair, has"
        " none. A model may write a pair some tokens late (offset); S7 then counts the tokens written at.",
        "Of wavelets |cos| with the best one alone: the constructions read single tokens, which share little energy"
        " with coarse wavelets, as untrained kernels do.",
        "For recall in S4D the construction has as many channels as key bits times value bits.",
    ),
)  # fmt: skip

ANALYSES = tuple(TITLES)
