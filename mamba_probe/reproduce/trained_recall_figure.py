"""Figure of the trained models that recall."""

from typing import Any

from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.panel import MIXER_LOOK, bars, finish, nothing, plain_ticks
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

LINE, LEAST = 0.24, 7.0  # inches of a bar and of the whole figure
STYLES = ("-", "--", ":", "-.")


def draw(result: Result, figure: Any) -> None:
    """Draw the accuracies, those beyond the trained length, and the curves of training."""
    shown = [row for row in result.rows if row.table.startswith(("Accuracy on unseen", "The convolution"))]
    if not shown:
        return nothing(figure, "no model trained on mqar or induction in this installation")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1))
    left = figure.add_subplot(grid[:, 0])
    lines = bars(shown, _label, left)
    figure.set_size_inches(13, max(LEAST, 1.6 + LINE * lines))
    finish(left, "Accuracy")
    above, below = (figure.add_subplot(grid[place, 1]) for place in range(2))
    _beyond(result.rows, above)
    finish(above, "Beyond the trained length")
    _trainings(result, below)
    finish(below, "In training")
    return None


def _label(row: Row) -> str:
    sizes = row.sizes
    asked = f"{sizes['pairs']} pairs" if "pairs" in sizes else "induction"
    layers = f"{sizes['layers']} layer{'s' if sizes['layers'] > 1 else ''}"
    taps = ", no conv" if sizes["taps"] == 1 else ""
    return (
        f"{row.what.removeprefix('trained-')}: {asked}, {layers}, {sizes['channels']} ch. x {sizes['states']} st.{taps}"
    )


def _beyond(rows: list[Row], ax: Any) -> None:
    trained = {row.what: row for row in rows if row.table.startswith("Accuracy on unseen")}
    further = [row for row in rows if row.table.startswith("Accuracy beyond")]
    looks = _looks([row for row in trained.values() if any(each.what == row.what for each in further)])
    lengths = set()
    for name, look in looks.items():
        own, colour = trained[name], MIXER_LOOK[trained[name].mixer][0]
        pairs = own.sizes.get("pairs")
        here = sorted(
            (row for row in (own, *further) if row.what == name and row.sizes.get("pairs") == pairs),
            key=lambda row: row.sizes["T"],
        )
        at, value = [row.sizes["T"] for row in here], [row.value for row in here]
        lengths |= set(at)
        label = name.removeprefix("trained-")
        ax.plot(at, value, look, color=colour, marker=MIXER_LOOK[own.mixer][1], ms=4, lw=1.2, label=label)
        ax.plot([own.sizes["T"]], [own.value], "o", color=colour, mfc="none", ms=11)
        for row in further:
            if row.what == name and row.sizes.get("pairs") != pairs:
                ax.plot([row.sizes["T"]], [row.value], "*", color=colour, mfc="none", ms=10)
    for more in sorted({row.sizes["pairs"] for row in further if row.sizes.get("pairs") != _pairs(trained, row)}):
        ax.plot([], [], "*", color="0.35", mfc="none", ms=10, label=f"{more} pairs")
    if lengths:
        ax.set(xscale="log", xlabel="tokens T", ylabel="accuracy", ylim=(-0.03, 1.06))
        plain_ticks(ax.xaxis, sorted(lengths))


def _pairs(trained: dict[str, Row], row: Row) -> int | None:
    return trained[row.what].sizes.get("pairs")


def _trainings(result: Result, ax: Any) -> None:
    trained = [row for row in result.rows if row.table.startswith("Accuracy on unseen")]
    for name, look in _looks(trained).items():
        curve = result.curves[name]
        mixer = next(row.mixer for row in trained if row.what == name)
        ax.plot(curve[:, 0], curve[:, 1], look, color=MIXER_LOOK[mixer][0], lw=1.2, label=name.removeprefix("trained-"))
    ax.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.06))


def _looks(rows: list[Row]) -> dict[str, str]:
    """A line style each, so that models of one mixer differ."""
    found: dict[str, str] = {}
    for mixer in MIXER_LOOK:
        names = list(dict.fromkeys(row.what for row in rows if row.mixer == mixer))
        found |= {name: STYLES[place % len(STYLES)] for place, name in enumerate(names)}
    return found
