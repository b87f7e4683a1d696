"""One picture an analysis, as PNG for the page and SVG for a paper."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from mamba_probe.analyses import hidden_attention, memory_horizon, recall_circuit, wavelet_alignment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

PANELS: dict[str, tuple[Callable[..., Any], ...]] = {
    "recall_circuit": (recall_circuit.plot, partial(recall_circuit.plot, kind="diagram")),
    "memory_horizon": (partial(memory_horizon.plot, kind="share"), partial(memory_horizon.plot, kind="horizon")),
    "wavelet_alignment": (
        partial(wavelet_alignment.plot, kind="compaction"),
        partial(wavelet_alignment.plot, kind="cosine"),
    ),
    "hidden_attention": (hidden_attention.plot,),
}
"""Panels of a picture, from above: the first one always, the second where `_second` says."""
RC: dict[Any, Any] = {"svg.hashsalt": "mamba_probe", "svg.fonttype": "none", "font.size": 10}


def draw(name: str, result: xr.Dataset, directory: str | PathLike[str]) -> list[Path]:
    """Draw a result to DIRECTORY/NAME.png and NAME.svg; the same result gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        panels = PANELS[name][: 2 if _second(name, result) else 1]
        figure = Figure(figsize=(8.5, 4.6 * len(panels)), layout="constrained")
        for ax, panel in zip(_axes(figure, len(panels), name), panels, strict=True):
            panel(result, ax)
        paths = [directory / f"{name}.png", directory / f"{name}.svg"]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _axes(figure: "Figure", n: int, name: str) -> "list[Axes]":
    """Axes one below the other: aligned where both have layers, each as wide as the figure where one is a diagram."""
    if name == "recall_circuit":
        return [part.subplots() for part in figure.subfigures(n, 1, squeeze=False).flat]
    return list(figure.subplots(n, squeeze=False).flat)


def _second(name: str, result: xr.Dataset) -> bool:
    """A circuit's diagram where one was found; otherwise the second panel compares layers."""
    return bool(result["found"]) if name == "recall_circuit" else result.sizes["layer"] > 1
