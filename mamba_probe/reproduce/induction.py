"""Induction heads in planted weights: what followed a token the last time follows it again."""

from functools import partial
from itertools import product
from typing import Any

from mamba_probe import tasks
from mamba_probe.constructions import induction
from mamba_probe.reproduce.accuracy import accuracy_rows
from mamba_probe.reproduce.claim import Claim, Result
from mamba_probe.reproduce.panel import bars, finish
from mamba_probe.reproduce.table import Cell, Criterion, Row

__all__ = ["INDUCTION", "cells"]

SPECIAL = "After a special token, asked at its last occurrence"
EVERY = "After every token, asked wherever it came before"

TIMES = ((64, 1, 64), (256, 1, 64), (256, 4, 64), (1024, 8, 64), (16384, 4, 8))
"""Tokens, occurrences before the last one, sequences."""
SIZES = ((16, 64, 32), (16, 512, 8), (32, 512, 8))
"""Token ids, tokens, sequences."""
EXACT = Criterion("=", 1)
COUNTS = Criterion("<", 0.9, must_fail=True)
"""Of a time-invariant layer that is asked what came last: it counts what ever followed."""
MIXERS = ("mamba1", "mamba2", "s4d")


def cells() -> tuple[Cell, ...]:
    """Return the tables as data; the longest in float32 alone."""
    special = [
        Cell(
            SPECIAL, "special", COUNTS if mixer == "s4d" and times > 1 else EXACT,
            {"kind": "special", "mixer": mixer, "n_tokens": 16, "dtype": dtype},
            {"batch": batch, "length": length, "occurrences": times, "vocab": 16},
        )
        for mixer, (length, times, batch), dtype in product(MIXERS, TIMES, ("float32", "float64"))
        if dtype == "float32" or length <= 1024
    ]  # fmt: skip
    every = [
        Cell(
            EVERY, "every", COUNTS if mixer == "s4d" else EXACT,
            {"kind": "every", "mixer": mixer, "n_tokens": vocab, "dtype": dtype},
            {"batch": batch, "length": length, "vocab": vocab},
        )
        for mixer, (vocab, length, batch), dtype in product(MIXERS, SIZES, ("float32", "float64"))
    ]  # fmt: skip
    return (*special, *every)


def _named(cell: Cell) -> str:
    return "the token after a special one" if cell.how == "special" else "the token after each"


def _draw(result: Result, figure: Any) -> None:
    shown = [row for row in result.rows if row.dtype == "float32"]
    ax = figure.add_subplot()
    figure.set_size_inches(9.5, 1.8 + 0.24 * bars(shown, _label, ax))
    finish(ax, "Accuracy, float32")


def _label(row: Row) -> str:
    times = row.sizes.get("occurrences")
    before = f", {times} before" if times else ""
    return f"T = {row.sizes['T']}, {row.sizes['tokens']} token ids{before}"


_SHOWN = {"length": "T", "occurrences": "occurrences", "vocab": "tokens"}
_measure = partial(accuracy_rows, builder=induction, named=_named, shown=_SHOWN)

INDUCTION = Claim(
    name="induction",
    title="Induction heads",
    paper="",
    ours=(
        "Language models with planted weights predict the token that followed the current one when it came last: one"
        " layer for a special token; for every token one Mamba-1 layer, or two Mamba-2 layers, whose delta does not see"
        " the previous token. An S4D layer counts all that ever followed: right if the token came once, wrong if more."
    ),
    cells=cells,
    measures={
        "special": partial(_measure, task_of=tasks.induction),
        "every": partial(_measure, task_of=tasks.induction_every_token),
    },
    draw=_draw,
    caption="Accuracy, Wilson intervals, and the null of each model as a black mark.",
    left_out=("That one Mamba-2 layer cannot answer at every token is not proved.",),
)  # fmt: skip
