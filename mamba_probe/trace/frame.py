"""A trace as a table for pandas: one row a place, no padding, and nothing larger than memory unasked."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import check_held, unknown_name
from mamba_probe.trace.memory import free_memory, n_bytes, readable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["check_table", "frame_of", "places"]

DERIVED = ("A_bar", "B_bar")
"""Variables that the accessor derives where they were not recorded."""


def frame_of(
    trace: xr.Dataset, variables: str | Sequence[str], layers: Sequence[int] | None = None,
    max_memory: int | str | None = None,
) -> "pd.DataFrame":  # fmt: skip
    """A table of variables of one trace that have the same dimensions.

    Source: the tidy form of H. Wickham, Tidy Data, J. Stat. Softw. 59 (2014).

    Args:
        trace: what `probe.record` or `mp.open_trace` returned; take rows and tokens of it with xarray, before.
        variables: a name of the schema, or names of equal dimensions; A_bar and B_bar also where they are derived.
        layers: the model's own layer numbers; None is all.
        max_memory: bytes, or text as "8GB", that the table and its making may take; None: what is free now.

    Returns:
        A row for each entry that is no padding, in the order of the dimensions. Columns: the dimensions, by their
        labels; the coordinates along them (token_id, position, role, ..; text as categories); the variables.

    Raises:
        ValueError: no trace, an unknown variable or layer, variables of different dimensions, a table too large.

    >>> over = ("layer", "batch", "token", "channel")
    >>> trace = xr.Dataset(
    ...     {"delta": (over, np.ones((1, 1, 3, 1)))},
    ...     {"layer": [4], "valid": (("batch", "token"), [[True, True, False]])},
    ...     {"schema_version": 1, "family": "mamba"})
    >>> frame_of(trace, "delta")
       layer  batch  token  channel  delta
    0      4      0      0        0    1.0
    1      4      0      1        0    1.0
    """
    import pandas as pd

    names = [variables] if isinstance(variables, str) else list(variables)
    held = xr.Dataset({name: _variable(trace, name) for name in names})
    dims = _alike(held)
    if layers is not None:
        held = _of_layers(held, layers)
    valid = _valid(held, dims)
    held = held.drop_vars("valid", errors="ignore")
    entries = prod(held.sizes[dim] for dim in dims)
    weight = sum(_width(column.dtype) for column in _along(held, dims))
    share = entries if valid is None else entries // max(1, valid.size) * int(valid.sum())
    check_table(share, weight, len(dims), max_memory)
    rows = None if valid is None else np.flatnonzero(np.broadcast_to(valid, [held.sizes[dim] for dim in dims]))
    columns = places(held, dims, rows)
    for name in names:
        values = held[name].values.ravel()
        columns[name] = values if rows is None else values[rows]
    return pd.DataFrame(columns, copy=False)


def check_table(rows: int, weight: int, n_dims: int, max_memory: int | str | None) -> None:
    """Check that a table, and the indices of its making, fit into memory.

    Args:
        rows: of the table.
        weight: bytes of a row.
        n_dims: dimensions that are told apart, eight bytes a row each while it is made.
        max_memory: see `frame_of`.

    Raises:
        ValueError: they do not.
    """
    most = free_memory() if max_memory is None else n_bytes(max_memory)
    needed = rows * (weight + 8 * (n_dims + 1))
    if needed > most:
        what = f"{readable(most)} of memory are free" if max_memory is None else f"max_memory is {readable(most)}"
        raise ValueError(
            f"a table of {rows:,} rows weighs {readable(rows * weight)}, {readable(needed)} while it is made, and"
            f" {what}: ask for fewer variables or layers, take a part first (.isel(batch=[..])), or pass a"
            " larger max_memory"
        )


def places(of: xr.Dataset, dims: Sequence[str], rows: np.ndarray | None = None) -> dict[str, Any]:
    """Columns that say where each entry stands: its labels along `dims`, and the coordinates along them.

    Args:
        of: has the dimensions and coordinates.
        dims: of the entries, the last of which runs first.
        rows: numbers of the entries that are kept; None is all.

    >>> where = places(xr.Dataset(coords={"layer": [3, 5], "role": ("token", ["key", "value"])}), ("layer", "token"))
    >>> where["layer"].tolist(), where["token"].tolist(), where["role"].tolist()
    ([3, 3, 5, 5], [0, 1, 0, 1], ['key', 'value', 'key', 'value'])
    """
    shape = tuple(of.sizes[dim] for dim in dims)
    index = np.arange(prod(shape)) if rows is None else rows
    at = dict(zip(dims, np.unravel_index(index, shape) if dims else (), strict=True))
    columns = {dim: _taken(of[dim].values, (at[dim],)) for dim in dims}
    for name, coord in of.coords.items():
        if name not in dims and coord.dims and set(coord.dims) <= set(dims):
            columns[str(name)] = _taken(coord.values, tuple(at[str(dim)] for dim in coord.dims))
    return columns


def _taken(values: np.ndarray, index: tuple[np.ndarray, ...]) -> Any:
    """Entries of an array; of text, as categories."""
    import pandas as pd

    if not _is_text(values.dtype):
        return values[index]
    known, codes = np.unique(values.astype(str), return_inverse=True)
    return pd.Categorical.from_codes(codes.reshape(values.shape)[index], known)


def _is_text(dtype: np.dtype) -> bool:
    return dtype.kind in "OUST"


def _width(dtype: np.dtype) -> int:
    return 8 if _is_text(dtype) else dtype.itemsize


def _variable(trace: xr.Dataset, name: str) -> xr.DataArray:
    if name in DERIVED and name not in trace:
        return getattr(trace.probe, name)
    check_held(trace)
    if name not in trace.data_vars:
        raise unknown_name("variable", name, tuple(map(str, trace.data_vars)))
    return trace[name]


def _alike(held: xr.Dataset) -> tuple[str, ...]:
    """The dimensions of all."""
    by_dims: dict[tuple[str, ...], list[str]] = {}
    for name, array in held.data_vars.items():
        by_dims.setdefault(tuple(map(str, array.dims)), []).append(str(name))
    if len(by_dims) != 1:
        listing = "; ".join(f"{', '.join(names)} over ({', '.join(dims)})" for dims, names in by_dims.items())
        raise ValueError(
            "a table has one kind of row, and needs variables of equal dimensions; got"
            f" {listing or 'none'}: make a table of each kind"
        )
    return next(iter(by_dims))


def _of_layers(held: xr.Dataset, layers: Sequence[int]) -> xr.Dataset:
    known = np.atleast_1d(held["layer"].values).tolist()
    for layer in layers:
        if layer not in known:
            raise unknown_name("layer", layer, tuple(map(str, known)))
    return held.sel(layer=list(layers))


def _valid(held: xr.Dataset, dims: Sequence[str]) -> np.ndarray | None:
    """What is no padding, to be broadcast over `dims`; None where nothing can be."""
    if "valid" not in held.coords or not set(held["valid"].dims) <= set(dims):
        return None
    valid = held["valid"].transpose(*(dim for dim in dims if dim in held["valid"].dims))
    return valid.values.reshape([held.sizes[dim] if dim in valid.dims else 1 for dim in dims])


def _along(held: xr.Dataset, dims: Sequence[str]) -> list[xr.DataArray]:
    """What becomes a column."""
    coords = [coord for name, coord in held.coords.items() if name not in dims and coord.dims]
    return [*(held[dim] for dim in dims), *(c for c in coords if set(c.dims) <= set(dims)), *held.data_vars.values()]
