"""Figure of the recall claim."""

from collections.abc import Sequence
from typing import Any

from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.panel import MIXER_LOOK, bars, finish, plain_ticks
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

CODES = {"one-hot": "-", "constant-weight": "--"}
LINE, LEAST = 0.22, 7.0  # inches of a bar and of the whole figure


def draw(result: Result, figure: Any) -> None:
    """Draw the accuracies, of the sizes the largest of each kind, and the sizes that each mixer needs."""
    single = [row for row in result.rows if row.dtype == "float32"]
    sizes = [row for row in single if row.table == single[0].table]
    largest = {(row.mixer, row.what): row for row in sizes}
    shown = [*largest.values(), *single[len(sizes) :]]
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1))
    left = figure.add_subplot(grid[:, 0])
    lines = bars(shown, _label, left)
    figure.set_size_inches(12, max(LEAST, 1.6 + LINE * lines))
    finish(left, "Accuracy, float32")
    for place, (size, title) in enumerate((("states", "States a channel"), ("channels", "Channels of the layer"))):
        ax = figure.add_subplot(grid[place, 1])
        _sizes(sizes, size, ax)
        finish(ax, title, inside="upper left")


def _label(row: Row) -> str:
    vocabulary = f", vocabulary {row.sizes['vocab']}" if row.what.endswith("keys") else ""
    return f"{row.what}, {row.sizes['pairs']} pairs{vocabulary}"


def _sizes(rows: Sequence[Row], size: str, ax: Any) -> None:
    for mixer, (colour, marker) in MIXER_LOOK.items():
        for code, line in CODES.items():
            here = [row for row in rows if row.mixer == mixer and row.what.startswith(code)]
            keys = [row.sizes["vocab"] // 2 - 1 for row in here]
            hollow = {"mfc": "none", "ms": 9} if mixer == "Mamba-1" else {"ms": 5}
            look = {"color": colour, "ls": line, "marker": marker, "lw": 1.2, **hollow}
            if here:
                ax.plot(keys, [row.sizes[size] for row in here], label=f"{mixer}, {code}", **look)
    ax.set(xscale="log", yscale="log", xlabel="keys of the vocabulary", ylabel=size)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.9)  # room for the legend
    plain_ticks(ax.xaxis, sorted({row.sizes["vocab"] // 2 - 1 for row in rows}))
