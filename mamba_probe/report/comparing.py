"""Runs beside one another: what differs in a measure of each, as a table and pictures."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses import comparison
from mamba_probe.analyses.common import style
from mamba_probe.analyses.common.analysis import number, span
from mamba_probe.report.figures import saved
from mamba_probe.run import Run

__all__ = ["caution", "differences", "draw_comparison", "labelled"]


def labelled(given: Sequence[str], load_models: bool = False) -> dict[str | float, Run]:
    """Runs by label: LABEL=DIR, or DIR alone by its own name; labels that are all numbers are numbers.

    The model of each is loaded once, if it ships or `load_models` says so.

    Raises:
        ValueError: one label twice.
        FileNotFoundError: a directory without a run.
    """
    runs: dict[str | float, Run] = {}
    parted = [text.partition("=") if "=" in text else (Path(text).name, "=", text) for text in given]
    numbers = [_as_number(label) for label, _, _ in parted]
    for (name, _, folder), value in zip(parted, numbers, strict=True):
        label = name if None in numbers or value is None else value
        if label in runs:
            raise ValueError(f"two runs have the label {label!r}: name them, as in first=DIR second=DIR")
        run = Run.open(folder, load_models=load_models)
        runs[label] = run if run.lacks_model() else run.with_model()
    return runs


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else value


def differences(result: xr.Dataset) -> list[tuple[str, ...]]:
    """Rows of a table: what, of which, its value, the reference's, the difference, its interval, Holm's p; the surest
    first."""
    result = result.compute()
    rows, reference = [], result.attrs["reference"]
    base = next(label for label in result["trace"].values.tolist() if str(label) == reference)
    for name in result.attrs["compared"].split(", "):
        for other in result["other"].values.tolist():
            one, own = result.sel(other=other), result[name].sel(trace=other)
            for place in np.ndindex(own.shape):
                at = dict(zip(own.dims, place, strict=True))
                what = " ".join([name, *(f"{dim} {_at(result, str(dim), i)}" for dim, i in at.items())])
                ends = ("_difference", "_difference_low", "_difference_high", "_p_holm")
                gap, low, high, p = (one[f"{name}{end}"].isel(at).item() for end in ends)
                values = (own.isel(at).item(), result[name].sel(trace=base).isel(at).item())
                cells = (what, str(other), *map(number, values), number(gap), span(low, high), number(p))
                rows.append((p, cells))
    return [cells for _, cells in sorted(rows, key=lambda row: (np.isnan(row[0]), row[0]))]


def caution(result: xr.Dataset) -> str:
    """What the differences are, and whether so many can be told on so few rows."""
    tested, rows, floor = (result.attrs[name] for name in ("n_comparisons", "n_rows", "least_p_holm"))
    said = f"{tested} difference(s) from {result.attrs['reference']}; rows: {rows}"
    if float(floor) <= comparison.LEVEL:
        return f"{said}."
    return f"{said}. No adjusted p can be below {floor} here: name the variables that you mean, or record more rows."


def _at(result: xr.Dataset, dim: str, i: int) -> Any:
    return result[dim].values[i] if dim in result.coords else i


def draw_comparison(result: xr.Dataset, directory: str | PathLike[str], name: str) -> list[Path]:
    """A picture of each variable that has few enough entries, as NAME-VARIABLE.png and .svg."""
    from matplotlib.figure import Figure

    paths, directory = [], Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    trajectory = result["trace"].dtype.kind in "if"
    for variable in result.attrs["compared"].split(", "):
        entries = result[variable].size // (result.sizes["trace"] if trajectory else 1)
        if entries > comparison.MOST:
            continue
        with style.house():
            figure = Figure(figsize=(8.5, 4.6), layout="constrained")
            kind = "trajectory" if trajectory else "difference"
            comparison.plot(result, figure.subplots(), kind=kind, variable=variable)
            paths += saved(figure, directory / f"{name}-{variable}")
    return paths
