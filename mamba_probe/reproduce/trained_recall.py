"""Recall and induction heads that were learned: accuracy by mixer and size, beyond the trained length, without conv."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mamba_probe.edits import ablate
from mamba_probe.probe import attach
from mamba_probe.reproduce import recount
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.recount import accuracies, uncounted
from mamba_probe.reproduce.table import REPORT, Cell, Row, counted
from mamba_probe.reproduce.trained import Checkpoint, absent, checkpoints, fresh_task, opened
from mamba_probe.reproduce.trained_recall_figure import draw

__all__ = ["TRAINED_RECALL", "cells"]

WITHOUT = "The convolution taken out of a model that was trained with it"
TASKS = ("mqar", "induction")
QUERIES, TOKENS = 1024, 2**14


def cells(models: Sequence[Checkpoint] | None = None) -> tuple[Cell, ...]:
    """Return the tables as data, of the zoo's trained checkpoints or of others."""
    models = checkpoints() if models is None else models
    asked = [each for each in models if each.config.task["name"] in TASKS]
    able = [each for each in asked if each.solves and each.said["sizes"]["taps"] > 1]
    return (*accuracies(asked), *(Cell(WITHOUT, "without conv", REPORT, {"path": each.path}) for each in able))


def _without_rows(cell: Cell, seed: int) -> list[Row]:
    """The same queries with every convolution replaced by the identity: its current tap alone, at one, no bias."""
    checkpoint = opened(cell.build["path"])
    one = fresh_task(checkpoint, 1, seed)
    rows = max(1, min(QUERIES // one.n_query, TOKENS // one.input_ids.shape[1]))
    task = fresh_task(checkpoint, rows, seed)
    with attach(checkpoint.model) as probe:
        found = probe.intervene(task, [ablate("conv")], batch_size=max(1, 2**12 // task.input_ids.shape[1]))
    assert task.answers is not None
    whole, cut = ((int(found["n_correct"][i]), int(found["n_query"][i])) for i in range(2))
    said = checkpoint.said
    said["sizes"] |= {"with conv": whole[0] / whole[1]}
    return [
        counted(
            cell, cut, estimator='probe.intervene, ablate("conv") in every layer', null=1 / len(task.answers),
            null_is=f"chance, 1 of {len(task.answers)}", over=f"{rows} sequences, {cut[1]} queries", **said,
        )
    ]  # fmt: skip


def _absent(cells: Sequence[Cell]) -> tuple[str, ...]:
    here = [opened(path) for path in _paths(cells)]
    return (*uncounted(here), *(each for task in TASKS for each in absent(task, cells)))


def _paths(cells: Sequence[Cell]) -> list[Path]:
    return list(dict.fromkeys(cell.build["path"] for cell in cells))


def _curves(cells: Sequence[Cell], _seed: int) -> dict[str, np.ndarray]:
    """Return the accuracies of each model's training, (evaluation, step or accuracy)."""
    curves = {}
    for checkpoint in map(opened, _paths(cells)):
        points = checkpoint.card["curve"]
        curves[checkpoint.name] = np.array([[each["step"], each["correct"] / each["total"]] for each in points])
    return curves


TRAINED_RECALL = Claim(
    name="trained-recall",
    title="Recall and induction heads, trained",
    paper="",
    ours=(
        "Models of each mixer trained on MQAR, in a size meant to solve it and in one meant to be too small; the same"
        " layer of Mamba-1 trained with and without its convolution; and induction heads. Each card's accuracy is"
        " counted again, on rows that nothing has seen and on the card's own: a card that does not reproduce FAILS. How"
        " high an accuracy is, and what taking the convolution out does, is reported."
    ),
    cells=cells,
    measures={"without conv": _without_rows, **recount.MEASURES},
    curves=_curves,
    absent=_absent,
    draw=draw,
    caption=(
        "Left: accuracy on unseen rows, channels of a layer x states of a channel; Wilson intervals, chance as a black"
        " mark; then models trained with a convolution and run without it. Above right: accuracy against length,"
        " trained at the ringed one; stars: more pairs than trained on. Below right: accuracy on validation rows in"
        " training."
    ),
    left_out=(
        "A model that cannot tell which value belongs to the key may still name a value of the row: 1 of 8 pairs is"
        " 0.125, of 16 pairs 0.063, above chance.",
        "Without convolution means the identity: the current token passes. A convolution of zeros passes nothing at"
        " all, and would say only that.",
        "One training a model, at the best of the rates tried: accuracies hang on the rate and on the seed.",
    ),
)  # fmt: skip
