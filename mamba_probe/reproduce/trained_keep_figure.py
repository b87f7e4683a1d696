"""Figure of the trained models that keep a token."""

import math
from typing import Any

import numpy as np

from mamba_probe.analyses.common import style
from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.panel import MIXER_LOOK, finish, nothing, plain_ticks
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

SIDES: dict[str, dict[str, Any]] = {
    "before": {"color": "#E69F00", "fill": True, "alpha": 0.45}, "at": {"color": "0.15", "ls": "--", "lw": 1.0},
    "after": {"color": style.REAL, "lw": 1.8},
}  # fmt: skip
AFTER, KEPT = "mean decay after n", ", states keeping n"
MARKERS = {"before": "o", "at": "D", "after": "v"}


def draw(result: Result, figure: Any) -> None:
    """Draw the histograms of each model and, against T, the mean decays, gamma and the accuracy."""
    rows = [row for row in result.rows if row.quantity == AFTER]
    if not rows:
        return nothing(figure, "no model trained on keep_nth in this installation")
    lengths = sorted({row.sizes["T"] for row in rows})
    mixers = [mixer for mixer in MIXER_LOOK if any(row.mixer == mixer for row in rows)]
    wide = max(3, len(lengths))
    figure.set_size_inches(3.9 * wide, 3.1 * len(mixers) + 3.6)
    parts = figure.subfigures(2, 1, height_ratios=(3.1 * len(mixers), 3.6))
    axes = parts[0].subplots(len(mixers), len(lengths), squeeze=False, sharex=True)
    for line, mixer in zip(axes, mixers, strict=True):
        for ax, length in zip(line, lengths, strict=True):
            _histogram(result, mixer, length, ax)
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(0.03, 0.98), frameon=False, fontsize="small")
    below = parts[1].subplots(1, 3)
    _forgotten(result.rows, below[0])
    _against(result.rows, "gamma: mean after n less mean up to n", below[1], ideal=1.0)
    _accuracies(result.rows, below[2])
    titles = ("What a step forgets, states that keep n", "Gamma, all states of the last layer", "Accuracy, unseen rows")
    for ax, title in zip(below, titles, strict=True):
        ax.set(xscale="log", xlabel="tokens T")
        plain_ticks(ax.xaxis, lengths)
        finish(ax, title)
    for ax in below[1:]:
        ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.08)
    return None


def _histogram(result: Result, mixer: str, length: int, ax: Any) -> None:
    """The last layer is the one that sees the first's output, and with it where in the sequence it is."""
    here = [row for row in _last(result.rows, AFTER) if (row.mixer, row.sizes["T"]) == (mixer, length)]
    answered = {row.what: row for row in result.rows if row.table.startswith("Accuracy on unseen")}
    ax.set_title(f"{mixer}, T = {length}: " + ("" if here else "absent"), loc="left", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=r"$\exp(A\,\Delta_t)$", ylabel="share of steps")
    for row in here:
        shares, null = (result.curves[f"{which} {row.what}"][-1] for which in ("trained", "twin"))
        edges = np.linspace(0, 1, shares.shape[-1] + 1)
        ax.stairs(null[2], edges, color=style.NULL, lw=1.0, ls=":", label="untrained, after")
        for (side, look), share in zip(SIDES.items(), shares, strict=True):
            ax.stairs(share, edges, label=f"{side} n", **look)
        accuracy = f"accuracy {answered[row.what].value:.2f}" if row.what in answered else "accuracy not counted"
        lengths = row.sizes["lengths trained on"]
        seen = f"{lengths} lengths mixed" if lengths > 1 else "this length alone"
        ax.set_title(f"{mixer}, T = {length}: {accuracy}\ntrained on {seen}", loc="left", fontsize="medium")


def _last(rows: list[Row], quantity: str) -> list[Row]:
    """The rows of the last layer of each model."""
    found = {row.what: row for row in rows if row.quantity == quantity}
    return sorted(found.values(), key=lambda row: row.sizes["T"])


def _forgotten(rows: list[Row], ax: Any) -> None:
    """One less the mean decay; 90 % of a write last m steps only if they forget -ln(0.9) / m each on average."""
    for mixer, (colour, _) in MIXER_LOOK.items():
        for event, marker in MARKERS.items():
            here = [row for row in _last(rows, f"mean decay {event} n{KEPT}") if row.mixer == mixer]
            at, lost = [row.sizes["T"] for row in here], [1 - row.value for row in here]
            look = {"color": colour, "mfc": colour if event == "after" else "none", "lw": 1.0, "ms": 6}
            if here:
                ax.plot(at, lost, f"{marker}-", label=f"{mixer}, {event} n", **look)
    some = _last(rows, AFTER)
    allowed = sorted({row.sizes["T"]: -math.log(0.9) / (row.sizes["T"] - 1 - row.sizes["n"]) for row in some}.items())
    ax.plot(*zip(*allowed, strict=True), "_:", color="0.35", ms=12, lw=1.0, label="allowed after n")
    ax.set(yscale="log", ylabel=r"$1 - $ mean $\exp(A\,\Delta_t)$")


def _against(rows: list[Row], quantity: str, ax: Any, *, ideal: float) -> None:
    for mixer, (colour, marker) in MIXER_LOOK.items():
        here = [row for row in _last(rows, quantity) if row.mixer == mixer]
        if here:
            at, value = [r.sizes["T"] for r in here], [r.value for r in here]
            ends = [[r.value - r.low for r in here], [r.high - r.value for r in here]]
            ax.errorbar(at, value, yerr=ends, fmt=marker + "-", color=colour, lw=1.0, ms=5, capsize=2, label=mixer)
            ax.plot(at, [r.null for r in here], "x", color=colour, ms=6, zorder=5)
    ax.plot([], [], "x", color="0.35", label="untrained")
    ax.axhline(ideal, color="0.35", ls="--", lw=1.0, label="construction")


def _accuracies(rows: list[Row], ax: Any) -> None:
    counted = [row for row in rows if row.quantity == "accuracy" and row.table.startswith("Accuracy on unseen")]
    for mixer, (colour, marker) in MIXER_LOOK.items():
        here = sorted((row for row in counted if row.mixer == mixer), key=lambda row: row.sizes["T"])
        if here:
            ends = [[r.value - r.low for r in here], [r.high - r.value for r in here]]
            at = [r.sizes["T"] for r in here]
            look = {"color": colour, "lw": 1.0, "ms": 5, "capsize": 2, "label": mixer}
            ax.errorbar(at, [r.value for r in here], yerr=ends, fmt=marker + "-", **look)
    for null in {row.null for row in counted}:
        ax.axhline(null, color="0.35", ls=":", lw=1.0, label="chance")
