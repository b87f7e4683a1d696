"""What the figures of all claims share: a title above a legend above the data; bars of accuracies."""

from collections.abc import Callable, Sequence
from typing import Any

from mamba_probe.analyses.common import style
from mamba_probe.reproduce.table import AS_IT_MUST, FAILS, Row

__all__ = ["MIXER_LOOK", "bars", "finish", "nothing", "plain_ticks"]

MIXER_LOOK = {"Mamba-1": (style.REAL, "o"), "Mamba-2": ("#009E73", "^"), "S4D": (style.LTI, "s")}
LINE = 16  # points of a line of the legend


def finish(ax: Any, title: str, *, inside: str | None = None) -> None:
    """Put the legend outside, or at a corner inside; the title above; take off the frame above and on the right."""
    lines = 0
    if inside is not None:
        ax.legend(loc=inside, frameon=False, fontsize="small")
    elif ax.get_legend_handles_labels()[0]:
        style.legend_outside(ax)
        lines = -(-len(ax.get_legend().get_texts()) // 2)
    ax.set_title(title, loc="left", pad=8 + LINE * lines, fontsize="medium", fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)


def nothing(figure: Any, why: str) -> None:
    """Say why there is no picture."""
    figure.set_size_inches(6, 1.2)
    figure.text(0.5, 0.5, why, ha="center", va="center", color="0.35")


def plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Show these ticks alone, as plain numbers."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def bars(rows: Sequence[Row], label: Callable[[Row], str], ax: Any) -> int:
    """Draw an accuracy a line, with its interval and its null, in the colour of its mixer; what must fail is hatched.

    Rows of one table stand under its name. Returns the number of lines.
    """
    place, names, heading = 0, {}, None
    for row in rows:
        if row.table != heading:
            heading = row.table
            ax.text(0, place, heading.split(":")[0], va="center", fontsize="small", fontweight="bold")
            place += 1
        _bar(row, place, ax)
        names[place] = label(row)
        place += 1
    for mixer in (mixer for mixer in MIXER_LOOK if any(row.mixer == mixer for row in rows)):
        ax.barh(0, 0, color=MIXER_LOOK[mixer][0], label=mixer)
    if any(row.verdict == AS_IT_MUST for row in rows):
        ax.barh(0, 0, color="white", edgecolor="0.35", hatch="////", label="fails, as it must")
    ax.plot([], [], color="0.15", lw=2.0, label="null: randomised twin or chance")
    ax.set_yticks(list(names), list(names.values()), fontsize="small")
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1.0), ylim=(place - 0.4, -0.6), xlabel="accuracy, Wilson 95 %")
    return place


def _bar(row: Row, place: int, ax: Any) -> None:
    colour = MIXER_LOOK[row.mixer][0]
    must = row.verdict == AS_IT_MUST
    look = {"color": "white", "edgecolor": colour, "hatch": "////"} if must else {"color": colour}
    ax.barh(place, row.value, height=0.72, **look)
    ends = [[row.value - row.low], [row.high - row.value]]
    ax.errorbar(row.value, place, xerr=ends, color="0.15", capsize=2, lw=1.0)
    ax.plot([row.null] * 2, [place - 0.4, place + 0.4], color="0.15", lw=2.0)
    said = f"{row.value:.3f}" + ("  FAILS" if row.verdict == FAILS else "")
    ax.text(1.03, place, said, va="center", fontsize="small")
