"""Figure of the trained models between null and ideal: a table of how far along each is."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.finding import NO_CIRCUIT, OUTSIDE, way
from mamba_probe.reproduce.panel import nothing
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

CELL, WIDE, HIGH = (0.62, 0.3), 3.2, 2.6  # inches of a cell, of the names beside and above
RECALL = "Recall circuit"
SHORT = {"Recall circuit": "Recall circuit", "Memory horizon": "Horizon", "Wavelet": "Wavelet", "Hidden": "Attention"}
OUT, NONE = "#F5B971", "#EDEDED"


def draw(result: Result, figure: Any) -> None:
    """Draw a line a layer, a column a quantity; of 0 and 1 null and ideal."""
    rows = [row for row in result.rows if "layer" in row.sizes]
    if not rows:
        return nothing(figure, "no trained model in this installation")
    lines = list(dict.fromkeys((row.what, row.sizes["layer"]) for row in rows))
    order = list(dict.fromkeys(row.what for row in result.rows))
    lines.sort(key=lambda line: (order.index(line[0]), line[1]))
    columns = list(dict.fromkeys((row.table, row.quantity) for row in rows))
    figure.set_size_inches(WIDE + CELL[0] * len(columns), HIGH + CELL[1] * len(lines))
    ax = figure.add_subplot()
    at = {(row.what, row.sizes["layer"], row.table, row.quantity): row for row in rows}
    for y, line in enumerate(lines):
        for x, column in enumerate(columns):
            _cell(at.get((*line, *column)), x, y, ax)
    _reasons(result.rows, lines, columns, ax)
    _names(rows, lines, columns, ax)
    return None


def _reasons(rows: Sequence[Row], lines: list[tuple[str, int]], columns: list[tuple[str, str]], ax: Any) -> None:
    """Say across the columns where nothing is measured why."""
    scored = {row.what: row.sizes["layer"] for row in rows if "layer" in row.sizes and row.table.startswith(RECALL)}
    unsolved = {row.what for row in rows if row.verdict == NO_CIRCUIT}
    planted = {row.what for row in rows if not math.isnan(row.ideal)}
    width = sum(table.startswith(RECALL) for table, _ in columns)
    for y, (name, layer) in enumerate(lines):
        why = "no circuit: the task is not solved" if name in unsolved else "no pairs to choose from"
        why = f"scored in layer {scored[name]}" if name in scored else why
        if width and scored.get(name) != layer:
            _across(0, width, y, why, ax)
        if name not in planted:
            _across(width, len(columns), y, "no construction", ax)


def _across(start: int, end: int, y: int, why: str, ax: Any) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((start - 0.5, y - 0.5), end - start, 1, facecolor=NONE, edgecolor="white", lw=1.2))
    ax.text((start + end - 1) / 2, y, why, ha="center", va="center", fontsize="x-small", color="0.45",
            bbox={"facecolor": NONE, "edgecolor": "none", "pad": 1.5}, zorder=5)  # fmt: skip


def _cell(row: Row | None, x: int, y: int, ax: Any) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    along = math.nan if row is None else way(row.value, row.null, row.ideal)
    if row is None or math.isnan(along):
        colour, said = NONE, ""
    elif row.verdict == OUTSIDE:
        colour, said = OUT, _said(along)
    else:
        colour, said = matplotlib.colormaps["Blues"](0.08 + 0.6 * float(np.clip(along, 0, 1))), _said(along)
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=1.2))
    ax.text(x, y, said, ha="center", va="center", fontsize="x-small")


def _said(along: float) -> str:
    return f"{along:.2f}" if abs(along) < 10 else ("<-9" if along < 0 else ">9")


def _names(rows: Sequence[Row], lines: list[tuple[str, int]], columns: list[tuple[str, str]], ax: Any) -> None:
    solves = {row.what: row.sizes["solves"] == "yes" for row in rows}
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(lines) - 0.5, -0.5))
    labels = [f"{name.removeprefix('trained-')}, layer {layer}" for name, layer in lines]
    ax.set_yticks(range(len(lines)), labels, fontsize="small")
    for text, (name, _) in zip(ax.get_yticklabels(), lines, strict=True):
        text.set_style("normal" if solves[name] else "italic")
        text.set_color("black" if solves[name] else "0.45")
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(columns)), [quantity for _, quantity in columns], rotation=40, ha="left", fontsize="small")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    groups = [table for table, _ in columns]
    for x in range(1, len(columns)):
        if groups[x] != groups[x - 1]:
            ax.axvline(x - 0.5, color="0.35", lw=1.2)
    for table in dict.fromkeys(groups):
        middle = float(np.mean([x for x, each in enumerate(groups) if each == table]))
        title = next(short for start, short in SHORT.items() if table.startswith(start))
        ax.text(middle, len(lines) - 0.3, title, ha="center", va="top", fontsize="x-small", fontweight="bold")
