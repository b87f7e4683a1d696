"""Stores from anyone: what a Zarr folder or a netCDF file names is checked before anything of it is opened.

Both formats can name code (codecs, filters), other files (links, external storage) and sizes that no disk holds. A
store of ours names none of these, so all are refused; docs/security.md has the limits.
"""

import os
import re
from collections.abc import Iterator, Mapping
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.untrusted import read_object

__all__ = ["CHUNK_BYTES", "CODECS", "LOADED_BYTES", "MOST_CHUNKS", "check_opened", "check_store", "loaded"]

CODECS = frozenset({"bytes", "vlen-utf8", "transpose", "zstd", "gzip", "blosc", "crc32c", "sharding_indexed"})
"""Zarr codecs that are decoded: those of its own specification. Any other may be anyone's plug-in, or a pickle."""
DTYPES = {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)} | {
    "bool": 1, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16, "string": 8,
}  # fmt: skip
"""Bytes of an entry by Zarr's data type; of text, those of its place in the array."""
_FLETCHER32 = 3
FILTERS = frozenset({1, 2, _FLETCHER32})
"""HDF5's own filters: deflate, shuffle, fletcher32. Any other is a plug-in that HDF5 would load."""
MOST_CHUNKS = 2_000_000
"""Chunks of a store: dask makes a task, about 1 KB, of each when it is opened."""
CHUNK_BYTES = 4 << 30
"""Bytes of one chunk, which is read whole."""
LOADED_BYTES = 4 << 30
"""Bytes that are read at once when a store or a run is opened: coordinates, texts, weights' small stores."""
_NAME = re.compile(r"[^/\\.\0][^/\\\0]*")
"""What a variable may be called: a name with a slash or a leading dot would be a path."""
_NO_VARIABLE = b"This is a netCDF dimension but not"[:20]
"""How netCDF 4 marks what stands for the length of a dimension alone; its values are never read."""
_NOTHING = np.array([0, 0], dtype=object)
_VERSION_2 = frozenset({".zarray", ".zgroup", ".zattrs", ".zmetadata"})


def check_store(path: Path) -> None:
    """Check a store's files and metadata; no data are read, nothing that it names is followed.

    Args:
        path: an existing `.zarr` folder or `.nc` file; it may itself be a link, since the user named it.

    Raises:
        ValueError: a link or special file in the store, a codec, filter or data type that we never write, more
            chunks than `MOST_CHUNKS`, a chunk above `CHUNK_BYTES`, or metadata that are damaged.
        OSError: a netCDF file that HDF5 cannot open.
    """
    _check_zarr(path) if path.suffix == ".zarr" else _check_netcdf(path)


def check_opened(dataset: xr.Dataset) -> None:
    """Check what opening a store is about to read: its coordinates and texts, and attributes that are our JSON.

    Raises:
        ValueError: they take more than `LOADED_BYTES`, or an attribute is no text.
    """
    at_once = [v for n, v in dataset.variables.items() if n in dataset.coords or v.dtype.kind in "TOUS"]
    _refuse_many(sum(variable.nbytes for variable in at_once), "its coordinates and texts")
    for owner in (dataset, *dataset.variables.values()):
        wrong = [name for name, value in owner.attrs.items() if not isinstance(value, str)]
        if wrong:
            raise ValueError(f"attribute {str(wrong[0])!r} is no JSON text, which mamba_probe writes")


def loaded(dataset: xr.Dataset) -> xr.Dataset:
    """The Dataset in memory.

    Raises:
        ValueError: it takes more than `LOADED_BYTES`.
    """
    _refuse_many(dataset.nbytes, f"this store of {sorted(map(str, dataset.variables))}")
    return dataset.load()


def _refuse_many(n_bytes: int, what: str) -> None:
    if n_bytes > LOADED_BYTES:
        raise ValueError(f"{what} would take {n_bytes:,} bytes of memory; at most {LOADED_BYTES:,} are read at once")


def _size(name: str, shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> np.ndarray:
    """How many chunks an array has, and its bytes if it is a line: xarray reads those named as their dimension."""
    if prod(chunk) * itemsize > CHUNK_BYTES:
        raise ValueError(f"{name} has chunks of {chunk}, more than {CHUNK_BYTES:,} bytes: rechunk it")
    number = prod(ceil(size / each) for size, each in zip(shape, chunk, strict=True))
    if number > MOST_CHUNKS:
        raise ValueError(f"{name} of shape {shape} has {number:,} chunks of {chunk}; at most {MOST_CHUNKS:,} are read")
    return np.array([number, shape[0] * itemsize if len(shape) == 1 else 0], dtype=object)


def _refuse_total(path: Path, total: np.ndarray) -> None:
    if total[0] > MOST_CHUNKS:
        raise ValueError(f"{path} has {total[0]:,} chunks; at most {MOST_CHUNKS:,} are read")
    _refuse_many(total[1], f"{path}: its variables of one dimension")


def _check_zarr(path: Path) -> None:
    total = _NOTHING  # metadata that are there twice are counted twice
    for file in _files(path.resolve()):
        if file.name in _VERSION_2:
            raise ValueError(f"{file} is of Zarr 2, whose filters may be pickles; mamba_probe writes Zarr 3")
        if file.name == "zarr.json":
            total = total + _check_node(file)
    _refuse_total(path, total)


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a folder, each a plain one."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)
                else:
                    what = "a link" if entry.is_symlink() else "no plain file"
                    raise ValueError(f"{entry.path} is {what}: a store of mamba_probe holds files alone")


def _check_node(file: Path) -> np.ndarray:
    """Chunks and bytes in lines of a zarr.json's array; of a group, those of the arrays whose metadata it repeats."""
    node = read_object(file)
    try:
        if node.get("node_type") == "array":
            return _check_array(str(file.parent), node)
        below = (node.get("consolidated_metadata") or {}).get("metadata", {})
        wrong = [name for name, each in below.items() if not _NAME.fullmatch(name) or each["node_type"] != "array"]
        if wrong:
            raise ValueError(f"{file} names {wrong[0]!r}, which is no array of this store")
        return sum((_check_array(str(file.parent / name), each) for name, each in below.items()), _NOTHING)
    except (KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is damaged: no metadata of an array ({type(error).__name__}: {error})") from error


def _check_array(name: str, node: Mapping[str, Any]) -> np.ndarray:
    kind = node["data_type"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{name} has data_type {kind!r}; mamba_probe writes {', '.join(DTYPES)}")
    if node.get("storage_transformers"):
        raise ValueError(f"{name} names storage transformers; mamba_probe writes none")
    chunks = [node["chunk_grid"]["configuration"]["chunk_shape"]]
    for codec in _codecs(node["codecs"]):
        if codec["name"] not in CODECS:
            raise ValueError(f"{name} names the codec {codec['name']!r}, which is not decoded; {sorted(CODECS)} are")
        if codec["name"] == "sharding_indexed":
            chunks.append(codec["configuration"]["chunk_shape"])
    shape = _sizes(name, node["shape"], 0)
    return max((_size(name, shape, _sizes(name, chunk, 1), DTYPES[kind]) for chunk in chunks), key=lambda size: size[0])


def _codecs(given: Any) -> Iterator[Mapping[str, Any]]:
    """Codecs, and those within a shard."""
    for codec in given:
        yield codec
        inner = codec.get("configuration", {})
        for key in ("codecs", "index_codecs"):
            yield from _codecs(inner.get(key, ()))


def _sizes(name: str, given: Any, least: int) -> tuple[int, ...]:
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= least for size in given):
        raise ValueError(f"{name} has sizes {given!r}; whole numbers of at least {least} are needed")
    return tuple(given)


def _check_netcdf(path: Path) -> None:
    import h5py

    with h5py.File(path, "r") as file:
        total = _NOTHING
        for name in file:
            link = file.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink) or file.get(name, getclass=True) is not h5py.Dataset:
                raise ValueError(f"{path}: {name} is a link or a group; a store of mamba_probe holds variables alone")
            total = total + _check_hdf5(f"{path}: {name}", file[name])
        _refuse_total(path, total)
        for name in file:
            _refuse_lost(f"{path}: {name}", file[name])


def _refuse_lost(name: str, variable: Any) -> None:
    """HDF5 gives a fill value where it finds no chunk, and checks no chunk that is marked as one without a checksum; an
    axis of no coordinate is kept without any chunk."""
    if variable.chunks is None or not min(variable.shape) or variable.attrs.get("NAME", b"")[:20] == _NO_VARIABLE:
        return
    layout = variable.id.get_create_plist()
    checksum = sum(1 << i for i in range(layout.get_nfilters()) if layout.get_filter(i)[0] == _FLETCHER32)
    needed = list(product(*(range(0, size, each) for size, each in zip(variable.shape, variable.chunks, strict=True))))
    found = [variable.id.get_chunk_info_by_coord(start) for start in needed]  # as a read looks for it
    there = sum(chunk.byte_offset is not None and not chunk.filter_mask & checksum for chunk in found)
    if there != len(needed):
        raise ValueError(f"{name} is damaged: {there} of its {len(needed)} chunks are there")


def _check_hdf5(name: str, variable: Any) -> np.ndarray:
    """As `_size`, of an HDF5 dataset."""
    import h5py

    layout = variable.id.get_create_plist()
    if layout.get_external_count() or variable.is_virtual:
        raise ValueError(f"{name} is kept in other files; a store of mamba_probe is one file")
    filters = {layout.get_filter(i)[0] for i in range(layout.get_nfilters())}
    if not filters <= FILTERS:
        raise ValueError(f"{name} names HDF5 filter {max(filters - FILTERS)}, which is not decoded; {FILTERS} are")
    dtype = variable.dtype
    if h5py.check_string_dtype(dtype) is None and np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"{name} has data of {dtype}; mamba_probe writes numbers, bool and text")
    held = variable.shape if variable.attrs.get("NAME", b"")[:20] != _NO_VARIABLE else ()
    if not held or not min(held):
        return _NOTHING
    return _size(name, held, variable.chunks or held, dtype.itemsize)
