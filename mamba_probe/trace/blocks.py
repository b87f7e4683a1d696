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

import numpy as np
import xarray as xr
from google_crc32c import value as crc32c

from mamba_probe.trace.coding import NARROWED

__all__ = ["FINISHED", "Block", "Drift", "committed", "journal", "whole_rows", "write_entry"]

FINISHED = "finished"
"""The attribute of a streamed store: whether no more rows will come than its arrays have room for."""


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
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"block": text, "crc32c": crc32c(text.encode())}))
    partial.replace(target)


def committed(path: Path) -> list[Block]:
    """The blocks that a store holds, in order.

    Raises:
        ValueError: a damaged entry.
    """
    return [_entry(file) for file in sorted(journal(path).glob("block-*.json"))]


def _entry(file: Path) -> Block:
    try:
        held = json.loads(file.read_text())
        text = held["block"]
        if crc32c(text.encode()) != held["crc32c"]:
            raise ValueError("its checksum is not that of its text")
        found: dict[str, Any] = json.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: a damaged entry of the journal ({error}): without it it is unknown whether its rows are whole."
            " Remove that file to record its rows again with resume=True"
        ) from error
    drift = {name: Drift(**one) for name, one in found.pop("drift").items()}
    return Block(**found, drift=drift)


def whole_rows(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    """The rows of the blocks that are whole; a store that was not streamed is one."""
    if FINISHED not in dataset.attrs:
        return dataset
    blocks = committed(path)
    rows = np.concatenate([np.arange(one.first, one.first + one.rows) for one in blocks] or [np.arange(0)]).astype(int)
    missing, finished = dataset.sizes["batch"] - len(rows), dataset.attrs.pop(FINISHED)
    if missing or not finished:
        known = f"{len(rows)} of {dataset.sizes['batch']} rows" if missing else f"{len(rows)} rows"
        warnings.warn(f"{path}: the recording was broken off, and holds {known}", UserWarning, stacklevel=4)
        dataset.attrs["broken_off"] = f"holds {known}"
    for name, variable in dataset.variables.items():
        if NARROWED in variable.attrs:
            drift = sum((one.drift[str(name)] for one in blocks if name in one.drift), Drift())
            largest, rms = drift.errors
            variable.attrs |= {"narrowing_error": largest, "narrowing_error_rms": rms}
    if len(rows) == dataset.sizes["batch"]:
        return dataset
    prefix = len(rows) == 0 or rows[-1] == len(rows) - 1
    return dataset.isel(batch=slice(len(rows)) if prefix else rows)
