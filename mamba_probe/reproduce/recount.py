"""Each card's accuracy, counted again: on rows that nothing has seen, and on the card's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int

from mamba_probe.reproduce.table import Cell, Criterion, Row, counted
from mamba_probe.reproduce.trained import FRESH, Checkpoint, answers, opened
from mamba_probe.training import RECIPES, Config, held_out

__all__ = ["MEASURES", "accuracies", "apart", "uncounted"]

UNSEEN = "Accuracy on unseen rows, beside the card's"
AGAIN = "Accuracy on the card's own rows"
BEYOND = "Accuracy beyond the trained task, beside the card's"

NEAR = Criterion("<=", 4.0)  # standard errors between two counts of one accuracy
SAME = Criterion("<=", 1e-3)  # of the queries, which a GPU and a CPU may round to different answers
FEWEST = 4  # sequences that an accuracy is counted over
WORK = 2**28  # numbers of the states that a recount may take, as `Checkpoint.work` counts


def accuracies(checkpoints: Sequence[Checkpoint]) -> list[Cell]:
    """Return the cells that count the cards of these checkpoints again."""
    unseen = [Cell(UNSEEN, "unseen", NEAR, {"path": each.path}) for each in checkpoints]
    again = [Cell(AGAIN, "again", SAME, {"path": each.path}) for each in checkpoints if _affordable(each)]
    beyond = [
        Cell(BEYOND, "beyond", NEAR, {"path": each.path}, {"place": place})
        for each in checkpoints
        for place, card in enumerate(each.card["beyond"])
        if _countable(each, card)
    ]
    return unseen + again + beyond


def uncounted(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Say which of the cards' numbers take too long to be counted again here."""
    return tuple(
        f"Not counted again: {each.name} at {card['task']}, where the card says {card['correct']} of {card['total']}."
        for each in checkpoints
        for card in each.card["beyond"]
        if not _countable(each, card)
    )


def _countable(checkpoint: Checkpoint, card: Mapping[str, Any]) -> bool:
    drawn = replace(checkpoint.config, batch=1, task={**checkpoint.config.task, **card["task"]}, mixture=())
    return checkpoint.work(FEWEST * drawn.draw(1, 0).input_ids.shape[1]) <= WORK


def apart(card: Mapping[str, Any], counts: Int[np.ndarray, "row count=2"]) -> float:
    """Return how many standard errors lie between a card's accuracy and a recount.

    z = |p - q| / sqrt(f r (1 - r) (1 / m + 1 / n)), with r the pooled share (one answer right and one wrong added) and
    f >= 1 the variance between rows over that of independent queries, since the queries of a row share it. Ours.

    >>> round(apart({"correct": 90, "total": 100, "value": 0.9}, np.array([[8, 10]] * 10)), 2)
    1.96
    """
    correct, total = (int(each) for each in counts.sum(0))
    pooled = (card["correct"] + correct + 1) / (card["total"] + total + 2)
    variance = pooled * (1 - pooled)
    shares, asked = counts[:, 0] / counts[:, 1], counts[:, 1].mean()
    together = max(1.0, float(shares.var()) * asked / variance)
    error = math.sqrt(together * variance * (1 / card["total"] + 1 / total))
    return abs(card["value"] - correct / total) / error


def _affordable(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    tokens = checkpoint.card["accuracy"]["batches"] * config.batch * config.draw(1, 0).input_ids.shape[1]
    return checkpoint.work(tokens) <= 4 * WORK


def _unseen_rows(cell: Cell, seed: int) -> list[Row]:
    checkpoint = opened(cell.build["path"])
    row = _compared(cell, checkpoint, checkpoint.config, checkpoint.card["accuracy"], seed)
    recipe = RECIPES.get(checkpoint.name)
    meant = "" if recipe is None else "{:g} .. {:g}".format(*recipe.expected)
    return [replace(row, sizes=row.sizes | {"recipe is for": meant})]


def _beyond_rows(cell: Cell, seed: int) -> list[Row]:
    checkpoint = opened(cell.build["path"])
    card = checkpoint.card["beyond"][cell.task["place"]]
    config = replace(checkpoint.config, task={**checkpoint.config.task, **card["task"]}, mixture=())
    return [_compared(cell, checkpoint, config, card, seed)]


def _compared(cell: Cell, checkpoint: Checkpoint, config: Config, card: Mapping[str, Any], seed: int) -> Row:
    """Count as many unseen batches as the card, or as are affordable: a part of one, if one is too much."""
    length = config.draw(1, 0).input_ids.shape[1]
    rows = max(FEWEST, min(config.batch, WORK // checkpoint.work(length)))
    batches = max(1, min(card["batches"], WORK // checkpoint.work(rows * length)))
    drawn = replace(config, batch=rows)
    tasks = [held_out(drawn, "test", FRESH * (seed + 1) + index) for index in range(batches)]
    counts = answers(checkpoint.engine, tasks)
    distance = apart(card, counts)
    over = f"{len(counts)} sequences, {counts[:, 1].sum()} queries; the card's {card['total']}"
    how = "forward of our blocks, the largest logit; standard errors with the spread between sequences"
    row = _row(cell, checkpoint, config, card, counts, over, how)
    return replace(row, criterion=NEAR.text("standard errors from the card's"), verdict=NEAR.verdict(distance))


def _again_rows(cell: Cell, seed: int) -> list[Row]:
    """The test rows that the card was counted on: all that differs is the device."""
    checkpoint = opened(cell.build["path"])
    config, card = checkpoint.config, checkpoint.card["accuracy"]
    counts = answers(checkpoint.engine, (held_out(config, "test", index) for index in range(card["batches"])))
    differ = abs(int(counts[:, 0].sum()) - card["correct"])
    over = f"{len(counts)} sequences, {counts[:, 1].sum()} queries, {differ} counted otherwise than by the card"
    row = _row(cell, checkpoint, config, card, counts, over, "forward of our blocks on a CPU, the largest logit")
    judged = SAME.verdict(differ / card["total"]) if counts[:, 1].sum() == card["total"] else SAME.verdict(math.nan)
    return [replace(row, criterion=SAME.text("share counted otherwise"), verdict=judged)]


def _row(
    cell: Cell, checkpoint: Checkpoint, config: Config, card: Mapping[str, Any],
    counts: Int[np.ndarray, "row count=2"], over: str, how: str,
) -> Row:  # fmt: skip
    few = held_out(replace(config, batch=2), "test", FRESH)
    answer = few.answers
    assert answer is not None
    said = checkpoint.said
    drawn = few.params
    sizes = said["sizes"] | {new: drawn[old] for old, new in (("length", "T"), ("n_pairs", "pairs")) if old in drawn}
    sizes |= {"card": card["value"], "card low": card["low"], "card high": card["high"]}
    return counted(
        cell, (int(counts[:, 0].sum()), int(counts[:, 1].sum())), estimator=how, over=over, null=1 / len(answer),
        null_is=f"chance, 1 of {len(answer)}", **said | {"sizes": sizes},
    )  # fmt: skip


MEASURES = {"unseen": _unseen_rows, "again": _again_rows, "beyond": _beyond_rows}
"""The measurements by the names that these cells use."""
