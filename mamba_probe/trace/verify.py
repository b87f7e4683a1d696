"""Every byte of a store against its checksums: what is damaged, and how much of a recording is whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from mamba_probe.progress import bar
from mamba_probe.trace.blocks import FINISHED, Block, entry, journal
from mamba_probe.trace.coding import SEAL, check_seal
from mamba_probe.trace.guarded import damage
from mamba_probe.trace.store import check_suffix, netcdf_header, raw, zarr_header
from mamba_probe.trace.sums import SUMS, check_sums, parts
from mamba_probe.trace.untrusted import check_store
from mamba_probe.untrusted import read_object

__all__ = ["Damage", "Verified", "stores_in", "verify"]

GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
"""The metadata of the journal's folder."""
FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError)
"""What reading a damaged file may raise."""
Said = Callable[[str], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written.

    Arguments:
        what: it is, in words.
        file: in the store.
        variable: whose values it holds, if any.
        where: first and last index of them by dimension.
    """

    what: str
    file: str = ""
    variable: str = ""
    where: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        spans = [f"{dim} {low}" if low == high else f"{dim} {low} to {high}" for dim, (low, high) in self.where.items()]
        place = f"`{self.variable}`{': ' * bool(spans)}{', '.join(spans)} " if self.variable else ""
        return f"{place}({self.file}): {self.what}" if self.file else f"{place}{self.what}"


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Arguments:
        path: of the store.
        damages: all that is not as it was written.
        chunks, nbytes: that were read and compared with their checksums.
        rows: whole, and in all, of a recording that streamed there; None of another store.
        finished: whether no more rows are to come.
    """

    path: Path
    damages: tuple[Damage, ...]
    chunks: int
    nbytes: int
    rows: tuple[int, int] | None = None
    finished: bool = True

    @property
    def whole(self) -> bool:
        """Nothing is damaged, and nothing is missing."""
        return not self.damages and self.finished

    def __repr__(self) -> str:
        head = f"{self.path}: {'whole' if self.whole else 'damaged' if self.damages else 'broken off'}"
        lines = [f"{head}, {self.chunks:,} chunk(s), {self.nbytes:,} bytes read"]
        if self.rows is not None and not self.finished:
            lines.append(
                f"  {self.rows[0]} of {self.rows[1]} rows are whole; record again with resume=True for the rest"
            )
        return "\n".join(lines + [f"  {each}" for each in self.damages])


def verify(path: str | PathLike[str], *, progress: bool = False) -> Verified:
    """Compare every byte of a store with its checksums, a chunk at a time.

    In a Zarr store each chunk has a CRC-32C, each entry of the journal another, and the metadata a SHA-256; in netCDF
    each chunk has a Fletcher-32, what is read of each variable a CRC-32, and the rest of the Dataset a SHA-256.

    Args:
        path: of a `.zarr` or `.nc` that `save` or a recording wrote.
        progress: a bar, on a terminal (stderr) or in a notebook.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unknown suffix.

    >>> import tempfile, xarray as xr
    >>> from mamba_probe.trace import save
    >>> path = save(xr.Dataset({"a": ("layer", [1.0, 2.0])}), tempfile.mkdtemp() + "/r.zarr")
    >>> chunk = path / "a" / "c" / "0"
    >>> _ = chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    >>> print(verify(path).damages[0])
    `a`: layer 0 to 1 (a/c/0): chunk a/c/0 is damaged: its checksum is not that of its bytes
    """
    path = check_suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}")
    return (_Zarr if path.suffix == ".zarr" else _NetCDF)(path).found(progress)


def stores_in(path: str | PathLike[str]) -> list[Path]:
    """A store, or all stores of a run's directory.

    Raises:
        FileNotFoundError: nothing, or no store is there.
    """
    path = Path(path)
    if path.suffix in (".zarr", ".nc"):
        return [path]
    inner = [each for suffix in ("zarr", "nc") for each in path.rglob(f"*.{suffix}")]
    found = sorted(each for each in inner if not any(up.suffix == ".zarr" for up in each.relative_to(path).parents))
    if not found:
        raise FileNotFoundError(f"{path} is no store (*.zarr, *.nc), and holds none")
    return found


class _Reader:
    """Collects what is damaged."""

    def __init__(self, path: Path):
        self.path, self.chunks, self.nbytes = path, 0, 0
        self.damages: list[Damage] = []

    def tried(self, file: str, call: Callable[..., Any], *given: Any) -> Any:
        """`call`, whose fault is a damage; None then."""
        try:
            return call(*given)
        except FAULTS as error:
            self.damages.append(Damage(str(error) or type(error).__name__, file))
            return None


class _Zarr(_Reader):
    def found(self, progress: bool) -> Verified:
        self.tried("", check_store, self.path)
        root = self.tried("zarr.json", self._root)
        if root is None:
            return Verified(self.path, tuple(self.damages), 0, 0)
        attrs, arrays = root["attributes"], root["consolidated_metadata"]["metadata"]
        streamed = FINISHED in attrs
        growing = attrs.get(FINISHED) == "false"
        for name, array in arrays.items():
            self._own(name, array, growing)
        blocks = self._journal() if streamed else []
        total = max((n for array in arrays.values() for n in _rows(array)), default=0)
        kept = sorted((one.first, one.first + one.rows) for one in blocks)
        with bar(f"verifying {self.path.name}", len(arrays), progress) as step:
            for name, array in arrays.items():
                step(name)
                self._chunks(name, array, kept if streamed else [(0, total)])
                step("")
        n_row = sum(last - first for first, last in kept)
        finished = not streamed or (n_row == total and not growing)
        rows = (n_row, total) if streamed else None
        return Verified(self.path, tuple(self.damages), self.chunks, self.nbytes, rows, finished)

    def _root(self) -> dict[str, Any]:
        root = read_object(self.path / "zarr.json")
        seal = root.get("attributes", {}).get(SEAL)
        if seal is None or "consolidated_metadata" not in root:
            raise ValueError("it has no seal: damaged, or written before stores had checksums")
        check_seal(seal, zarr_header(root), self.path)
        return root

    def _own(self, name: str, array: Mapping[str, Any], growing: bool) -> None:
        """The metadata beside an array; what a growing store was killed in may have another shape."""
        file = f"{name}/zarr.json"
        own = self.tried(file, read_object, self.path / file)
        if own is not None and own != array and not (growing and {**own, "shape": 0} == {**array, "shape": 0}):
            self.damages.append(Damage("it is not what the root's zarr.json repeats", file))

    def _journal(self) -> list[Block]:
        folder, blocks = journal(self.path), []
        held = self.tried("journal/zarr.json", read_object, folder / "zarr.json")
        if held not in (None, GROUP):
            self.damages.append(Damage("it is not what was written", "journal/zarr.json"))
        for file in sorted(folder.glob("block-*.json")):
            one = self.tried(f"journal/{file.name}", entry, file)
            if one is not None:
                blocks.append(one)
        numbers = [one.number for one in blocks]
        for gap in sorted(set(range(max(numbers, default=0))) - set(numbers)):
            name = f"block-{gap:09d}.json"
            if not (folder / name).exists() and not list(folder.glob("shard-*")):
                self.damages.append(Damage("this entry is missing, so its rows count for nothing", f"journal/{name}"))
        return blocks

    def _chunks(self, name: str, array: Mapping[str, Any], kept: Sequence[tuple[int, int]]) -> None:
        dims, shape = array.get("dimension_names") or [], array["shape"]
        sizes = array["chunk_grid"]["configuration"]["chunk_shape"]
        for index in product(*(range(-(-n // size)) for n, size in zip(shape, sizes, strict=True))):
            spans = {
                str(dim): (i * size, min(n, (i + 1) * size) - 1)
                for dim, i, size, n in zip(dims, index, sizes, shape, strict=True)
            }
            low, high = spans.get("batch", (0, 0))
            if "batch" in spans and not any(first <= high and low < last for first, last in kept):
                continue
            self._chunk(name, "/".join([name, "c", *map(str, index)]), spans)

    def _chunk(self, name: str, key: str, spans: Mapping[str, tuple[int, int]]) -> None:
        file = self.path / key
        try:
            data = file.read_bytes() if file.is_file() else None
        except OSError as error:
            self.damages.append(Damage(f"it cannot be read: {error.strerror}", key, name, spans))
            return
        wrong = damage(key, data)
        if wrong:
            self.damages.append(Damage(wrong, key, name, spans))
        self.chunks, self.nbytes = self.chunks + 1, self.nbytes + len(data or b"")


class _NetCDF(_Reader):
    def found(self, progress: bool) -> Verified:
        import h5py

        self.tried("", check_store, self.path)
        if not self.damages:
            self.tried("", self._header)
        with bar(f"verifying {self.path.name}", None, progress) as step:
            file = None if self.damages else self.tried("", h5py.File, self.path, "r")
            if file is not None:
                with file:
                    for name in file:
                        step(name)
                        self.tried(name, self._variable, name, file[name])
                    if not self.damages:
                        self.tried("", check_sums, file.attrs.get(SUMS), file)
        return Verified(self.path, tuple(self.damages), self.chunks, self.nbytes)

    def _header(self) -> None:
        with raw(self.path) as coded:
            check_seal(coded.attrs.get(SEAL), netcdf_header(coded), self.path)
            self._dims = {str(name): tuple(map(str, variable.dims)) for name, variable in coded.variables.items()}

    def _variable(self, name: str, variable: Any) -> None:
        for at in parts(variable):
            spans = dict(zip(self._dims.get(name, ()), ((part.start, part.stop - 1) for part in at), strict=False))
            try:
                part = variable[at]
            except FAULTS as error:
                self.damages.append(Damage(f"a chunk is damaged: {error}", "", name, spans))
                continue
            self.chunks, self.nbytes = self.chunks + 1, self.nbytes + getattr(part, "nbytes", 0)


def _rows(array: Mapping[str, Any]) -> list[int]:
    dims = array.get("dimension_names") or []
    return [n for dim, n in zip(dims, array["shape"], strict=True) if dim == "batch"]
