"""The house style: colours of one meaning each (colour-blind safe, Okabe and Ito), and what matplotlib's rc may change.

Sizes and fonts stand in mamba_probe/house.mplstyle, column.mplstyle and page.mplstyle; see docs/figures.md.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from importlib.resources import files
from textwrap import fill
from typing import Any, ParamSpec, TypeVar

import numpy as np
import xarray as xr

from mamba_probe.visible import literal

__all__ = [
    "LTI",
    "NULL",
    "REAL",
    "axes",
    "check",
    "dense",
    "frame",
    "house",
    "interval_text",
    "layer_axis",
    "legend_outside",
    "log_axis",
    "names_as_they_are",
    "size",
    "title",
    "where_nothing_is_chosen",
]

P = ParamSpec("P")
R = TypeVar("R")

REAL = "#0072B2"
"""The model as it ran."""
NULL = "#999999"
"""Its shuffled or frozen null."""
LTI = "#D55E00"
"""Its time-invariant equivalent."""
WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
"""How a title is broken into lines: between words."""


def house() -> AbstractContextManager[None]:
    """The house style for what is drawn and saved inside, whatever the rc was: reports and the like.

    >>> import matplotlib as mpl
    >>> with house():
    ...     mpl.rcParams["svg.fonttype"]
    'none'
    """
    import matplotlib.style

    return matplotlib.style.context("mamba_probe.house")


@cache
def _house() -> Any:
    import matplotlib as mpl

    path = files("mamba_probe").joinpath("house.mplstyle")
    return dict(mpl.rc_params_from_file(str(path), use_default_template=False))


@contextmanager
def where_nothing_is_chosen() -> Iterator[dict[str, float]]:
    """The house style in place of matplotlib's own defaults alone: whoever set an rc, or used a style, has theirs.

    Gives how many times as wide lines and marks are in the rc as they are drawn here.
    """
    from matplotlib import rc_context, rcParams, rcParamsDefault

    rc, default, ours = _any(rcParams), _any(rcParamsDefault), _house()
    with rc_context({key: ours[key] for key in ours if rc[key] == default[key]}):
        drawn = ("lines.linewidth", "lines.markersize")
        times = {key: rc[key] / ours[key] for key in drawn}
        with rc_context(_any({key: ours[key] for key in drawn})):
            yield times


def _any(thing: Any) -> Any:
    return thing


def names_as_they_are(plot: Callable[P, R]) -> Callable[P, R]:
    """A plot(result, ...) in the house style where no other is chosen, its names and texts drawn as they stand.

    A dollar begins no mathematics, and what is hidden or reorders a line is shown (`mamba_probe.visible`). Texts that a
    plot writes itself are left alone; labels of the axes are broken into lines that fit. Widths and marks are drawn in
    points of the house style (1.5 and 6), and scaled by what `lines.linewidth` and `lines.markersize` are to these.
    """

    @wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = args
        if given and isinstance(given[0], xr.Dataset):
            given = (_literal(given[0]), *given[1:])
        held = [each for each in (*given, *kwargs.values()) if hasattr(each, "get_children")]
        before = {child for each in held for child in _any(each).get_children()}
        with where_nothing_is_chosen() as times:
            made = _any(plot(*given, **kwargs))
        for ax in np.ravel(made) if made is not None else ():
            _fit(ax.xaxis.label, _room(ax))
            _fit(ax.yaxis.label, _room(ax, "height"), "height")
            _scale(set(ax.get_children()) - before, *times.values())
        return _any(made)

    return drawn


def _scale(artists: Any, width: float, mark: float) -> None:
    """Scale lines and marks, those of a legend too."""
    from matplotlib.collections import LineCollection
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    for artist in artists if {width, mark} != {1.0} else ():
        if isinstance(artist, Legend):
            _scale(artist.legend_handles, width, mark)
        elif isinstance(artist, Line2D):
            artist.set(linewidth=artist.get_linewidth() * width, markersize=artist.get_markersize() * mark)
            artist.set_markeredgewidth(artist.get_markeredgewidth() * mark)
        elif isinstance(artist, LineCollection):
            artist.set_linewidth([each * width for each in _any(artist.get_linewidth())])


def _literal(result: xr.Dataset) -> xr.Dataset:
    made = result.copy()
    made.attrs = literal(result.attrs)
    for name, variable in result.variables.items():
        attrs = literal(variable.attrs)
        if variable.dtype.kind in "OUT":
            values = np.empty(variable.shape, dtype=object)
            values.ravel()[:] = [literal(each) for each in variable.values.flat]
            add = made.assign_coords if name in made.coords else made.assign
            made = add({name: (variable.dims, values, attrs)})
        made[name].attrs = attrs
    return made


def check(result: Any, analysis: str) -> None:
    """Check that a plot was given a result of its own analysis.

    Raises:
        ValueError: what came instead, and the call to make.
    """
    came = getattr(result, "attrs", {}).get("analysis")
    if came != analysis:
        what = f"a result of {came}" if came else type(result).__name__
        raise ValueError(f"{analysis}.plot draws what {analysis}.measure(trace) returned; got {what}")


def axes(ax: Any, needed: tuple[float, float] | None = None) -> Any:
    """`ax`, or new axes of rc's size; `needed`: the size of content that needs another than the house's."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size(*needed) if needed else None, layout="constrained")[1]


def size(width: float, height: float) -> tuple[float, float]:
    """The size that a content needs, in inches; where rc has one of its own, that."""
    from matplotlib import rcParams

    chosen = tuple(rcParams["figure.figsize"])
    return (width, height) if chosen == tuple(_house()["figure.figsize"]) else chosen


def frame(ax: Any) -> None:
    """Show the lines above and on the right only if rc says so."""
    from matplotlib import rcParams

    for side in ("top", "right"):
        ax.spines[side].set_visible(_any(rcParams)[f"axes.spines.{side}"])


def dense(axis: str) -> float:
    """Points of labels that stand close, on axis "x" or "y": five sixths of rc's."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=_any(rcParams)[f"{axis}tick.labelsize"]).get_size_in_points() * 5 / 6


def legend_outside(ax: Any, **look: Any) -> None:
    """Legend above the data, where it hides none, in two columns where they fit; a title stands above it.

    `look` goes to matplotlib's `legend`.
    """
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, **look}
    legend: Any = ax.legend(ncols=2, **place)
    if legend.get_window_extent().width > _room(ax):
        legend = ax.legend(ncols=1, **place)
    said = ax.get_title("left") or ax.get_title() or ax.get_title("right")
    if said:
        title(ax, said)


def title(ax: Any, text: str) -> None:
    """Title above the axes and the legend that stands there, in lines that fit."""
    legend: Any = ax.get_legend()
    above = bool(legend) and legend.get_window_extent().y0 >= ax.get_window_extent().y1
    pad = 6.0 + (legend.get_window_extent().height * 72 / ax.figure.dpi if above else 0.0)
    _fit(ax.set_title(text, pad=pad), _room(ax))


def _fit(artist: Any, room: float, along: str = "width") -> None:
    """Break a text into lines between words until it fits into `room`, in pixels."""
    text = artist.get_text()
    for width in range(max(map(len, text.split("\n"))), 16, -4):
        artist.set_text("\n".join(fill(line, width, **WHOLE) for line in text.split("\n")))
        if getattr(artist.get_window_extent(), along) <= room:
            return


def _room(ax: Any, along: str = "width") -> float:
    """Pixels for a text beside axes that are not laid out yet: as wide as they are, or a little higher."""
    return {"width": 1.0, "height": 1.2}[along] * getattr(ax.get_window_extent(), along)


def layer_axis(ax: Any, layers: Any) -> None:
    """Layers side by side at 0, 1, .. under their own numbers, with room at both ends."""
    step = max(1, -(-len(layers) // 16))
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_xlim(-0.8, len(layers) - 0.2)
    ax.set_xlabel("layer")
    frame(ax)


def log_axis(ax: Any) -> None:
    """Logarithmic y axis with plain numbers; numbers between powers of ten only where it spans less than one."""

    def between(value: float, _: int) -> str:
        low, high = ax.get_ylim()
        return f"{value:g}" if high < 10 * low else ""

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(between)


def interval_text(result: Any) -> str:
    """What the boxes of a figure are, or why there are none."""
    return "box 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
