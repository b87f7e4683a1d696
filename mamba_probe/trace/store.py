"""Zarr and netCDF stores of traces and results: one codec, exact round trips.

A store appears under its name only once it is whole; one that a recording streams to (`mamba_probe.trace.stream`)
appears at once, and gives the blocks of rows that are whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.arguments import path_like
from mamba_probe.trace.blocks import FINISHED, whole_rows, without_unknown, write_whole
from mamba_probe.trace.coding import SEAL, check_seal, decoded, encoded, header_of, seal_of
from mamba_probe.trace.contract import validate
from mamba_probe.trace.sums import CHECKED_BYTES, SUMS, check_sums, sums_of
from mamba_probe.trace.untrusted import check_opened, check_store
from mamba_probe.trace.writers import locked
from mamba_probe.untrusted import read_object

__all__ = [
    "check_free", "check_suffix", "netcdf_header", "open_dataset", "open_trace", "raw", "remove", "save", "seal",
    "zarr_header",
]  # fmt: skip

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
    seal(partial, names=[str(name) for name in coded.variables])
    remove(path)
    partial.rename(path)
    return path


def seal(path: Path, attrs: Mapping[str, str] | None = None, names: Iterable[str] | None = None) -> dict[str, str]:
    """Write a store's seal, which `open_dataset` checks; a Zarr store's metadata are put together in one file.

    Args:
        path: of the store.
        attrs: coded attributes of a Zarr store that are written with it.
        names: of its variables, where their metadata are not put together yet.

    Returns:
        All coded attributes.
    """
    if path.suffix == ".nc":
        return _seal_netcdf(path)
    root = json.loads((path / "zarr.json").read_text())
    known = root["consolidated_metadata"]["metadata"] if names is None else names
    arrays = {name: json.loads((path / name / "zarr.json").read_text()) for name in known}
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    root["attributes"] = root.get("attributes", {}) | dict(attrs or {})
    root["attributes"][SEAL] = seal_of(zarr_header(root))
    write_whole(path / "zarr.json", json.dumps(root, indent=1))
    return root["attributes"]


def _seal_netcdf(path: Path) -> dict[str, str]:
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs[SUMS] = sums_of(file)
    with raw(path) as coded:
        found = seal_of(netcdf_header(coded))
    with h5py.File(path, "r+") as file:
        file.attrs[SEAL] = found
    return coded.attrs


def _check_sums(path: Path, noted: str | None) -> None:
    """Of a netCDF file that is soon read."""
    import h5py

    if noted is not None and path.stat().st_size <= CHECKED_BYTES:
        with h5py.File(path, "r") as file:
            check_sums(noted, file)


def zarr_header(root: Mapping[str, Any]) -> dict[str, Any]:
    """What a Zarr store's seal is of: its root's metadata, and in them those of every array."""
    attrs = {name: value for name, value in root.get("attributes", {}).items() if name != SEAL}
    return {**root, "attributes": attrs}


def netcdf_header(coded: xr.Dataset) -> list[Any]:
    """What a netCDF store's seal is of: also the values of what has no checksum there, strings and single numbers."""
    bare = {str(name): repr(array.values.tolist()) for name, array in coded.variables.items() if not _checkable(array)}
    return [header_of(coded), bare]


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
        coded = raw(path)
        check_opened(coded)
        header = netcdf_header(coded) if path.suffix == ".nc" else zarr_header(read_object(path / "zarr.json"))
        check_seal(coded.attrs.pop(SEAL, None), header, path)
        _check_sums(path, coded.attrs.pop(SUMS, None))
        if FINISHED not in coded.attrs:
            return decoded(coded)
        return without_unknown(decoded(whole_rows(coded, path)))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:  # Zarr's own of odd metadata
        raise ValueError(
            f"{path} cannot be read: truncated, damaged, or not written by mamba_probe ({error})"
        ) from error
    except ValueError as error:  # Zarr's own of a name it does not know does not say whose
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error


def open_trace(path: str | PathLike[str]) -> xr.Dataset:
    """Open a recorded trace, lazily, and check it against the schema.

    Args:
        path: what `trace.probe.save` or `record(store=...)` wrote.

    Returns:
        The trace, dask-backed: values are read when they are used.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a run's folder, a damaged store, or a Dataset that is no trace (what was needed and what came).
    """
    inner = Path(path_like("a store", path)) / "trace.zarr"
    if inner.exists():
        raise ValueError(f"{path} is a run's folder: its trace is {inner}; mamba_probe.run.Run.open opens all of it")
    trace = open_dataset(path)
    validate(trace)
    return trace


def raw(path: Path) -> xr.Dataset:
    """The Dataset as it is coded."""
    if path.suffix == ".nc":
        return xr.open_dataset(path, engine="h5netcdf", chunks={})
    from mamba_probe.trace.guarded import GuardedStore

    root = read_object(path / "zarr.json")
    sealed, together = SEAL in root.get("attributes", {}), "consolidated_metadata" in root
    if together and not sealed:
        raise ValueError(f"{path}: the seal of its header is gone: restore it from a copy, or record it again")
    guarded = GuardedStore(path, checked=sealed)
    return xr.open_zarr(guarded, chunks={}, consolidated=together)


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
    """Delete a store if it is there.

    Raises:
        ValueError: a process writes to it.
    """
    if path.is_dir():
        lock = locked(path, path, fcntl.LOCK_EX)
        shutil.rmtree(path)
        os.close(lock)
    elif path.exists():
        path.unlink()
