"""A Zarr store that a recording streams to: whole at every moment, whatever stops the writing.

Rows come in blocks. A block's arrays lie in chunks of their own, so that what is written of one block never touches
another's, and its entry in the journal (`mamba_probe.trace.blocks`) comes last: a store holds a block whole or not at
all. Zarr writes each chunk beside its place and renames it, so no chunk is ever half there. One process writes a
store, or several that were told their shares (`shard`): the folder is locked, and a second writer is refused.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.trace.blocks import FINISHED, Block, Drift, committed, journal, write_entry
from mamba_probe.trace.chunk import flush, write_chunk
from mamba_probe.trace.coding import NARROWED, SEAL, check_seal, encoded, jsoned
from mamba_probe.trace.store import seal, zarr_header
from mamba_probe.trace.writers import Shard, cleared, joined, locked, locked_shard, sweep
from mamba_probe.untrusted import read_object

__all__ = ["COMPRESSIONS", "IDENTITY", "NARROWABLE", "Layout", "Stream"]

IDENTITY = "recording"
"""The attribute of a streamed store that says what is recorded in it, as JSON: a resumed recording must be the same."""
CHUNK = 2**26
"""Bytes of a chunk at most, where tokens can be parted."""
GROWING = 64
"""Tokens of a chunk at least, where later rows may be longer than the first."""
COMPRESSIONS = ("zstd", "lz4")
NARROWABLE = ("float16",)


@dataclass(frozen=True)
class Layout:
    """How a store lies on disk.

    Arguments:
        rows: of a block, and so of a chunk.
        n_row: of the whole recording; None where that is not known, and the store grows.
        compress: "zstd" or "lz4" (with a byte shuffle), or None.
        narrow: variables, and the dtype that they are stored in.
    """

    rows: int
    n_row: int | None = None
    compress: str | None = None
    narrow: Mapping[str, str] = field(default_factory=dict)

    def codecs(self, itemsize: int) -> list[Any]:
        """Of a Zarr array: compression, and the checksum last."""
        from zarr.codecs import BloscCodec, Crc32cCodec

        if self.compress is None:
            return [Crc32cCodec()]
        cname: Any = self.compress
        return [BloscCodec(cname=cname, clevel=1, shuffle="shuffle", typesize=itemsize), Crc32cCodec()]


class Stream:
    """A store under construction. Made by `create` or `resume`; `close` it."""

    def __init__(self, path: Path, layout: Layout, locks: list[int]):
        import zarr

        self.path, self._layout, self._locks = path, layout, locks
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        self._labels: dict[str, Any] = dict(group.attrs)
        found: dict[str, Any] = dict(group.arrays())
        self._arrays = {name: array.with_config({"write_empty_chunks": True}) for name, array in found.items()}
        self._dims = {name: tuple(array.metadata.dimension_names or ()) for name, array in self._arrays.items()}
        shapes = ((self._dims[name], array.shape) for name, array in found.items())
        self._size: dict[Any, int] = {dim: n for dims, shape in shapes for dim, n in zip(dims, shape, strict=True)}
        self.done = frozenset(block.number for block in committed(path))

    @classmethod
    def create(
        cls, path: Path, first: xr.Dataset, layout: Layout, identity: Mapping[str, Any], shard: Shard | None = None
    ) -> "Stream":
        """A new store, with no block yet.

        Args:
            path: must not exist.
            first: as the first block: its variables, coordinates and attributes; of what has rows only shapes and
                dtypes are taken, the rest is written.
            layout: how it lies on disk.
            identity: what is recorded, to be equal when it is resumed.
            shard: this process' number, and of how many that write the store.

        Raises:
            ValueError: another writer.
            OSError: a file system without locks.
        """
        partial, lock = cleared(path)
        locks = [lock]
        try:
            _make(partial, first, layout, identity)
            if shard is not None:
                fcntl.flock(lock, fcntl.LOCK_SH)  # others may join as soon as it has its name
            if path.exists():
                raise ValueError(f"{path} was made by another process meanwhile: choose another store")
            partial.rename(path)
            if shard is not None:
                locks.append(locked_shard(path, shard))
            return cls(path, layout, locks)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for each in locks:
                os.close(each)
            raise

    @classmethod
    def resume(cls, path: Path, layout: Layout, identity: Mapping[str, Any], shard: Shard | None = None) -> "Stream":
        """Go on with a store; with a `shard`, beside other processes.

        Raises:
            ValueError: another writer; a store of something else (each difference named), or one that was not streamed.
        """
        locks = [locked(path, path, fcntl.LOCK_EX) if shard is None else joined(path)]
        try:
            if shard is None:
                sweep(path)
            else:
                locks.append(locked_shard(path, shard))
            _check_same(path, identity)
            return cls(path, layout, locks)
        except BaseException:
            for lock in locks:
                os.close(lock)
            raise

    def put(self, name: str, layer: int, first: int, values: np.ndarray, valid: np.ndarray) -> Drift | None:
        """Write one layer of a variable for a block that begins at row `first`; what narrowing it did.

        Args:
            layer: its place in the store.
            values: (batch, token, ...); NaN at padding.
            valid: (batch, token).
        """
        drift = None
        if name in self._layout.narrow:
            values, drift = _narrowed(name, values, valid, self._layout.narrow[name])
        if values.dtype.kind == "c":
            values = np.stack([np.real(values), np.imag(values)], axis=-1)
        where = self._arrays[name]
        if values.dtype != where.dtype:
            raise ValueError(f"`{name}` came as {values.dtype}, and the store holds {where.dtype}")
        whole = (1, values.shape[0], where.chunks[2], *values.shape[2:]) == where.chunks
        if self._layout.compress is None and whole and sys.byteorder == "little":
            self._put_chunks(name, layer, first, values)
        else:
            where[layer, first : first + values.shape[0], : values.shape[1]] = values
        return drift

    def _put_chunks(self, name: str, layer: int, first: int, values: np.ndarray) -> None:
        """`put`, of rows that fill their chunks, by chunks of tokens; the last of these may be short."""
        length = self._arrays[name].chunks[2]
        for at in range(0, values.shape[1], length):
            part = values[:, at : at + length]
            if part.shape[1] < length:
                rest = np.full((part.shape[0], length - part.shape[1], *part.shape[2:]), np.nan, part.dtype)
                part = np.concatenate([part, rest], axis=1)
            place = (layer, first // self._layout.rows, at // length, *[0] * (part.ndim - 2))
            write_chunk(self.path / name, place, part)

    def read(self, name: str, layer: int, first: int, rows: int) -> np.ndarray:
        """What lies there of one layer and block, as it is stored."""
        return np.asarray(self._arrays[name][layer, first : first + rows])

    def enter(self, number: int, first: int, rows: xr.Dataset, drift: Mapping[str, Drift]) -> None:
        """A block's coordinates, and, once all of it is on the disk, its entry: from here on the store holds it.

        Args:
            number: of the block.
            first: its first row.
            rows: coordinates over (batch, token) and batch; data variables are not looked at.
            drift: by narrowed variable.
        """
        coded = encoded(rows.drop_vars(list(rows.data_vars)))
        at = slice(first, first + rows.sizes["batch"])
        for name, variable in coded.variables.items():
            if "batch" in variable.dims:
                self._put_rows(str(name), at, variable)
        flush(self._chunks(at.start, at.stop))
        write_entry(self.path, Block(number, first, rows.sizes["batch"], rows.sizes.get("token", 0), drift))

    def _chunks(self, first: int, last: int) -> Iterator[Path]:
        """The files of rows first to last, without the last."""
        rows = range(first // self._layout.rows, -(-last // self._layout.rows))
        for name, array in self._arrays.items():
            dims = self._dims[name]
            if "batch" in dims:
                counts = zip(dims, array.cdata_shape, strict=True)
                for place in product(*(rows if dim == "batch" else range(n) for dim, n in counts)):
                    yield self.path.joinpath(name, "c", *map(str, place))

    def _put_rows(self, name: str, at: slice, variable: Any) -> None:
        array = self._arrays[name]
        array[(at, *(slice(n) for n in variable.shape[1:]))] = variable.values

    def reserve(self, n_row: int, token: Sequence[int]) -> None:
        """Make room for `n_row` rows in all, with `token` as the tokens of the longest."""
        held, length = self._size["batch"], self._size["token"]
        if n_row <= held and len(token) <= length:
            return
        self._size |= {"batch": max(n_row, held), "token": max(len(token), length)}
        for name, array in self._arrays.items():
            dims = self._dims[name]
            if {"batch", "token"} & set(dims):
                array.resize(tuple(self._size[dim] for dim in dims))
        flush(self.path / name / "zarr.json" for name in self._arrays)
        if len(token) > length:
            self._lengthen(held, length, np.asarray(token))
        seal(self.path)

    def _lengthen(self, held: int, length: int, token: np.ndarray) -> None:
        """Rows that are there have no more tokens: their new places are filled, as every chunk must be there."""
        for name, array in self._arrays.items():
            if self._dims[name] == ("token",):
                array[:] = token
            elif "token" in self._dims[name] and held:
                known = {"batch": slice(held), "token": slice(length, len(token))}
                array[tuple(known.get(dim, slice(None)) for dim in self._dims[name])] = array.fill_value
        flush([*self._chunks(0, held), *(self.path / "token" / "c").iterdir()])

    def label(self, attrs: Mapping[str, Any]) -> None:
        """Set attributes of the trace that are known only now, with the seal in one rename, a process at a time."""
        coded = jsoned(attrs)
        if coded == {name: self._labels.get(name) for name in coded}:
            return
        turn = os.open(journal(self.path), os.O_RDONLY)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            self._labels = seal(self.path, coded)
        finally:
            os.close(turn)

    def close(self, finished: bool = False) -> None:
        """Let other writers in; `finished` where a store that grows has every row."""
        try:
            if finished and self._locks:
                self.label({FINISHED: True})
        finally:
            while self._locks:
                os.close(self._locks.pop())


def _make(path: Path, first: xr.Dataset, layout: Layout, identity: Mapping[str, Any]) -> None:
    """A store without a block."""
    import zarr

    known = {FINISHED: layout.n_row is not None, IDENTITY: json.dumps(dict(identity), sort_keys=True)}
    coded = encoded(first.assign_attrs(known))
    coords = " ".join(str(name) for name in coded.coords if name not in coded.dims)
    group = zarr.create_group(path, zarr_format=3, attributes=coded.attrs | {"coordinates": coords})
    zarr.create_group(journal(path), zarr_format=3)
    for name, variable in coded.variables.items():
        _create(group, str(name), variable, layout)
    flush(file for file in path.rglob("*") if file.is_file())
    seal(path, names=[str(name) for name in coded.variables])


def _create(group: Any, name: str, variable: Any, layout: Layout) -> None:
    """An array of the store for one encoded variable; what has no rows is written."""
    sizes = dict(zip(variable.dims, variable.shape, strict=True))
    rows = "batch" in sizes
    attrs = dict(variable.attrs)
    kind = np.dtype(variable.dtype)
    if name in layout.narrow:
        kind = np.dtype(layout.narrow[name])
        attrs |= jsoned({NARROWED: kind.name})
    chunk = dict(sizes)
    if rows:
        sizes["batch"], chunk["batch"] = layout.n_row or 0, layout.rows
        chunk |= {"layer": 1} if "layer" in chunk else {}
        per_token = kind.itemsize * int(np.prod([n for dim, n in chunk.items() if dim != "token"]))
        length = chunk.get("token", 1) if layout.n_row else max(GROWING, chunk.get("token", 1))
        chunk["token"] = max(1, min(length, CHUNK // max(1, per_token)))
        chunk = {dim: chunk[dim] for dim in sizes}
    is_text = kind.kind in "OT"
    array = group.create_array(
        name, shape=tuple(sizes.values()), chunks=tuple(max(1, n) for n in chunk.values()),
        dtype="string" if is_text else kind, compressors=layout.codecs(kind.itemsize),
        fill_value=_absent(kind), dimension_names=tuple(map(str, variable.dims)), attributes=attrs,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    if not rows:
        array[...] = variable.values


def _absent(kind: np.dtype) -> Any:
    """What stands where a row has no token."""
    return {"f": np.nan, "b": False, "i": -1, "O": "", "T": ""}.get(kind.kind, 0)


def _narrowed(name: str, values: np.ndarray, valid: np.ndarray, dtype: str) -> tuple[np.ndarray, Drift]:
    """The values in a narrower dtype, and what that did to the valid ones.

    Raises:
        ValueError: one of them does not fit.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    true = values[valid].astype(np.float64)
    found = narrow[valid].astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(
            f"`{name}` reaches {np.abs(true).max():.3g}, and {dtype} ends at {np.finfo(dtype).max:.3g}: leave it out of"
            " narrow="
        )
    apart = np.abs(found - true)
    return narrow, Drift(
        float(apart.max(initial=0)), float(np.abs(true).max(initial=0)), float((apart**2).sum()), float((true**2).sum())
    )


def _check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Check that a store is whole but for its rows, and of the same recording."""
    root = read_object(path / "zarr.json")
    attrs = root.get("attributes", {})
    check_seal(attrs.get(SEAL), zarr_header(root), path)
    held = attrs.get(IDENTITY)
    if held is None:
        raise ValueError(f"{path} was not streamed by a recording, so it cannot be resumed: choose another store")
    before, now = json.loads(json.loads(held)), json.loads(json.dumps(dict(identity)))
    apart = [f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in sorted({*before, *now})
             if before.get(name) != now.get(name)]  # fmt: skip
    if apart:
        raise ValueError(f"{path} holds another recording, so it cannot be resumed: {'; '.join(apart)}")
    for name, array in root["consolidated_metadata"]["metadata"].items():
        if read_object(path / name / "zarr.json") != array:
            raise ValueError(f"{path / name / 'zarr.json'} is damaged: it is not what {path / 'zarr.json'} repeats")
