"""The circuit as it was found: which layer, channels and states shift, write, retain, match, gate and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.recall_circuit.distance import distance
from mamba_probe.analyses.recall_circuit.verdict import after

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PARTS", "Part", "diagram", "listed", "parts", "ranges"]

MOST = 0.9
"""Share of what runs through a set of channels, states or heads for it to be named."""


@dataclass(frozen=True)
class Part:
    """A box: its name, what it does, or does not, the signatures that may measure it (the first one measured counts),
    and edits.

    `through` names the variable that says which channels or states it runs through.
    """

    name: str
    does: str
    fails: str
    signatures: tuple[str, ...]
    edits: tuple[str, ...]
    through: str
    column: int
    row: int


SHIFTS = ("S11_B", "S10_rel", "S11_x", "S10_x1")
PARTS = (
    Part("shift", "the key comes to the write", "the key does not come to the write",
         SHIFTS, ("ablate(conv)",), "shifted", 0, 0),
    Part("write", "pairs are written, others not", "pairs are not singled out",
         ("S7",), ("freeze(B)", "freeze(delta)"), "carried", 1, 0),
    Part("retain", "the write lasts to the query", "the write fades before the query",
         ("S4",), ("ablate(decay)",), "carried", 2, 0),
    Part("match", "the query finds its pair", "the query does not find its pair",
         ("S6", "S13"), ("freeze(C)",), "matched", 0, 1),
    Part("gate", "keys and queries open it", "keys do not open it more",
         ("S9",), ("ablate(gate)",), "carried", 1, 1),
    Part("read out", "the write names the value", "the write does not name the value",
         ("S3",), (), "carried", 2, 1),
)  # fmt: skip
WIDTH, HEIGHT, GAP = 0.285, 0.33, 0.05


def diagram(result: xr.Dataset, ax: "Axes | None" = None, *, layer: int | None = None) -> "Axes":
    """Draw the circuit found in one layer, from measurements alone.

    A box is drawn for each part that a signature measures: its value and null, the causal shares of the edits that take
    the part out, and the channels, heads or states that 90 % of it runs through; intervals are in `plot`. A box in
    colour lies nearer to the construction than to its null, a dashed grey one does not.

    Args:
        result: of `measure`.
        ax: where to draw; None: new axes.
        layer: the model's own layer number; None: the one with the largest S1.

    Raises:
        ValueError: `layer` is not in the result, or it is a result of another analysis.
    """
    style.check(result, "recall_circuit")
    result, panel = result.compute(), style.axes(ax)
    panel.set_axis_off()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    if not bool(result["solved"]):
        head, _, reason = result.attrs["verdict"].partition(": ")
        text = f"{head.capitalize()}: nothing to draw\n{fill(reason, 60)}"
        panel.text(0.5, 0.5, text, ha="center", va="center", color="0.35")
        return panel
    if layer is not None and layer not in result["layer"].values:
        raise ValueError(f"layer {layer} is not in the result; it holds {result['layer'].values.tolist()}")
    shown = result["layer"].values[int(result["strongest"].values.argmax())] if layer is None else layer
    drawn = parts(result, int(shown))
    for part, lines, near in drawn:
        _box(panel, part, lines, near)
    _arrows(panel, [part for part, _, _ in drawn])
    _caption(panel, result, int(shown))
    return panel


def parts(result: xr.Dataset, layer: int) -> list[tuple[Part, list[str], bool]]:
    """The parts measured in a layer: each with its lines of text, and whether it is nearer to ideal than to null."""
    table, one, found = distance(result).sel(layer=layer), result.sel(layer=layer), []
    for part in PARTS:
        known = [name for name in part.signatures if np.isfinite(table["measured"].sel(signature=name).item())]
        if not known:
            continue
        row = table.sel(signature=known[0])
        near = bool(row["distance"].item() < 0.5)
        measured = [_measured(known[0], row), *_caused(result, part.edits), *_through(one, part.through)]
        found.append((part, [part.does if near else part.fails, *measured], near))
    return found


def _measured(name: str, row: xr.Dataset) -> str:
    """A signature's value and null."""
    return f"{name.replace('_', ' ')} = {row['measured'].item():.2f} (null {row['null'].item():.2f})"


def _caused(result: xr.Dataset, edits: Sequence[str]) -> list[str]:
    """A line for each edit of the part that was made."""
    if "causal_share" not in result:
        return []
    made = [name for name in edits if name in result["intervention"].values]
    return [f"{name} takes {result['causal_share'].sel(intervention=name).item():.2f}" for name in made]


def _through(one: xr.Dataset, name: str) -> list[str]:
    """What 90 % of the part runs through: the fewest channels, heads or states."""
    if name not in one or not np.isfinite(one[name]).any() or one[name].sum() == 0:
        return []
    share = one[name].values.ravel()
    order = np.argsort(-share, kind="stable")
    count = int(np.searchsorted(np.cumsum(share[order]), MOST * share.sum() * (1 - 1e-9)) + 1)
    dim = str(one[name].dims[-1])
    labels = one[dim].values if dim in one.coords and one[name].ndim == 1 else np.arange(len(share))
    chosen = np.sort(labels[order[:count]])
    return [f"{count} of {len(share)} {dim}s:", listed(chosen.tolist())]


def ranges(numbers: Sequence[int]) -> list[str]:
    """Increasing numbers as ranges.

    >>> ranges([1, 2, 3, 7, 9, 10])
    ['1-3', '7', '9-10']
    """
    ends = [i for i in range(len(numbers)) if i + 1 == len(numbers) or numbers[i + 1] != numbers[i] + 1]
    starts = [0, *(i + 1 for i in ends[:-1])]
    pairs = zip(starts, ends, strict=True)
    return [str(numbers[a]) if a == b else f"{numbers[a]}-{numbers[b]}" for a, b in pairs]


def listed(numbers: Sequence[int], most: int = 2) -> str:
    """Ranges of numbers, the first few of them.

    >>> listed([1, 3, 5, 7])
    '1, 3, ...'
    """
    all_of_them = ranges(numbers)
    return ", ".join(all_of_them[:most]) + (", ..." if len(all_of_them) > most else "")


def _corner(part: Part) -> tuple[float, float]:
    return 0.02 + part.column * (WIDTH + GAP), 0.53 - part.row * (HEIGHT + 0.07)


def _box(ax: "Axes", part: Part, lines: list[str], near: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = _corner(part)
    colour = style.REAL if near else style.NULL
    look = {"facecolor": colour + "1a", "edgecolor": colour, "linestyle": "-" if near else "--", "linewidth": 1.3}
    ax.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.015", **look))
    ax.text(x + WIDTH / 2, y + HEIGHT - 0.02, part.name, ha="center", va="top", weight="bold")
    ax.text(
        x + WIDTH / 2, y + HEIGHT - 0.08, "\n".join(lines), ha="center", va="top", fontsize="small", linespacing=1.25
    )


def _arrows(ax: "Axes", drawn: list[Part]) -> None:
    """From each part to the next one drawn, in the order of the computation."""
    for one, other in pairwise(drawn):
        (x, y), (to_x, to_y) = _corner(one), _corner(other)
        start, end = (x + WIDTH, y + HEIGHT / 2), (to_x, to_y + HEIGHT / 2)
        if one.row != other.row:
            end = (to_x + WIDTH / 2, to_y + HEIGHT)
            start, between = (end[0], (y + end[1]) / 2), x + WIDTH / 2
            ax.plot([between, between, start[0]], [y, start[1], start[1]], color="0.3", linewidth=1.5)
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0})


def _caption(ax: "Axes", result: xr.Dataset, layer: int) -> None:
    one = result.sel(layer=layer)
    model = f"{result.attrs['model']}, " if result.attrs.get("model") else ""
    pair = one.sel(signature="S1")
    head = f"{model}layer {layer}, written {after(one['offset'].item())}"
    score = f"pair accuracy S1 = {pair['value'].item():.2f} (null {pair['null'].item():.2f}), task accuracy "
    ax.text(0.02, 0.985, head, va="top", weight="bold")
    ax.text(0.02, 0.925, score + f"{result['accuracy'].item():.2f}", va="top", fontsize="small", color="0.3")
    note = (
        "Colour: nearer to the closed-form circuit than to the null; dashed grey: not. An edit 'takes' a share of the\n"
        "accuracy above chance. Channels, heads, states: the fewest that carry 90 %. Unmeasured parts are not drawn."
    )
    ax.text(0.02, 0.005, note, va="bottom", fontsize="x-small", color="0.35")
