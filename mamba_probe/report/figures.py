"""One picture an analysis, as PNG for the page and SVG for a paper."""

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.common.analysis import Panel, analyses
from mamba_probe.run import BESIDE
from mamba_probe.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "saved"]


def draw(
    name: str, result: xr.Dataset, directory: str | PathLike[str], *, beside: xr.Dataset | None = None
) -> list[Path]:
    """Draw a result to DIRECTORY/NAME.png and NAME.svg; the same result gives the same bytes.

    A reference's result is drawn on its right, or apart in DIRECTORY/beside where the analysis says so.
    """
    from matplotlib.figure import Figure

    directory, analysis = Path(directory), analyses()[name]
    if analysis.apart and beside is not None:
        return [*draw(name, result, directory), *draw(name, beside, directory / BESIDE)]
    directory.mkdir(parents=True, exist_ok=True)
    shown = [result] if beside is None else [result, beside]
    panels = analysis.panels(shown)
    with style.house():
        figure = Figure(figsize=(8.5 if beside is None else 13.6, 4.6 * len(panels)), layout="constrained")
        for row, panel in zip(_axes(figure, panels, len(shown)), panels, strict=True):
            for ax, one in zip(row, shown, strict=True):
                panel.draw(one, ax)
            _align(row, panel.alike)
        return saved(figure, directory / name)


def saved(figure: "Figure", stem: Path) -> list[Path]:
    """Write STEM.png and STEM.svg, each whole."""
    paths = []
    for kind, dpi, metadata in (("png", 160, None), ("svg", "figure", {"Date": None})):
        data = io.BytesIO()
        figure.savefig(data, format=kind, dpi=dpi, metadata=metadata)
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        write_whole(paths[-1], data.getvalue())
    return paths


def _axes(figure: "Figure", panels: Sequence[Panel], columns: int) -> "np.ndarray":
    """Axes (row, column): aligned where all have scales, each as wide as its part where some are diagrams."""
    if all(panel.alike for panel in panels):
        return figure.subplots(len(panels), columns, squeeze=False)
    parts = figure.subfigures(len(panels), columns, squeeze=False)
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
