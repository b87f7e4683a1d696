"""What a claim is made of: what the paper says, what we built, the cells of its tables, their measurement, a figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter
from typing import Any

import numpy as np

from mamba_probe.reproduce.table import Cell, Row

__all__ = ["PAPER", "Claim", "Result", "run"]

PAPER = "arXiv 2506.11891"
"""The publication whose abstract makes the claims; nothing beyond the abstract is attributed to it."""

Say = Callable[[str], None]
Measure = Callable[[Cell, int], list[Row]]


@dataclass(frozen=True)
class Result:
    """The rows of one claim, what its figure needs beside them, and how long they took.

    Arguments:
        claim: its name.
        rows: every measurement.
        curves: arrays that are drawn and are no rows: kernels, profiles.
        seed: of every draw.
        seconds: of the measurements, the figure left out.
        left_out: what is not in the tables, and why.
        says: what was found, in sentences.
    """

    claim: str
    rows: list[Row]
    seed: int
    seconds: float
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One claim.

    Arguments:
        name: of its files: "haar", "keep".
        title: heading on the page.
        paper: what the abstract says, in words close to its own; empty where it says nothing.
        ours: what we constructed and measured.
        cells: makes the tables, as data.
        measures: the measurements by the names that cells use.
        draw: draws a result into a matplotlib Figure.
        caption: how to read the figure.
        left_out: what is not in the tables, and why.
        curves: makes what the figure needs beside the rows, from cells and seed; None if that is nothing.
        absent: says of cells what they lack, to be left out too; None if they never lack anything.
        says: makes of the rows sentences of what was found; None where the verdicts say it.
    """

    name: str
    title: str
    paper: str
    ours: str
    cells: Callable[[], tuple[Cell, ...]]
    measures: dict[str, Measure]
    draw: Callable[[Result, Any], None]
    caption: str
    left_out: tuple[str, ...] = ()
    curves: Callable[[Sequence[Cell], int], dict[str, np.ndarray]] | None = None
    absent: Callable[[Sequence[Cell]], tuple[str, ...]] | None = None
    says: Callable[[Sequence[Row]], tuple[str, ...]] | None = None


def run(claim: Claim, cells: Sequence[Cell] | None = None, *, seed: int = 0, say: Say = lambda _: None) -> Result:
    """Measure the cells of a claim, table by table.

    Arguments:
        claim: which.
        cells: measured in the place of the claim's own.
        seed: of every draw and of the randomised twins.
        say: told of each table as it begins.

    Raises:
        ValueError: no cells given, or a cell that names no measurement of the claim.
    """
    given = cells is None or len(cells) > 0
    cells = claim.cells() if cells is None else tuple(cells)
    unknown = sorted({cell.how for cell in cells} - set(claim.measures))
    if unknown or not given:
        came = f"{', '.join(map(repr, unknown))}" if unknown else "no cell at all"
        raise ValueError(f"{claim.name} measures {', '.join(claim.measures)}; got {came}")
    began, rows = perf_counter(), []
    for heading, group in groupby(cells, key=lambda cell: cell.table):
        here = list(group)
        say(f"{claim.name}: {heading} ({len(here)} cells)")
        rows += [row for cell in here for row in claim.measures[cell.how](cell, seed)]
    curves = {} if claim.curves is None else claim.curves(cells, seed)
    lacking = () if claim.absent is None else claim.absent(cells)
    says = () if claim.says is None else claim.says(rows)
    return Result(claim.name, rows, seed, perf_counter() - began, curves, (*claim.left_out, *lacking), says)
