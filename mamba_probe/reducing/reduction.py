"""What a reduction is, and what ours share: rows of a piece by class of token and unit of resampling, named arrays."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from mamba_probe.analyses.common import interval

__all__ = [
    "ALL",
    "MEMBER",
    "UNIT",
    "UNITS",
    "Accumulating",
    "Part",
    "Reduction",
    "bounded",
    "dealt",
    "n_units",
    "parts",
]

ALL = "all"
"""The class of every token."""
MEMBER = "member"
"""Coordinate of a piece, over (class, batch, token): whether a token is of a class; never at padding."""
UNIT = "unit"
"""Coordinate of a piece, over batch: which unit of resampling a row belongs to."""
UNITS = 32
"""Units that rows are dealt to, for intervals: memory does not grow with the rows."""


@runtime_checkable
class Reduction(Protocol):
    """Folds pieces of a trace into numbers, and forgets them.

    `variables` are the trace's variables that it needs. `update` is given a trace of some rows, in order, each row
    once, with `valid`, `member` (class, batch, token), `unit` (batch) and the labels of its input. `result` is a
    Dataset.
    """

    variables: tuple[str, ...]

    def update(self, trace: xr.Dataset) -> None:
        """Fold in the next rows."""
        ...

    def result(self) -> xr.Dataset:
        """What was found of all rows."""
        ...


@dataclass(frozen=True)
class Part:
    """One row of a piece: its place there, its unit, and which of its valid tokens are of each class."""

    row: int
    unit: int
    valid: Bool[np.ndarray, " token"]
    members: dict[str, Bool[np.ndarray, " valid"]]


def parts(trace: xr.Dataset) -> Iterator[Part]:
    """Rows of a piece in order; without the coordinate `member` every token is of the class "all" alone."""
    valid = trace["valid"].transpose("batch", "token").values.astype(bool)
    units = trace[UNIT].values if UNIT in trace.coords else np.zeros(len(valid), int)
    members = {ALL: valid}
    if MEMBER in trace.coords:
        held = trace[MEMBER].transpose("class", "batch", "token")
        members = dict(zip(held["class"].values.tolist(), held.values, strict=True))
    for row, (real, unit) in enumerate(zip(valid, units.tolist(), strict=True)):
        found = {name: member[row, real] for name, member in members.items() if member[row, real].any()}
        yield Part(row, unit, real, found)


def dealt(rows: slice, n_rows: int) -> Int[np.ndarray, " row"]:
    """Unit of each row: runs of neighbouring rows, which may share a document, as equal as can be.

    >>> dealt(slice(0, 5), 64).tolist()
    [0, 0, 1, 1, 2]
    """
    return np.arange(rows.start, rows.stop) * min(UNITS, n_rows) // n_rows


def bounded(
    statistic: Callable[[Int[np.ndarray, " unit"]], np.ndarray], n_units: int, n_bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """A statistic of all units, and the ends of its interval over draws of them, by the ending of its name."""
    low, high = interval(statistic, n_units, n_bootstrap, seed)
    return {"": np.asarray(statistic(np.ones(n_units, dtype=int))), "_low": low, "_high": high}


class Accumulating(ABC):
    """A reduction that is its arrays, each of a class of tokens ("" for none) and a name: so it can be saved."""

    variables: tuple[str, ...]

    def __init__(self, n_bootstrap: int = 200, seed: int = 0):
        if n_bootstrap < 2:
            raise ValueError(f"n_bootstrap is at least 2; got {n_bootstrap}")
        self.n_bootstrap, self.seed = n_bootstrap, seed
        self.arrays: dict[tuple[str, str], np.ndarray] = {}

    @abstractmethod
    def update(self, trace: xr.Dataset) -> None:
        """See `Reduction`."""

    @abstractmethod
    def result(self) -> xr.Dataset:
        """See `Reduction`."""

    def held(self, of: str, name: str, shape: tuple[int, ...], dtype: type = float) -> np.ndarray:
        """An array of a class, of zeros where the class is new."""
        return self.arrays.setdefault((of, name), np.zeros(shape, dtype))

    def keep(self, constants: Mapping[str, object]) -> None:
        """Hold what is the same in every piece, as arrays that a file takes."""
        for name, value in constants.items():
            array = np.asarray(value)
            self.arrays.setdefault(("", name), array.astype(str) if array.dtype == object else array)

    def constant(self, name: str) -> np.ndarray:
        """What `keep` holds.

        Raises:
            ValueError: nothing was folded in yet.
        """
        if ("", name) not in self.arrays:
            raise ValueError(f"{self!r} was given no rows yet: update(trace) it first, or pass it to probe.reduce")
        return self.arrays["", name]

    @property
    def classes(self) -> list[str]:
        """Classes of tokens that were seen, "all" first."""
        return sorted({of for of, _ in self.arrays if of}, key=lambda name: (name != ALL, name))

    @property
    def drawn(self) -> str:
        """How its intervals are drawn."""
        return f"n_bootstrap={self.n_bootstrap}, seed={self.seed}"


def n_units(trace: xr.Dataset) -> int:
    """How many units the rows of the whole input are dealt to."""
    return int(trace.attrs.get("n_units", 1))
