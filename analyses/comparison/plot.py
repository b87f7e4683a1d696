"""Differences from the reference, values side by side, or values against training steps."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.comparison.layout import LABEL, OTHER
from mamba_probe.trace.contract import unknown_name

__all__ = ["KINDS", "plot"]

KINDS = ("difference", "values", "trajectory")
MOST = 40
"""Entries that a figure can hold side by side."""
LEVEL = 0.05
"""Holm-adjusted p below which a mark is filled."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "difference", variable: str | None = None) -> Any:
    """Draw a result of `compare`; nothing is computed here.

    `difference`: what each has beyond the reference, with its interval. `values`: every label's value. `trajectory`:
    values against labels that are numbers, as training steps are. Filled marks differ from the reference with a
    Holm-adjusted p below 0.05. What is infinite or unknown has no mark.

    Args:
        result: Dataset from `compare`.
        ax: matplotlib Axes; new ones by default.
        kind: one of the above.
        variable: which one, where several were compared.

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, a result of an analysis, several variables and none named, labels that are no numbers,
            more than 40 entries.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('difference', 'values', 'trajectory'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    if getattr(result, "attrs", {}).get("analysis") != "comparison":
        came = getattr(result, "attrs", {}).get("analysis") or type(result).__name__
        raise ValueError(f"comparison.plot draws what compare(measure, of) returned; got {came}")
    name = _variable(result, variable)
    cells = _cells(result, name)
    if kind == "trajectory" and result[LABEL].dtype.kind not in "iuf":
        raise ValueError(f"a trajectory needs labels that are numbers; got {result[LABEL].values.tolist()}")
    entries = len(cells) * (1 if kind == "trajectory" else result.sizes[LABEL])
    if entries > MOST:
        raise ValueError(f"`{name}` has {entries} entries and a figure holds {MOST}: take some with result.sel(...)")
    ax = style.axes(ax)
    {"difference": _differences, "values": _values, "trajectory": _trajectory}[kind](result, name, cells, ax)
    style.frame(ax)
    return ax


def _variable(result: xr.Dataset, variable: str | None) -> str:
    known = result.attrs["compared"].split(", ")
    if variable is None and len(known) == 1:
        return known[0]
    if variable is None:
        raise ValueError(f"the result compares {', '.join(known)}: name one, variable=...")
    if variable not in known:
        raise unknown_name("variable", variable, known)
    return variable


def _cells(result: xr.Dataset, name: str) -> list[tuple[str, dict[str, int]]]:
    """Name and place of each entry of a label; a dimension of size 1 is not named."""
    dims = [str(dim) for dim in result[name].dims if dim != LABEL]
    shape = [result.sizes[dim] for dim in dims]
    cells = []
    for place in np.ndindex(*shape):
        at = dict(zip(dims, map(int, place), strict=True))
        words = [f"{dim} {_label(result, dim, i)}" for dim, i in at.items() if result.sizes[dim] > 1]
        cells.append((", ".join(words), at))
    return cells


def _label(result: xr.Dataset, dim: str, i: int) -> str:
    value = result[dim].values[i] if dim in result.coords else i
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def _colours(n: int) -> list[Any]:
    import matplotlib as mpl

    return [style.REAL] if n == 1 else list(mpl.colormaps["viridis"](np.linspace(0, 0.85, n)))


def _part(result: xr.Dataset, name: str, at: dict[str, int], *ends: str) -> list[np.ndarray]:
    return [result[f"{name}{end}"].isel(at).values for end in ends]


def _filled(result: xr.Dataset, name: str, at: dict[str, int]) -> np.ndarray:
    """Of every label, whether it differs from the reference; the reference does not."""
    p = dict(zip(result[OTHER].values.tolist(), _part(result, name, at, "_p_holm")[0], strict=True))
    return np.array([p.get(label, 1.0) < LEVEL for label in result[LABEL].values.tolist()])


def _marks(x: Any, y: Any, filled: Any, colour: Any, ax: Any) -> None:
    x, y = np.broadcast_arrays(x, y)
    for fill, which in ((colour, filled), ("white", ~filled)):
        ax.plot(x[which], y[which], "o", ms=5, ls="", mec=colour, mfc=fill, mew=1.4, zorder=3)


def _legend(result: xr.Dataset, ax: Any) -> None:
    ax.plot([], [], "o", color="0.3", label=f"not the reference's, {result.attrs['reference']} (Holm p < {LEVEL:g})")
    ax.plot([], [], "o", color="0.3", mfc="white", label="may be the same, or is the reference")
    bar = "bar 95 % interval" if int(result.attrs["n_rows"].split(", ")[0]) > 1 else "one row: no interval"
    ax.plot([], [], color="0.3", lw=2, label=f"{bar}, {'paired' if result.attrs['paired'] == 'True' else 'unpaired'}")
    style.legend_outside(ax)


def _text(result: xr.Dataset, name: str) -> str:
    units = result[name].attrs["units"]
    return f"{name.replace('_', ' ')}{f' ({units})' if units not in ('', '1') else ''}"


def _differences(result: xr.Dataset, name: str, cells: list[tuple[str, dict[str, int]]], ax: Any) -> None:
    others = result[OTHER].values.tolist()
    ax.axvline(0.0, color=style.NULL, lw=1.2, zorder=0)
    names = []
    for j, (cell, at) in enumerate(cells):
        value, low, high, p = _part(result, name, at, "_difference", "_difference_low", "_difference_high", "_p_holm")
        y = -(np.arange(len(others)) * len(cells) + j)
        seen = np.isfinite(low) & np.isfinite(high)
        ax.hlines(y[seen], low[seen], high[seen], color=_colours(len(cells))[j], lw=2)
        _marks(np.where(np.isfinite(value), value, np.nan), y, p < LEVEL, _colours(len(cells))[j], ax)
        names += [(int(y[i]), _joined(str(other), cell, value[i])) for i, other in enumerate(others)]
    ax.set_yticks([y for y, _ in names], [text for _, text in names])
    ax.set_ylim(min(y for y, _ in names) - 0.6, 0.6)
    ax.set_xlabel(f"{_text(result, name)}\nless that of {result.attrs['reference']}")
    _legend(result, ax)


def _joined(label: str, cell: str, value: float) -> str:
    said = f"{label}\n{cell}" if cell else label
    return said if np.isfinite(value) else f"{said}\n(no number)"


def _values(result: xr.Dataset, name: str, cells: list[tuple[str, dict[str, int]]], ax: Any) -> None:
    labels = [str(label) for label in result[LABEL].values.tolist()]
    x, width = np.arange(len(labels)), 0.6 / max(1, len(cells) - 1)
    for j, (cell, at) in enumerate(cells):
        shift = 0.0 if len(cells) == 1 else j * width - 0.3
        _bars(result, name, at, x + shift, _colours(len(cells))[j], cell, ax)
    ax.set_xticks(x, labels, **({"rotation": 20, "ha": "right"} if max(map(len, labels)) > 12 else {}))
    ax.set_xlim(-0.6, len(labels) - 0.4)
    ax.set_ylabel(_text(result, name))
    _legend(result, ax)


def _bars(result: xr.Dataset, name: str, at: dict[str, int], x: np.ndarray, colour: Any, cell: str, ax: Any) -> None:
    value, low, high = _part(result, name, at, "", "_low", "_high")
    seen = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[seen], low[seen], high[seen], color=colour, lw=2)
    _marks(x, np.where(np.isfinite(value), value, np.nan), _filled(result, name, at), colour, ax)
    if cell:
        ax.plot([], [], color=colour, lw=2, label=cell)


def _trajectory(result: xr.Dataset, name: str, cells: list[tuple[str, dict[str, int]]], ax: Any) -> None:
    steps = result[LABEL].values.astype(float)
    for j, (cell, at) in enumerate(cells):
        colour = _colours(len(cells))[j]
        value = _part(result, name, at, "")[0]
        ax.plot(steps, np.where(np.isfinite(value), value, np.nan), color=colour, lw=1.0, alpha=0.6, zorder=1)
        _bars(result, name, at, steps, colour, cell, ax)
    ax.set_xlabel("label of the trace")
    ax.set_ylabel(_text(result, name))
    _legend(result, ax)
