"""Run the model over rows a few at a time, fold each piece's trace into the reductions, and forget it."""

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import xarray as xr

from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.listening import listening
from mamba_probe.planning import checked_plan
from mamba_probe.progress import bar
from mamba_probe.recorder import Recorder
from mamba_probe.reducing.classes import Classes, classes
from mamba_probe.reducing.keeping import Progress
from mamba_probe.reducing.reduction import MEMBER, UNIT, UNITS, Accumulating, Reduction, dealt, parts

__all__ = ["BATCH_SIZE", "Tally", "beside", "check_no_trace", "checked", "joined", "piece", "reduce"]

BATCH_SIZE = 8
"""Rows a model call, where the user names none."""


class Tally(Accumulating):
    """Tokens and rows of each class."""

    variables = ()

    def update(self, trace: xr.Dataset) -> None:
        """Fold in the next rows."""
        for part in parts(trace):
            for of, member in part.members.items():
                self.held(of, "n", (2,), np.int64)[...] += member.sum(), 1

    def result(self) -> xr.Dataset:
        """n_tokens and n_rows by class."""
        counted = np.stack([self.arrays[of, "n"] for of in self.classes])
        texts = {"n_tokens": "tokens of the class", "n_rows": "rows that have one"}
        return xr.Dataset(
            {name: ("class", counted[:, i], {"long_name": text, "units": "1"}) for i, (name, text) in
             enumerate(texts.items())},
            {"class": np.array(self.classes, dtype=object)},
        )  # fmt: skip


def reduce(
    probe: Any, inputs: Any, reductions: Sequence[Reduction], attention_mask: Any = None, *,
    text: Sequence[str] | None = None, tokenizer: Any = None, by: Any = None, layers: Sequence[int] | None = None,
    channels: Sequence[int] | None = None, batch_size: int = BATCH_SIZE, baseline: xr.Dataset | None = None,
    checkpoint: str | PathLike[str] | None = None, progress: bool = False,
) -> xr.Dataset:  # fmt: skip
    """Reduce what the scans execute on a corpus, of any length, without storing a trace.

    Each model call's trace is folded into float64 sums and counts, and thrown away: memory depends on the model, the
    classes, `batch_size` and the length of rows, not on their number. Rows are folded in one after another, so that a
    result does not depend on `batch_size` but for what the model's own rounding does. Padding never enters.

    Args:
        probe: an attached probe.
        inputs: what `record` takes, an `mp.corpus(...)` above all.
        reductions: of `mp.reduce`, or objects with `variables`, `update(trace)` and `result()` (see `Reduction`). They
            are copied first: one list serves many calls.
        attention_mask, text, tokenizer: as in `record`.
        by: classes of tokens: None; "role" of a task; "text": first token of a row, newline, punctuation; a mapping or
            array from token id to a class's name; or a function of a token's text, which gives one (None: no class).
        layers, channels: as in `record`.
        batch_size: rows a model call.
        baseline: the result of the same call on another model, such as `mp.randomised_twin(model)`: its numbers
            stand beside as `baseline_*`.
        checkpoint: `*.npz` to keep the sums in, written whole after each model call; where it is of the same call, it
            is gone on with, to the same bits. Only of reductions of `mp.reduce`.
        progress: a bar, on a terminal (stderr) or in a notebook.

    Returns:
        One Dataset of all results over `class`, with `n_tokens` and `n_rows`. Intervals (95 %, percentile bootstrap)
        draw 32 units, runs of neighbouring rows.

    Raises:
        ValueError: what `record` refuses; something that is no reduction; two results of one name; a baseline of other
            rows, classes or layers; a checkpoint of another call.

    >>> import mamba_probe as mp
    >>> task = mp.tasks.mqar(batch=4, length=64, seed=0)
    >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
    ...     found = probe.reduce(task, [mp.reduce.mean("delta")], by="role")
    >>> found["class"].values.tolist(), found["n_tokens"].values.tolist()
    (['all', 'filler', 'key', 'query', 'value'], [256, 160, 32, 32, 32])
    """
    probe._check_attached()
    given = checked_input(probe.model, probe._adapters[0].sizes.width, inputs, attention_mask, text, tokenizer)
    own = [copy.deepcopy(one) for one in checked(reductions)]
    names = tuple(dict.fromkeys(name for one in own for name in one.variables))
    plan = checked_plan(probe._adapters, probe.groups, names, layers, None, channels, given.length)
    classed = classes(by, given.labelled(slice(0, 1)), "input_ids" in given.piece(slice(0, 1)))
    statics, attrs = probe._constants(plan)
    described = _attrs(probe, given, attrs, classed, own) | {"batch_size": batch_size}
    folded = [Tally(), *own]
    kept = Progress(checkpoint, folded, described)
    spans = given.spans(batch_size, kept.rows)
    with bar("reducing", len(spans), progress) as step, torch.no_grad():
        for rows in spans:
            recorder = Recorder(plan, statics, attrs)
            with listening(probe.model, probe._taps, recorder):
                probe.model(**given.piece(rows))
            trace = piece(given.label(recorder.dataset, rows.start), classed, rows, given.batch)
            for one in folded:
                one.update(trace)
            kept.save(rows.stop)
            step("")
    result = joined([one.result() for one in folded]).assign_attrs(described)
    return result if baseline is None else beside(result, baseline)


def checked(reductions: Any) -> list[Reduction]:
    """The reductions, each of them one.

    Raises:
        ValueError: no list, an empty one, or something else in it.
    """
    if isinstance(reductions, Reduction) or not isinstance(reductions, Sequence) or isinstance(reductions, str):
        raise ValueError(f'reductions is a list, such as [mp.reduce.mean("delta")]; got {reductions!r}')
    for one in reductions:
        if not isinstance(one, Reduction) or isinstance(one, type) or isinstance(one.variables, str):
            raise ValueError(
                f"{one!r} is no reduction: mp.reduce has mean, histogram and horizon; one of your own has `variables`"
                " (a tuple of names), update(trace) and result()"
            )
    if not any(one.variables for one in reductions):
        raise ValueError("reductions name no variable, so that nothing would be recorded; pass at least one")
    return list(reductions)


def check_no_trace(reductions: Any, of_trace: Mapping[str, Any]) -> None:
    """Refuse what `record` is told of a trace where it is asked to reduce.

    Raises:
        ValueError: classes and nothing to reduce, or an argument that a reduction has no use for.
    """
    if reductions is None:
        raise ValueError("by= classes the tokens of a reduction: pass reduce=[...] with it")
    given = [name for name, value in of_trace.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"reduce= keeps no trace, and takes the variables from its reductions; leave out {', '.join(given)}"
        )


def piece(trace: xr.Dataset, classed: Classes, rows: slice, n_rows: int) -> xr.Dataset:
    """A trace of some rows of `n_rows`, with each token's classes and each row's unit."""
    found, first = classed(trace), rows.start
    member = xr.DataArray(np.stack(list(found.values())), dims=("class", "batch", "token"))
    coords: dict[str, Any] = {"class": np.array(list(found), dtype=object), MEMBER: member}
    coords |= {UNIT: ("batch", dealt(rows, n_rows)), "prompt_id": ("batch", np.arange(first, rows.stop))}
    if "parent_row" in trace.coords:  # counted like prompt_id
        coords["parent_row"] = trace["parent_row"] + first * (trace["parent_row"] >= 0)
    return trace.assign_coords(coords).assign_attrs(n_units=min(UNITS, n_rows))


def joined(results: Sequence[xr.Dataset]) -> xr.Dataset:
    """One Dataset of all.

    Raises:
        ValueError: two have a variable of one name, or disagree in a coordinate.
    """
    taken: set[str] = set()
    for one in results:
        twice = sorted(taken & set(map(str, one.data_vars)))
        if twice:
            raise ValueError(f"two reductions both give {', '.join(twice)}: give one of them a name=")
        taken |= set(map(str, one.data_vars))
    try:
        return xr.merge(results, join="exact", compat="no_conflicts", combine_attrs="drop")
    except (ValueError, xr.MergeError) as error:
        raise ValueError(f"results of the reductions do not go together: {error}") from error


def beside(result: xr.Dataset, baseline: xr.Dataset) -> xr.Dataset:
    """The result with the numbers of another model on the same rows.

    Raises:
        ValueError: other rows, classes, layers or sizes.
    """
    if not isinstance(baseline, xr.Dataset) or baseline.attrs.get("kind") != "reduction":
        raise ValueError(f"baseline is what probe.reduce returned for another model; got {type(baseline).__name__}")
    for name in ("inputs_sha256", "by"):
        if baseline.attrs[name] != result.attrs[name]:
            raise ValueError(
                f"the baseline was reduced with another {name}: {baseline.attrs[name]}, not {result.attrs[name]}"
            )
    shared = [name for name in result.data_vars if name in baseline.data_vars and name not in ("n_tokens", "n_rows")]
    for name in shared:
        ours, theirs = result[name], baseline[name]
        if ours.dims != theirs.dims or any(not ours[dim].equals(theirs[dim]) for dim in ours.dims):
            raise ValueError(
                f"the baseline's {name} is over {dict(theirs.sizes)}, ours over {dict(ours.sizes)}, or other labels"
            )
    if not shared:
        raise ValueError(f"the baseline holds none of {sorted(map(str, result.data_vars))}")
    return result.assign({f"baseline_{name}": baseline[name] for name in shared}).assign_attrs(
        baseline=baseline.attrs["model"], baseline_hash=baseline.attrs["model_hash"]
    )


def _attrs(
    probe: Any, given: ModelInput, attrs: dict[str, Any], classed: Classes, own: Sequence[Reduction]
) -> dict[str, Any]:
    """What the result says of itself; the same for the same call."""
    n_units = min(UNITS, given.batch)
    spaced = f"{n_units} runs of neighbouring rows, taken as independent"
    edits = dict.fromkeys(repr(edit) for tap in probe._taps.values() for edit in tap.edits)
    return attrs | given.attrs | {
        "kind": "reduction",
        "analysis": "reduction",
        "reductions": ", ".join(map(repr, own)),
        "by": classed.name,
        "n_batch": given.batch,
        "length": given.length,
        "inputs_sha256": given.sha256,
        "estimator": "over all valid tokens of each class, in float64, row after row; horizons as memory_horizon's",
        "interval": f"95 % percentile bootstrap over {spaced}" if n_units > 1 else "NaN: one row, nothing to resample",
        "null": "null_lti: delta at each row's mean; baseline_*: the model given as baseline=, if any",
        "edits": "; ".join(edits),
    }  # fmt: skip
