"""Zarr and netCDF stores of traces and results: one codec, exact round trips.

A store appears under its name only once it is whole; one that a recording streams to (`mamba_probe.trace.stream`)
appears at once, and gives the blocks of rows that are whole.
"""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.arguments import path_like
from mamba_probe.trace.blocks import FINISHED, whole_rows, without_unknown, write_whole
from mamba_probe.trace.coding import SEAL, check_seal, decoded, encoded, header_of, seal_of
from mamba_probe.trace.contract import validate
from mamba_probe.trace.untrusted import check_opened, check_store

__all__ = ["check_free", "check_suffix", "open_dataset", "open_trace", "remove", "save", "seal"]

SUFFIXES = (".zarr", ".nc")


def save(dataset: xr.Dataset, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a trace or a result, with a checksum on every chunk.

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
    coded = encoded(dataset)
    partial = path.with_name(f"partial.{path.name}")
    remove(partial)
    if path.suffix == ".zarr":
        from zarr.codecs import Crc32cCodec

        checked = {name: {"compressors": [Crc32cCodec()]} for name in coded.variables}
        coded.to_zarr(
            partial, mode="w", zarr_format=3, consolidated=False, encoding=checked, write_empty_chunks=True
        )  # fmt: skip
    else:
        checked = {name: {"fletcher32": True} for name, array in coded.variables.items() if _checkable(array)}
        coded.to_netcdf(partial, engine="h5netcdf", format="NETCDF4", encoding=checked)
    seal(partial)
    remove(path)
    partial.rename(path)
    return path


def seal(path: Path) -> None:
    """Write a store's seal, which `open_dataset` checks; a Zarr store's metadata are put together in one file."""
    with _raw(path, consolidated=False) as coded:
        found = seal_of(_held(coded, path))
    if path.suffix == ".nc":
        import h5py

        with h5py.File(path, "r+") as file:
            file.attrs[SEAL] = found
        return
    root = json.loads((path / "zarr.json").read_text())
    arrays = {str(name): json.loads((path / str(name) / "zarr.json").read_text()) for name in coded.variables}
    root["attributes"] = root.get("attributes", {}) | {SEAL: found}
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    partial = path / "zarr.json.partial"
    partial.write_text(json.dumps(root, indent=2))
    partial.replace(path / "zarr.json")


def check_free(path: str | PathLike[str], overwrite: bool) -> Path:
    """`path`, if a store may be written there.

    Raises:
        ValueError: unknown suffix, or the path exists and `overwrite` is False.
    """
    path = check_suffix(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: pass overwrite=True (--overwrite) to replace it, or choose another path")
    return path


def open_dataset(path: str | PathLike[str]) -> xr.Dataset:
    """Open what `save` or a recording wrote, lazily (dask-backed).

    Of a recording that was broken off, the blocks of rows that are whole, with a warning that says how many are
    missing.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unknown suffix, or a damaged store (a chunk that is damaged is refused when it is read).
    """
    path = check_suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}")
    try:
        check_store(path)
        coded = _raw(path)
        check_opened(coded)
        check_seal(coded.attrs.pop(SEAL, None), _held(coded, path), str(path))
        return whole_rows(decoded(coded), path)
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


def _raw(path: Path, consolidated: bool | None = None) -> xr.Dataset:
    """The Dataset as it is coded."""
    if path.suffix == ".nc":
        return xr.open_dataset(path, engine="h5netcdf", chunks={})
    from mamba_probe.trace.guarded import GuardedStore

    root = json.loads((path / "zarr.json").read_text())
    checked = consolidated is False or SEAL in root.get("attributes", {})
    together = "consolidated_metadata" in root if consolidated is None else consolidated
    return xr.open_zarr(GuardedStore(path, checked=checked), chunks={}, consolidated=together)


def _held(coded: xr.Dataset, path: Path) -> xr.Dataset:
    """What the seal is of: in netCDF also the values of what has no checksum there, strings and single numbers."""
    if path.suffix == ".zarr":
        return coded
    bare = {str(name): repr(array.values.tolist()) for name, array in coded.variables.items() if not _checkable(array)}
    return coded.assign_attrs({f"values of {name}": text for name, text in bare.items()})


def _checkable(array: Any) -> bool:
    """Whether netCDF can put a checksum on it."""
    return array.ndim > 0 and array.size > 0 and np.dtype(array.dtype).kind in "biufc"


def check_suffix(path: str | PathLike[str]) -> Path:
    """`path`, if a store may have this name.

    Raises:
        ValueError: unknown suffix.
    """
    path = Path(path_like("a store", path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a store's name ends in one of {SUFFIXES}; got {path.name!r}")
    return path


def remove(path: Path) -> None:
    """Delete a store if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
