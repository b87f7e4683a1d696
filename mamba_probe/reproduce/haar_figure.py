"""Figure of the Haar claim."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common import style
from mamba_probe.reproduce.claim import Result
from mamba_probe.reproduce.panel import finish, plain_ticks
from mamba_probe.reproduce.table import Row

__all__ = ["draw"]

FITS = {
    "S4D-Real": ("#E69F00", "v"), "S4D-Lin": ("#CC79A7", "s"), "Fourier": ("#009E73", "^"),
    "free": (style.LTI, "D"),
}  # fmt: skip
BETAS = {"haar flat-x": (style.REAL, "o"), "haar ramps": ("#009E73", "^")}
VARIANTS = {
    "haar flat-x": (style.REAL, "o"), "haar flat-B": ("#56B4E9", "s"), "haar ramps": ("#009E73", "^"),
    "haar delta": ("#E69F00", "v"),
}  # fmt: skip


def draw(result: Result, figure: Any) -> None:
    """Draw kernels, bounds, limits of time-invariant states and the errors against length."""
    figure.set_size_inches(11, 8.5)
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2)
    _kernels(result, left)
    _bounds([row for row in result.rows if row.quantity.startswith("worst")], right)
    grid = below.add_gridspec(2, 2, height_ratios=(4, 1), hspace=0.08)
    top, foot = below.add_subplot(grid[0, 0]), below.add_subplot(grid[1, 0])
    _limits([row for row in result.rows if row.quantity == "relative L2 error"], top, foot)
    single = [row for row in result.rows if row.mixer == "Mamba-1"]
    noise = [row for row in single if row.quantity == "relative error" and "J" in row.sizes]
    _lengths(noise, below.add_subplot(grid[:, 1]))


def _kernels(result: Result, ax: Any) -> None:
    for row, (kernel, haar) in enumerate(zip(result.curves["kernels"], result.curves["haar"], strict=False)):
        height = 2.6 * np.abs(haar).max()
        ax.plot(-row + haar / height, color=style.NULL, lw=3.2, label="Haar function" if row == 0 else None)
        ax.plot(-row + kernel / height, color=style.REAL, lw=1.0, label="kernel of the block" if row == 0 else None)
    named = ["$cA$", "$cD_8$", *(f"$cD_7[{k}]$" for k in range(2)), *(f"$cD_6[{k}]$" for k in range(4))]
    ax.set_yticks(-np.arange(len(named)), named)
    ax.set_xlabel("token")
    finish(ax, "Kernels recorded from the block")


def _bounds(rows: list[Row], ax: Any) -> None:
    for name, (colour, marker) in BETAS.items():
        here = sorted((row for row in rows if row.what == name), key=lambda row: row.sizes["beta"])
        beta = [row.sizes["beta"] for row in here]
        ax.plot(beta, [row.value for row in here], marker, color=colour, ms=6, label=f"{name[5:]}, measured")
        ax.plot(beta, [row.bound for row in here], color=colour, lw=1.0, label=f"{name[5:]}, bound")
    ax.set_yscale("log")
    ax.set_xlabel(r"steepness $\beta$")
    ax.set_ylabel("worst error for $|u| \\leq 1$")
    finish(ax, "Worst case and bound, float64")


def _limits(rows: list[Row], top: Any, foot: Any) -> None:
    fits = [row for row in rows if row.mixer == "S4D"]
    for name, (colour, marker) in FITS.items():
        here = [row for row in fits if row.what.startswith(name)]
        look = {"color": colour, "ms": 5, "lw": 1.2, "label": here[0].what if here else None}
        top.plot([row.sizes["N"] for row in here], [row.value for row in here], marker + "-", **look)
    count, bound = np.array(sorted({(row.sizes["exponentials"], row.bound) for row in fits})).reshape(-1, 2).T
    top.fill_between(count, bound, 1e-3, color=style.NULL, alpha=0.35, lw=0, label="excluded for any N exponentials")
    for ax in (top, foot):
        ax.set(xscale="log", yscale="log", xlim=(3.6, 72))
        plain_ticks(ax.xaxis, [4, 8, 16, 32, 64])
    _exact([row for row in rows if row.mixer != "S4D"], foot)
    top.set_ylim(0.03, 0.4)
    plain_ticks(top.yaxis, [0.03, 0.05, 0.1, 0.2, 0.4])
    foot.set_ylim(1e-17, 1e-4)
    top.tick_params(labelbottom=False, bottom=False)
    foot.set_xlabel("N: exponentials of a time-invariant layer")
    top.set_ylabel("relative $L_2$ error at a step")
    finish(top, "A step at half the lags")
    top.spines["bottom"].set_visible(False)
    foot.spines[["top", "right"]].set_visible(False)


def _exact(rows: list[Row], foot: Any) -> None:
    """The error of the S6 layer, on its own stretch of the broken axis."""
    for row in rows:
        if row.value > 0:
            foot.axhline(row.value, color=style.REAL, lw=1.6)
    said = "; ".join(f"{row.dtype} {row.value:.0e}" if row.value else f"{row.dtype} 0" for row in rows)
    foot.text(4, 1e-12, f"S6 layer, two windows: {said}", fontsize="small", color=style.REAL, va="bottom")


def _lengths(rows: list[Row], ax: Any) -> None:
    for name, (colour, marker) in VARIANTS.items():
        of_name = [row for row in rows if row.what == name and row.sizes["J"] == 3]
        beta = max((row.sizes["beta"] for row in of_name), default=0)
        for dtype, fill, line in (("float64", colour, "-"), ("float32", "white", "--")):
            here = [row for row in of_name if row.dtype == dtype and row.sizes["beta"] == beta]
            size, value = [row.sizes["T"] for row in here], np.array([row.value for row in here])
            ends = [value - [row.low for row in here], [row.high for row in here] - value]
            label = rf"{name[5:]}, $\beta$ = {beta:g}" if dtype == "float64" else None
            look = {"color": colour, "mfc": fill, "ls": line, "label": label if here else None}
            ax.errorbar(size, value, ends, marker=marker, ms=6, lw=1.0, **look)
    ax.plot([], [], "o--", color="0.35", mfc="white", label="hollow: float32")
    ax.set(xscale="log", yscale="log")
    plain_ticks(ax.xaxis, sorted({row.sizes["T"] for row in rows if row.sizes["J"] == 3}))
    ax.set_xlabel("tokens T (J = 3)")
    ax.set_ylabel("error / largest coefficient, min .. max of draws")
    finish(ax, "White noise, against PyWavelets")
