"""One picture an analysis, as PNG for the page and SVG for a paper."""

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.analyses import hidden_attention, memory_horizon, recall_circuit, wavelet_alignment
from mamba_probe.run import BESIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]


def _diagram(result: xr.Dataset, ax: "Axes") -> None:
    """The diagram of the circuit found; where none was, a line that says so."""
    if result["found"]:
        recall_circuit.plot(result, ax, kind="diagram")
        return
    ax.set_axis_off()
    text = f"{result.attrs['model']}: no circuit found, so no diagram"
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.35", transform=ax.transAxes)


Panel = tuple[Callable[..., Any], str]
"""What draws it, and which of its axes ("x", "y") are alike where a reference is drawn on its right."""
PANELS: dict[str, tuple[Panel, ...]] = {
    "recall_circuit": ((recall_circuit.plot, "x"), (_diagram, "")),
    "memory_horizon": (
        (partial(memory_horizon.plot, kind="share"), "xy"),
        (partial(memory_horizon.plot, kind="horizon"), "y"),
    ),
    "wavelet_alignment": (
        (partial(wavelet_alignment.plot, kind="compaction"), "xy"),
        (partial(wavelet_alignment.plot, kind="cosine"), "y"),
    ),
    "hidden_attention": ((hidden_attention.plot, ""),),
}
"""Panels of a picture, from above: the first one always, the second where `_second` says."""
RC: dict[Any, Any] = {"svg.hashsalt": "mamba_probe", "svg.fonttype": "none", "font.size": 10}


def draw(
    name: str, result: xr.Dataset, directory: str | PathLike[str], *, beside: xr.Dataset | None = None
) -> list[Path]:
    """Draw a result to DIRECTORY/NAME.png and NAME.svg; the same result gives the same bytes.

    A reference's result is drawn on its right; of hidden attention, in pictures of its own in DIRECTORY/beside.
    """
    import matplotlib
    from matplotlib.figure import Figure

    directory = Path(directory)
    if name == "hidden_attention" and beside is not None:
        return [*draw(name, result, directory), *draw(name, beside, directory / BESIDE)]
    directory.mkdir(parents=True, exist_ok=True)
    shown = [result] if beside is None else [result, beside]
    panels = PANELS[name] if any(_second(name, one) for one in shown) else PANELS[name][:1]
    if name == "wavelet_alignment" and len(shown) > 1 and len(panels) > 1:
        panels = panels[1:]  # compaction has other lines for one layer than for several
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8.5 if beside is None else 13.6, 4.6 * len(panels)), layout="constrained")
        for row, (panel, alike) in zip(_axes(figure, len(panels), len(shown), name), panels, strict=True):
            for ax, one in zip(row, shown, strict=True):
                panel(one, ax)
            _align(row, alike)
        paths = [directory / f"{name}.png", directory / f"{name}.svg"]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _axes(figure: "Figure", rows: int, columns: int, name: str) -> "np.ndarray":
    """Axes (row, column): aligned where all have scales, each as wide as its part where some are diagrams."""
    if name != "recall_circuit":
        return figure.subplots(rows, columns, squeeze=False)
    parts = figure.subfigures(rows, columns, squeeze=False)
    return np.array([[part.subplots() for part in row] for row in parts])


def _align(row: "Sequence[Axes]", alike: str) -> None:
    """Give axes side by side the same limits; where they have no scale, let no text make one smaller than the other."""
    if len(row) == 1:
        return
    for which in alike:
        limits = np.array([getattr(ax, f"get_{which}lim")() for ax in row])
        down = limits[0, 0] > limits[0, 1]
        ends = (limits.max(), limits.min()) if down else (limits.min(), limits.max())
        for ax in row:
            getattr(ax, f"set_{which}lim")(*ends)
    for text in () if alike else (text for ax in row for text in ax.texts):
        text.set_in_layout(False)


def _second(name: str, result: xr.Dataset) -> bool:
    """A circuit's diagram where one was found; otherwise the second panel compares layers."""
    return bool(result["found"]) if name == "recall_circuit" else result.sizes["layer"] > 1
