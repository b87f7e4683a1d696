"""Does training find memory that does not decay? exp(A delta) before, at and after n, as the task grows longer."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.common.bootstrap import interval
from mamba_probe.constructions import Construction
from mamba_probe.probe import attach
from mamba_probe.reproduce import recount
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.finding import SHOWN, UNSHOWN, found
from mamba_probe.reproduce.recount import accuracies
from mamba_probe.reproduce.table import REPORT, Cell, Criterion, Row, measured
from mamba_probe.reproduce.trained import Checkpoint, absent, checkpoints, fresh_task, opened
from mamba_probe.reproduce.trained_keep_figure import draw

__all__ = ["TRAINED_KEEP", "cells"]

DECAY = "Decay of a step before, at and after n, of each layer"
CONSTANT = "Decay of a time-invariant layer: the same before and after"
EVENTS = ("before", "at", "after")
LOSS = 0.1  # of the write at n, for the share of states that keep the rest to the end
TOKENS, MOST = 2**14, 32  # of a recording, and rows of it

Recorded = tuple[xr.Dataset, xr.Dataset]
"""A recording and what was measured of it."""


def cells(models: Sequence[Checkpoint] | None = None) -> tuple[Cell, ...]:
    """Return the tables as data, of the zoo's trained checkpoints or of others."""
    models = checkpoints() if models is None else models
    kept = [each for each in models if each.config.task["name"] == "keep_nth"]
    decays = [Cell(DECAY, "decay", REPORT, {"path": each.path}) for each in kept]
    fixed = [
        Cell(CONSTANT, "constant", Criterion("<=", 1e-9), {"path": each.path}) for each in kept if each.kind == "s4d"
    ]
    return (*decays, *fixed, *accuracies(kept))


@lru_cache(maxsize=64)
def _steps(path: Path, which: str, seed: int) -> tuple[xr.Dataset, xr.Dataset] | None:
    """A recording of the model as trained, its twin or its construction, and what `memory_horizon` says of it."""
    checkpoint = opened(path)
    drawn = checkpoint.config.draw(1, 0).params
    rows = 2 if checkpoint.kind == "s4d" else max(2, min(MOST, TOKENS // drawn["length"]))  # S4D's delta is constant
    ids = fresh_task(checkpoint, rows, seed).input_ids
    subject = {"trained": checkpoint.model, "twin": checkpoint.twin, "ideal": checkpoint.ideal}[which]
    if subject is None:
        return None
    model, inputs = (subject.model, subject.inputs(ids)) if isinstance(subject, Construction) else (subject, ids)
    with attach(model) as probe:
        trace = probe.record(inputs, variables=("delta", "A")).assign_attrs(n=drawn["n"])
    return trace, memory_horizon.measure(trace, event_tokens=drawn["n"], epsilon=LOSS, seed=seed)


def _decay_rows(cell: Cell, seed: int) -> list[Row]:
    """Of each layer the mean decay before, at and after n, their difference, and the states that keep what n wrote."""
    trained, twin, ideal = (_steps(cell.build["path"], which, seed) for which in ("trained", "twin", "ideal"))
    assert trained is not None
    assert twin is not None
    planted = None if ideal is None else ideal[1]
    return [
        row
        for layer in range(trained[1].sizes["layer"])
        for row in (
            *_pooled_rows(cell, layer, trained[1], twin[1], planted), *_keeper_rows(cell, seed, layer, trained, twin)
        )
    ]  # fmt: skip


def _said(cell: Cell, layer: int, trained: xr.Dataset, ideal: bool) -> dict[str, Any]:
    checkpoint = opened(cell.build["path"])
    said: dict[str, Any] = checkpoint.said | {
        "null_is": f"the same model untrained, seed {checkpoint.config.seed}, on the same sequences",
        "ideal_is": "our construction of the task, ramp" if ideal else "none",
        "estimator": "memory_horizon.measure on delta and A as executed",
        "over": f"{trained.attrs['n_rows']} sequences, all channels and states of the layer",
    }  # fmt: skip
    said["sizes"] |= {"layer": layer, "lengths trained on": max(1, len(checkpoint.config.mixture))}
    return said


def _pooled_rows(cell: Cell, layer: int, trained: xr.Dataset, twin: xr.Dataset, ideal: xr.Dataset | None) -> list[Row]:
    """Of all channels and states; our construction has one layer, which stands for all."""
    checkpoint, said, rows = opened(cell.build["path"]), _said(cell, layer, trained, ideal is not None), []
    for quantity, name, event in QUANTITIES:
        at = {} if event is None else {"event": event}
        values = [_of(each, name, layer, at) for each in (trained, twin)]
        best = np.nan if ideal is None else _of(ideal, name, 0, at)[0]
        verdict, criterion = REPORT.verdict(0), REPORT.text("")
        if name == "layer_gamma" and checkpoint.kind != "s4d":
            selective = checkpoint.solves and values[0][1] > max(0, values[1][2])
            verdict, criterion = SHOWN if selective else UNSHOWN, GAMMA
        (value, low, high), (null, _, _) = values
        rows.append(found(cell, quantity, value, (low, high), verdict, criterion, said, null=null, ideal=best))
    return rows


QUANTITIES = (
    *((f"mean decay {event} n", "layer_mean_decay_event", event) for event in EVENTS),
    ("gamma: mean after n less mean up to n", "layer_gamma", None),
    ("share that keeps 90 % of n's write", "layer_retained_share", None),
)
GAMMA = "the task is solved, and the interval above 0 and the untrained's"


def _keeper_rows(cell: Cell, seed: int, layer: int, trained: Recorded, twin: Recorded) -> list[Row]:
    """Of the states that keep n's write alone: few hold it, and what all the others do hides them."""
    result, checkpoint = trained[1].isel(layer=layer), opened(cell.build["path"])
    kept = (result["sigma"].mean("batch") <= -np.log1p(-LOSS)).values
    if not kept.any():
        return []
    said = _said(cell, layer, trained[1], False) | {"null_is": "the same model untrained, all its states"}
    said["over"] = f"{kept.sum()} of {kept.size} states; {trained[1].attrs['n_rows']} sequences"
    means = result["mean_decay_event"].transpose("channel", "state", "event").values[kept].mean(0)
    nulls = twin[1]["layer_mean_decay_event"].isel(layer=layer).values
    none, reported = (np.nan, np.nan), (REPORT.verdict(0), REPORT.text(""))
    rows = [
        found(cell, f"mean decay {event} n{KEEPERS}", mean, none, *reported, said, null=null)
        for event, mean, null in zip(EVENTS, means.tolist(), nulls.tolist(), strict=True)
    ]
    ratios, null = _ratios(trained[0], layer, kept, seed), _ratios(twin[0], layer, np.ones_like(kept), seed)
    for place, event in enumerate(EVENTS[:2]):
        (value, low, high), (usual, _, most) = ratios[:, place].tolist(), null[:, place].tolist()
        verdict, criterion = reported
        if checkpoint.kind != "s4d":
            verdict, criterion = SHOWN if checkpoint.solves and low > max(1, most) else UNSHOWN, RATIO
        quantity = f"delta {event} n / after n{KEEPERS}"
        rows.append(found(cell, quantity, value, (low, high), verdict, criterion, said, null=usual))
    return rows


KEEPERS = ", states keeping n"
RATIO_AT = f"delta at n / after n{KEEPERS}"
RATIO = "the task is solved, and the interval above 1 and the untrained's"


def _ratios(trace: xr.Dataset, layer: int, kept: np.ndarray, seed: int) -> np.ndarray:
    """Delta before and at n over its mean after n, geometric mean over the states, (value and interval, place)."""
    n, step = int(trace.attrs["n"]), trace["delta"].isel(layer=layer)
    delta = step.expand_dims(batch=trace["batch"], token=trace["token"]) if "token" not in step.dims else step
    delta = delta.transpose("batch", "token", "channel").values.astype(float)
    parts = [delta[:, part].mean(1) for part in (slice(0, n), slice(n, n + 1), slice(n + 1, None))]
    weight = kept.sum(1) / kept.sum()

    def pooled(draws: np.ndarray) -> np.ndarray:
        before, at, after = (np.log(draws @ part / draws.sum()) for part in parts)
        return np.exp(np.stack([before - after, at - after]) @ weight)

    value = pooled(np.ones(len(delta), dtype=int))
    return np.stack([value, *interval(pooled, len(delta), 200, seed)])


def _of(result: xr.Dataset, name: str, layer: int, at: dict[str, str]) -> tuple[float, float, float]:
    value, low, high = (float(result[f"{name}{end}"][layer].sel(at)) for end in ("", "_low", "_high"))
    return value, low, high


def _constant_rows(cell: Cell, seed: int) -> list[Row]:
    trained, twin = (_steps(cell.build["path"], which, seed) for which in ("trained", "twin"))
    assert trained is not None
    assert twin is not None
    largest, null = (float(np.abs(each[1]["gamma"]).max()) for each in (trained, twin))
    return [
        measured(
            cell, "largest |gamma| of a state", largest, null=null, null_is="the same model untrained",
            estimator="memory_horizon.measure on delta and A", over="all layers, channels and states",
            **opened(cell.build["path"]).said,
        )
    ]  # fmt: skip


def _curves(cells: Sequence[Cell], seed: int) -> dict[str, np.ndarray]:
    """Return the shares of steps in bins of exp(A delta), (layer, event, bin), of each model and of its twin."""
    shares = {}
    for cell in cells:
        for which in ("trained", "twin") if cell.how == "decay" else ():
            counts = _steps(cell.build["path"], which, seed)
            assert counts is not None
            counts = counts[1]["layer_decay_count"].transpose("layer", "event", "decay_bin").values
            shares[f"{which} {opened(cell.build['path']).name}"] = counts / counts.sum(-1, keepdims=True)
    return shares


def _absent(cells: Sequence[Cell]) -> tuple[str, ...]:
    here = [opened(cell.build["path"]) for cell in cells if cell.how == "decay"]
    mixed = [each.name for each in here if each.config.mixture]
    alone = [each.name for each in here if not each.config.mixture]
    said = []
    if mixed and alone:
        said.append(
            f"The models differ in more than their mixer: {', '.join(mixed)} saw a mixture of lengths in training,"
            f" since at the longest alone such a model did not begin to learn; {', '.join(alone)} saw one length alone."
        )
    return (*said, *absent("keep_nth", cells))


def _says(rows: Sequence[Row]) -> tuple[str, ...]:
    """What was found, of the last layer of each model, in the words of the verdicts."""
    said = []
    for what in dict.fromkeys(row.what for row in rows):
        layers = [row for row in rows if row.what == what and "layer" in row.sizes]
        last = {row.quantity: row for row in layers if row.sizes["layer"] == layers[-1].sizes["layer"]}
        gamma, share, at = (last.get(name) for name in (QUANTITIES[3][0], QUANTITIES[4][0], RATIO_AT))
        answered = next((row for row in rows if row.what == what and row.quantity == "accuracy"), None)
        if gamma is None or share is None or answered is None:
            continue
        kept = "no state keeps n" if at is None else (
            f"the {share.value:.1%} of states that keep n's write have {at.value:.3g} times the delta at n"
            f" [{at.low:.3g}, {at.high:.3g}] that they have after it"
        )  # fmt: skip
        said.append(
            f"{what} (accuracy {answered.value:.2f}), last layer: gamma {round(gamma.value, 3) + 0.0:g} of all states;"
            f" {kept}."
        )
    return tuple(said)


TRAINED_KEEP = Claim(
    name="trained-keep",
    title="Memory that does not decay, trained",
    paper="The S6 layer of Mamba can dynamically counteract memory decay.",
    ours=(
        "Two-layer models trained to return token n at the end of T tokens, of Mamba-1 and of S4D. If training finds"
        " what our construction does, exp(A delta) is near 0 up to n and near 1 after it, the nearer the longer the"
        " task; a time-invariant layer has one value for all steps. Two views: all states, and those that keep n's"
        " write (90 % of it or more, to the end), for which delta falls after n if decay is counteracted step by step."
        " What is found is reported, whichever it is; what can fail is that a card's accuracy is counted again, and"
        " that S4D's decay is constant."
    ),
    cells=cells,
    measures={"decay": _decay_rows, "constant": _constant_rows, **recount.MEASURES},
    curves=_curves,
    absent=_absent,
    says=_says,
    draw=draw,
    caption=(
        "Above: shares of exp(A delta) over the steps before, at and after n, of all channels and states of the last"
        " layer; dotted: the same model untrained, after n. Below, against T: what a step of the states that keep n's"
        " write forgets, one less the mean of exp(A delta), and what it may forget after n; gamma of all states,"
        " crosses untrained; and accuracy."
    ),
    left_out=(
        "One training a model: nothing here says how another seed would come out.",
        "Delta may hold a token without the task being solved, and the task may be solved by other means than delta:"
        " read the accuracy beside it.",
        "States that keep n are chosen by their decay after n: that it is low there is no finding. That it is higher at"
        " n is, since A is the same at every step and delta alone differs.",
    ),
)  # fmt: skip
