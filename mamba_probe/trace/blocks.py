"""Which rows of a streamed store are whole: its journal, a small file for each block of rows, written last.

A block is what one model call began: its rows, their coordinates and every layer of every variable. A store holds the
blocks that have an entry, and nothing else of what its arrays may hold counts.
"""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr
from google_crc32c import value as crc32c

from mamba_probe.trace.coding import NARROWED, jsoned

__all__ = [
    "FINISHED", "UNKNOWN", "Block", "Drift", "committed", "entry", "journal", "whole_rows", "without_unknown",
    "write_entry", "write_whole",
]  # fmt: skip

FINISHED = "finished"
"""The attribute of a streamed store: whether no more rows will come than its arrays have room for."""
UNKNOWN = ("token_id", "position", "prediction", "parent_row")
"""Coordinates that are left out of a trace where every entry is -1."""


@dataclass(frozen=True)
class Drift:
    """What narrowing did to the valid entries of a variable: sums over blocks, so that blocks can be joined."""

    largest_difference: float = 0.0
    largest: float = 0.0
    squared_difference: float = 0.0
    squared: float = 0.0

    def __add__(self, other: "Drift") -> "Drift":
        return Drift(
            max(self.largest_difference, other.largest_difference),
            max(self.largest, other.largest),
            self.squared_difference + other.squared_difference,
            self.squared + other.squared,
        )

    @property
    def errors(self) -> tuple[float, float]:
        """max|a - b| / max|b| and the ratio of root mean squares; 0 where everything is 0."""
        ratio = (self.squared_difference / self.squared) ** 0.5 if self.squared else 0.0
        return self.largest_difference / self.largest if self.largest else 0.0, ratio


@dataclass(frozen=True)
class Block:
    """Rows first to first + rows, whole, of `length` tokens."""

    number: int
    first: int
    rows: int
    length: int
    drift: Mapping[str, Drift] = field(default_factory=dict)


def journal(path: Path) -> Path:
    """The folder of a store's journal."""
    return path / "journal"


def write_entry(path: Path, block: Block) -> None:
    """Enter a block: from now on the store holds it. One rename, so that it is there or not."""
    text = json.dumps(asdict(block), sort_keys=True)
    target = journal(path) / f"block-{block.number:09d}.json"
    write_whole(target, _checked(text))


def _checked(text: str) -> str:
    """What a file of the journal holds."""
    return json.dumps({"block": text, "crc32c": crc32c(text.encode())})


def write_whole(path: Path, text: str) -> None:
    """Write a file by one rename, once its bytes are on the disk: whatever happens, the old one is there or the new."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def committed(path: Path) -> list[Block]:
    """The blocks that a store holds, in order.

    Raises:
        ValueError: a damaged entry.
    """
    return [entry(file) for file in sorted(journal(path).glob("block-*.json"))]


def entry(file: Path) -> Block:
    """An entry of the journal.

    Raises:
        ValueError: it is damaged.
    """
    try:
        held = file.read_text()
        text = json.loads(held)["block"]
        if held != _checked(text):
            raise ValueError("its checksum is not that of its text")
        found: dict[str, Any] = json.loads(text)
        if found["number"] != int(file.stem.removeprefix("block-")):
            raise ValueError("it is another block's")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: a damaged entry of the journal ({error}): without it it is unknown whether its rows are whole."
            " Remove that file to record its rows again with resume=True"
        ) from error
    drift = {name: Drift(**one) for name, one in found.pop("drift").items()}
    return Block(**found, drift=drift)


def whole_rows(coded: xr.Dataset, path: Path) -> xr.Dataset:
    """Of an encoded Dataset that a recording streamed, the rows of the blocks that are whole."""
    blocks = committed(path)
    rows = [row for one in blocks for row in range(one.first, one.first + one.rows)]
    there, finished = coded.sizes["batch"], json.loads(coded.attrs[FINISHED])
    whole = coded.copy()
    whole.attrs = {name: value for name, value in coded.attrs.items() if name != FINISHED}
    if len(rows) < there or not finished:
        known = f"{len(rows)} of {there} rows" if finished else f"{len(rows)} rows"
        warnings.warn(f"{path}: the recording was broken off, and holds {known}", UserWarning, stacklevel=4)
        whole = whole.assign_attrs(jsoned({"broken_off": f"holds {known}"}))
    for name, variable in whole.variables.items():
        if NARROWED in variable.attrs:
            drift = sum((one.drift[str(name)] for one in blocks if name in one.drift), Drift())
            largest, rms = drift.errors
            variable.attrs |= jsoned({"narrowing_error": largest, "narrowing_error_rms": rms})
    if len(rows) < there:
        prefix = rows == list(range(len(rows)))
        whole = whole.isel(batch=slice(len(rows)) if prefix else rows)
    longest = max((one.length for one in blocks), default=0)
    return whole.isel(token=slice(longest)) if 0 < longest < whole.sizes.get("token", 0) else whole


def without_unknown(trace: xr.Dataset) -> xr.Dataset:
    """A decoded trace without the coordinates that no row knows: a store has room for all, as a row may come to."""
    return trace.drop_vars([name for name in UNKNOWN if name in trace.coords and (trace[name].values == -1).all()])
