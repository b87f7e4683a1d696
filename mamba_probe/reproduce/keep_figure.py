"""Figure of the memory claim."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common import style
from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.panel import finish, plain_ticks
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

PROFILES = {"ramp": (style.REAL, "o"), "event": ("#E69F00", "s")}
LENGTHS = {64: ("#E69F00", "v"), 256: ("#CC79A7", "s"), 1024: (style.LTI, "D")}


def draw(result: Result, figure: Any) -> None:
    """Draw the profile of decay, the horizons, the errors and the limits of time-invariant states."""
    figure.set_size_inches(11, 8)
    axes = figure.subplots(2, 2)
    for profile, look in PROFILES.items():
        _profile(result.curves[f"decay {profile}"], profile, look, axes[0, 0])
        _horizon(result, profile, look, axes[0, 1])
    axes[0, 0].set(xlabel="token (n = 32)", ylabel=r"$\exp(A\,\Delta_t)$", ylim=(-0.06, 1.06))
    axes[0, 1].set(xlabel="token written (n = 32)", ylabel="tokens until 1/e", yscale="log")
    plain_ticks(axes[0, 1].yaxis, [1, 2, 5, 10, 20, 30])
    _errors([row for row in result.rows if row.quantity == "error" and "T" in row.sizes], axes[1, 0])
    _limits([row for row in result.rows if row.quantity == "relative L2 error"], axes[1, 1])
    titles = ("Decay of each step", "Memory horizon of each write", "Error against length", "One token among T")
    for ax, title in zip(axes.flat, titles, strict=True):
        finish(ax, title)


def _profile(decay: np.ndarray, profile: str, look: tuple[str, str], ax: Any) -> None:
    ax.plot(decay, look[1] + "-", color=look[0], ms=4, lw=1.0, label=profile)


def _horizon(result: Result, profile: str, colour: tuple[str, str], ax: Any) -> None:
    horizon, least = result.curves[f"horizon {profile}"], result.curves[f"least {profile}"]
    seen, token = np.isfinite(horizon), np.arange(len(horizon))
    ax.plot(token[seen], horizon[seen], colour[1], color=colour[0], ms=4, label=profile)
    look = {"color": colour[0], "mfc": "none", "ms": 7 if profile == "ramp" else 4, "label": f"{profile}, at least"}
    ax.plot(token[~seen], least[~seen], "^", **look)


def _errors(rows: list[Row], ax: Any) -> None:
    rows = [row for row in rows if row.sizes["beta"] == 64 and row.sizes["n"] == row.sizes["T"] // 2]
    for profile, (colour, marker) in PROFILES.items():
        for mixer, dtype in sorted({(row.mixer, row.dtype) for row in rows}):
            here = [row for row in rows if (row.mixer, row.dtype) == (mixer, dtype) and row.what.endswith(profile)]
            fill, size = (colour, 4) if dtype == "float64" else ("none", 9)
            shape, line = (marker, "-") if mixer == "Mamba-1" else ("D", "--")
            look = {"color": colour, "mfc": fill, "ms": size, "lw": 1.0, "label": f"{profile}, {mixer}, {dtype}"}
            if here:
                ax.plot([row.sizes["T"] for row in here], [row.high for row in here], shape + line, **look)
    bounds = {row.bound for row in rows if row.what.endswith("ramp") and row.mixer == "Mamba-1"}
    for bound in bounds:
        ax.axhline(bound, color=style.REAL, lw=1.0, ls=":", label="bound of the ramp, any length")
    ax.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="largest error")
    plain_ticks(ax.xaxis, sorted({row.sizes["T"] for row in rows}))


def _limits(rows: list[Row], ax: Any) -> None:
    fits = [row for row in rows if row.mixer == "time-invariant"]
    for length, (colour, marker) in LENGTHS.items():
        here = [row for row in fits if row.sizes["T"] == length]
        counts = [row.sizes["exponentials"] for row in here]
        ax.plot(counts, [row.value for row in here], marker, color=colour, ms=6, label=f"T = {length}, best found")
        fine = np.geomspace(4, length / 2, 200)
        if here:
            ax.plot(fine, np.sqrt(1 - fine / (length // 2)), color=colour, lw=1.0)
    exact = [row for row in rows if row.mixer != "time-invariant"]
    look = {"color": style.REAL, "ms": 12, "label": "S6 layer, one state"}
    ax.plot([row.sizes["exponentials"] for row in exact], [row.value for row in exact], "*", **look)
    ax.plot([], [], color="0.35", lw=1.0, label="no N exponentials below")
    ax.set_xscale("log", base=2)
    plain_ticks(ax.xaxis, [1, 4, 16, 64, 256])
    ax.set(xlabel="exponentials N (S4D: N/2 conjugate pairs)", ylabel="relative $L_2$ error", ylim=(-0.05, 1.08))
