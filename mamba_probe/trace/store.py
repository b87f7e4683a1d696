"""Zarr and netCDF stores of traces and results: one codec, exact round trips.

Both stores choke on None, bool and dict attributes, so every attribute is written as JSON; strings are stored with
variable length and come back as objects. A store appears under its name only once it is whole.
"""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import validate

__all__ = ["check_free", "open_dataset", "open_trace", "remove", "save"]

SUFFIXES = (".zarr", ".nc")
PAIR = "real_imag"
"""Last dimension of a complex variable in a store: its real and its imaginary part."""


def save(dataset: xr.Dataset, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a trace or a result.

    Args:
        dataset: any Dataset whose attributes JSON can hold.
        path: ends in `.zarr` (a directory) or `.nc` (netCDF 4).
        overwrite: replace what exists; it is removed only after the new store is whole.

    Raises:
        ValueError: unknown suffix, an attribute that JSON cannot hold, or the path exists and `overwrite` is False.

    >>> import tempfile, xarray as xr
    >>> path = save(xr.Dataset({"a": ("layer", [1.0])}, attrs={"solved": None}), tempfile.mkdtemp() + "/r.nc")
    >>> open_dataset(path).attrs
    {'solved': None}
    """
    path = check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = _encode(dataset)
    partial = path.with_name(path.name + ".partial")
    remove(partial)
    if path.suffix == ".zarr":
        coded.to_zarr(partial, mode="w", consolidated=False)
    else:
        coded.to_netcdf(partial, engine="h5netcdf", format="NETCDF4")
    remove(path)
    partial.rename(path)
    return path


def check_free(path: str | PathLike[str], overwrite: bool) -> Path:
    """`path`, if a store may be written there.

    Raises:
        ValueError: unknown suffix, or the path exists and `overwrite` is False.
    """
    path = _checked_suffix(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: pass overwrite=True (--overwrite) to replace it, or choose another path")
    return path


def open_dataset(path: str | PathLike[str]) -> xr.Dataset:
    """Open what `save` wrote, lazily (dask-backed).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unknown suffix, or a damaged store.
    """
    path = _checked_suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}")
    try:
        if path.suffix == ".zarr":
            coded = xr.open_zarr(_guarded(path), chunks={}, consolidated=False)
        else:
            coded = xr.open_dataset(path, engine="h5netcdf", chunks={})
        return _decode(coded)
    except (OSError, KeyError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read: truncated, damaged, or not written by mamba_probe ({error})"
        ) from error


def open_trace(path: str | PathLike[str]) -> xr.Dataset:
    """Open a recorded trace, lazily, and check it against the schema.

    Args:
        path: what `trace.probe.save` or `record(store=...)` wrote.

    Returns:
        The trace, dask-backed: values are read when they are used.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a damaged store, or a Dataset that is no trace (what was needed and what came).
    """
    trace = open_dataset(path)
    validate(trace)
    return trace


def _guarded(path: Path) -> Any:
    """A Zarr store that refuses to read once another has taken its name: lazy arrays would change silently."""
    from zarr.storage import LocalStore

    opened = path.stat().st_ino

    class GuardedStore(LocalStore):
        async def get(self, *args: Any, **kwargs: Any) -> Any:
            if not path.exists() or path.stat().st_ino != opened:
                raise ValueError(f"{path} was replaced or removed since it was opened: open it again")
            return await super().get(*args, **kwargs)

    return GuardedStore(path, read_only=True)


def _checked_suffix(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a store's name ends in one of {SUFFIXES}; got {path.name!r}")
    return path


def remove(path: Path) -> None:
    """Delete a store if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _encode(dataset: xr.Dataset) -> xr.Dataset:
    """Attributes as JSON, strings as variable-length objects, complex as real pairs, no encoding left over."""
    coded = dataset.copy()
    coded.attrs = _json(dataset.attrs)
    for name, variable in coded.variables.items():
        if variable.dtype.kind in "UT":
            coded[name] = (variable.dims, variable.values.astype(object), variable.attrs)
        if variable.dtype.kind == "c":
            data: Any = variable.data
            pairs = np.stack([data.real, data.imag], axis=-1)
            coded[name] = ((*variable.dims, PAIR), pairs, variable.attrs)
        coded[name].attrs = _json(variable.attrs)
    return coded.drop_encoding()


def _json(attrs: dict[Any, Any]) -> dict[str, str]:
    try:
        return {name: json.dumps(value) for name, value in attrs.items()}
    except TypeError as error:
        raise ValueError(
            f"an attribute cannot be stored as JSON ({error}); attributes: {sorted(map(str, attrs))}"
        ) from error


def _decode(coded: xr.Dataset) -> xr.Dataset:
    dataset = coded.assign_coords({name: coord.load() for name, coord in coded.coords.items()})
    dataset.attrs = {name: json.loads(value) for name, value in coded.attrs.items()}
    for name, variable in dataset.variables.items():
        attrs = {key: json.loads(value) for key, value in variable.attrs.items()}
        if variable.dtype.kind in "TOU":
            dataset[name] = (variable.dims, np.asarray(variable.values, dtype=object), attrs)
        if PAIR in variable.dims:
            data: Any = variable.data
            pairs = data.rechunk({-1: 2})
            dtype = np.result_type(pairs.dtype, np.complex64)
            joined = pairs.map_blocks(lambda block, to=dtype: _joined(block, to), drop_axis=-1, dtype=dtype)
            dataset[name] = (variable.dims[:-1], joined, attrs)
        dataset[name].attrs = attrs
    return dataset


def _joined(pairs: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(pairs).view(dtype)[..., 0]
