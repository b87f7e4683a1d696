"""What is measured: the measure by name, module or callable, and the arguments of each label."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.trace.contract import unknown_name

__all__ = ["Label", "Subject", "asked_labels", "asked_measure", "asked_subjects"]

Label = str | int | float
_SHORTEST = 2
"""Replicates of a measure's own intervals, which are not used here."""


@dataclass(frozen=True)
class Subject:
    """A measure and its arguments, the first of which is the trace."""

    measure: Callable[..., Any]
    trace: Any
    arguments: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """Rows of the trace."""
        return int(self.trace.sizes["batch"])

    @property
    def recorded(self) -> xr.Dataset | xr.DataArray:
        """The trace itself, of a run too."""
        return self.trace.trace if _is_run(self.trace) else self.trace

    def of(self, rows: Int[np.ndarray, " row"] | None = None) -> xr.Dataset:
        """Measure some rows, or all; what has no `batch` passes whole, and what is on dask stays there.

        Raises:
            ValueError: the measure did not return a Dataset.
        """
        given = {name: _taken(value, rows) for name, value in self.arguments.items()}
        found = self.measure(_taken(self.trace, rows), **given)
        if not isinstance(found, xr.Dataset):
            raise ValueError(f"a measure returns an xarray.Dataset; got {type(found).__name__}")
        return found


def asked_measure(
    measure: ModuleType | str | Callable[..., Any], of: Mapping[Any, Any]
) -> tuple[str, Callable[..., Any]]:
    """Name and function of a measure: of runs an analysis' own way to measure one.

    Raises:
        ValueError: an unknown name, a module without `measure`, or nothing that can be called.
    """
    if isinstance(measure, str):
        package = import_module("mamba_probe.analyses")
        known = sorted(found.name for found in iter_modules(package.__path__) if found.ispkg)
        known = [name for name in known if name not in ("common", "comparison")]
        if measure not in known:
            raise unknown_name("analysis", measure, known)
        measure = import_module(f"{package.__name__}.{measure}")
    if isinstance(measure, ModuleType) and any(map(_is_run, of.values())):
        name = measure.__name__.rsplit(".", 1)[-1]
        return name, _of_run(name, of)
    if isinstance(measure, ModuleType):
        function = getattr(measure, "measure", None)
        if not callable(function):
            raise ValueError(f"{measure.__name__} has no function `measure`; pass a callable Dataset -> Dataset")
        return measure.__name__.rsplit(".", 1)[-1], function
    if not callable(measure):
        raise ValueError(
            "measure must be an analysis module, its name, or a callable Dataset -> Dataset;"
            f" got {type(measure).__name__}"
        )
    return getattr(measure, "__name__", type(measure).__name__), measure


def _of_run(name: str, of: Mapping[Any, Any]) -> Callable[..., Any]:
    """How an analysis measures a run.

    Raises:
        ValueError: an analysis that measures no run, runs among traces, or a run that lacks something.
    """
    if name not in analyses():
        raise unknown_name("analysis of a run", name, tuple(analyses()))
    analysis = analyses()[name]
    for label, run in of.items():
        if not _is_run(run):
            raise ValueError(f"`of` must map to runs or to traces, not to both; {label!r} maps to {type(run).__name__}")
        if lack := analysis.lacks(run):
            raise ValueError(f"{name} needs {lack}, which {label!r} has not")

    def measured(run: Any, *, seed: int) -> xr.Dataset:
        return analysis.of_run(run, seed)

    return measured


def asked_labels(of: Mapping[Any, Any]) -> list[Label]:
    """The labels: as given, or in order where they are numbers.

    Raises:
        ValueError: no mapping, fewer than two labels, neither names nor numbers.
    """
    if not isinstance(of, Mapping) or isinstance(of, xr.Dataset):
        raise ValueError(
            f"`of` must map labels to traces; got {type(of).__name__}: of={{'one': trace, 'other': other}}"
        )
    labels = list(of)
    if len(labels) < 2:
        raise ValueError(f"`of` must name two traces or more; got {labels}")
    if all(isinstance(label, str) for label in labels):
        return labels
    if all(_is_number(label) for label in labels):
        return sorted(labels)
    raise ValueError(f"labels must be all names or all finite numbers; got {labels}")


def _is_number(label: object) -> bool:
    return isinstance(label, int | float) and not isinstance(label, bool) and isfinite(label)


def asked_subjects(
    function: Callable[..., Any], of: Mapping[Any, Any], labels: Sequence[Label], options: Mapping[str, Any], seed: int
) -> dict[Label, Subject]:
    """The measure with the arguments of each label.

    `seed` and the least `n_bootstrap` are passed to a measure that takes them, unless `options` say otherwise.

    Raises:
        ValueError: a label's first argument is missing or has no `batch`, or its Datasets differ in rows.
    """
    parameters = inspect.signature(function).parameters
    first = next(iter(parameters), None)
    if first is None:
        raise ValueError("a measure takes a trace as its first argument; this one takes no argument")
    common = {name: value for name, value in (("n_bootstrap", _SHORTEST), ("seed", seed)) if name in parameters}
    unknown = [name for name in options if name not in parameters] if any(map(_is_run, of.values())) else []
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: a run is measured as its report does; compare traces to pass options")
    common.update(options)
    return {label: _subject(function, first, label, of[label], common) for label in labels}


def _subject(function: Callable[..., Any], first: str, label: Label, given: Any, common: dict[str, Any]) -> Subject:
    if isinstance(given, Mapping) and not isinstance(given, xr.Dataset):
        arguments = {**common, **given}
        name = first if first in arguments else "trace"
        if name not in arguments:
            raise ValueError(f"{label!r} maps to arguments without `{first}`, the trace: got {sorted(map(str, given))}")
        trace = arguments.pop(name)
    else:
        trace, arguments = given, dict(common)
    if not _has_rows(trace):
        came = f"dimensions {tuple(trace.sizes)}" if isinstance(trace, xr.Dataset) else type(trace).__name__
        raise ValueError(f"{label!r} must map to a Dataset with a dimension `batch`; got {came}")
    n_rows = trace.sizes["batch"]
    if n_rows < 1:
        raise ValueError(f"{label!r} maps to a Dataset without rows")
    for name, value in arguments.items():
        for held in _held(value):
            if held.sizes["batch"] != n_rows:
                raise ValueError(
                    f"`{name}` of {label!r} has {held.sizes['batch']} rows, its trace has {n_rows}:"
                    " rows are taken together"
                )
    return Subject(function, trace, arguments)


def _has_rows(value: Any) -> bool:
    return (isinstance(value, xr.Dataset | xr.DataArray) or _is_run(value)) and "batch" in value.sizes


def _is_run(value: object) -> bool:
    """Whether it is a recorded run (`mamba_probe.run.Run`, which is not imported here)."""
    return isinstance(getattr(value, "trace", None), xr.Dataset) and hasattr(value, "lacks_model")


def _held(value: Any) -> list[Any]:
    """What has rows in an argument: itself, or parts of a list or tuple."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in _held(one)]
    return [value] if _has_rows(value) else []


def _taken(value: Any, rows: Int[np.ndarray, " row"] | None) -> Any:
    if rows is None:
        return value
    if isinstance(value, list | tuple):
        return type(value)([_taken(one, rows) for one in value])
    return value.isel(batch=rows) if _has_rows(value) else value
