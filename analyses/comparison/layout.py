"""Which variables of a result are compared, and their entries as one row of cells."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from mamba_probe.trace.contract import unknown_name

__all__ = ["LABEL", "OTHER", "RULE", "Layout", "Unlike", "layout"]

LABEL, OTHER = "trace", "other"
"""Dimensions of a comparison: every label, and every label but the reference."""
_ENDS = ("_low", "_high", "_at_least", "_at_most")
RULE = "numeric `layer_*` that are no null, no end of an interval and no bound (_low, _high, _at_least, _at_most)"
"""What is compared unless `variable` says otherwise."""


class Unlike(ValueError):
    """Variables that differ between results, and what can be compared instead.

    Attributes:
        found: what differs, and which variables are alike, without advice.
    """

    def __init__(self, whose: str, unlike: Mapping[str, str], alike: Sequence[str]):
        differ = "; ".join(f"{name} ({difference})" for name, difference in unlike.items())
        self.found = (
            f"variables of {whose} are not those of the first result: {differ}; alike are {', '.join(alike) or 'none'}"
        )
        super().__init__(f"{self.found}. Name others, variable=..., or reduce them with select=, Dataset -> Dataset")


@dataclass(frozen=True)
class Layout:
    """Variables of a result, each flattened in turn into cells; `select` is applied to a result first."""

    templates: dict[str, xr.DataArray]
    select: Callable[[xr.Dataset], xr.Dataset] | None

    @property
    def n_cells(self) -> int:
        """Entries of all variables."""
        return sum(template.size for template in self.templates.values())

    def cells(self, result: xr.Dataset) -> tuple[Float[np.ndarray, " cell"], dict[str, str]]:
        """The entries of a result, and which variables it lacks or has over other dimensions or labels: these are NaN.

        Returns:
            The entries; variable -> what of it differs.
        """
        found, unlike, parts = chosen(result, self.select), {}, []
        for name, template in self.templates.items():
            array = _array(found, name) if name in found.data_vars else None
            if difference := "absent" if array is None else _unlike(template, array):
                unlike[name] = difference
            same = None if name in unlike or array is None else array.transpose(*template.dims).values
            parts.append(np.full(template.size, np.nan) if same is None else np.ravel(same).astype(np.float64))
        return np.concatenate(parts), unlike

    def without(self, names: Collection[str]) -> tuple["Layout", Bool[np.ndarray, " cell"]]:
        """The layout of the other variables, and which cells are theirs."""
        kept = {name: template for name, template in self.templates.items() if name not in names}
        theirs = [np.full(template.size, name in kept) for name, template in self.templates.items()]
        return Layout(kept, self.select), np.concatenate(theirs)

    def shaped(
        self, cells: Float[np.ndarray, "first cell"], dim: str
    ) -> dict[str, tuple[tuple[str, ...], Float[np.ndarray, "..."]]]:
        """Dimensions and values by variable of what was computed by cell, along a first dimension."""
        ends = np.cumsum([template.size for template in self.templates.values()])[:-1]
        cut = zip(self.templates.items(), np.split(cells, ends, axis=1), strict=True)
        return {
            name: ((dim, *map(str, template.dims)), part.reshape(len(part), *template.shape))
            for (name, template), part in cut
        }

    def coords(self) -> dict[str, Any]:
        """Coordinates of the variables' own dimensions."""
        return {
            str(key): value.variable for template in self.templates.values() for key, value in template.coords.items()
        }


def layout(
    result: xr.Dataset, variable: str | Sequence[str] | None, select: Callable[[xr.Dataset], xr.Dataset] | None
) -> Layout:
    """The layout of a first result, which all others have to have.

    Raises:
        ValueError: an unknown or non-numeric variable, none by the rule, or dimensions that a comparison uses.
    """
    found = chosen(result, select)
    known = [str(name) for name in found.data_vars]
    names = _by_rule(found, known) if variable is None else [variable] if isinstance(variable, str) else list(variable)
    if not names:
        raise ValueError(f"no variable was asked for; variable= may name {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown_name("variable", name, known)
        if not _numeric(found[name]):
            raise ValueError(f"`{name}` holds {found[name].dtype}; only real numbers are compared")
    templates = {name: _array(found, name) for name in names}
    for name, template in templates.items():
        if taken := {LABEL, OTHER, "batch"} & set(map(str, template.dims)):
            raise ValueError(f"`{name}` has dimension {', '.join(sorted(taken))}: reduce or rename it with select=")
    if not prod(template.size for template in templates.values()):
        raise ValueError(f"nothing to compare: {', '.join(n for n, t in templates.items() if not t.size)} is empty")
    return Layout(templates, select)


def chosen(result: xr.Dataset, select: Callable[[xr.Dataset], xr.Dataset] | None) -> xr.Dataset:
    """The result, or what the user's function makes of it."""
    found = result if select is None else select(result)
    if not isinstance(found, xr.Dataset):
        raise ValueError(f"select must return an xarray.Dataset; got {type(found).__name__}")
    return found


def _by_rule(found: xr.Dataset, known: list[str]) -> list[str]:
    names = [name for name in known if name.startswith("layer_") and "null" not in name and not name.endswith(_ENDS)]
    names = [name for name in names if _numeric(found[name])]
    if not names:
        raise ValueError(
            f"the measure has no variable that is compared by default ({RULE}): name some of {', '.join(known)}"
            " with variable=..."
        )
    return names


def _numeric(array: xr.DataArray) -> bool:
    return array.dtype.kind in "fiub"


def _array(found: xr.Dataset, name: str) -> xr.DataArray:
    """A variable; that of a single row has no use for `batch`."""
    array = found[name]
    return array.isel(batch=0, drop=True) if array.sizes.get("batch") == 1 else array


def _unlike(template: xr.DataArray, array: xr.DataArray) -> str:
    if set(template.dims) != set(array.dims):
        return f"dimensions {array.dims}, not {template.dims}"
    for dim in template.dims:
        if template.sizes[dim] != array.sizes[dim]:
            return f"{array.sizes[dim]} of `{dim}`, not {template.sizes[dim]}"
        if dim in template.coords and dim in array.coords and not np.array_equal(template[dim], array[dim]):
            return f"`{dim}` labelled {array[dim].values.tolist()[:6]}, not {template[dim].values.tolist()[:6]}"
    return ""
