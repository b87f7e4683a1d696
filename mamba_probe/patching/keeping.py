"""A sweep's result while it grows: cell by cell in memory, and in a Zarr store where one is given."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from mamba_probe.arguments import path_like
from mamba_probe.patching.pair import DIMS, recovered
from mamba_probe.trace.store import open_dataset, save

__all__ = ["Cells", "opened"]

SAME = {
    "model_hash": "model", "base_hash": "base", "source_hash": "source", "metric": "metric", "backend": "backend",
    "batch_size": "batch_size",
}  # fmt: skip
"""Attributes in which a store must agree with the sweep that goes on there, and what to call them."""


@dataclass
class Cells:
    """The result, of which a cell is one quantity of one layer."""

    result: xr.Dataset
    path: Path | None

    def missing(self) -> list[tuple[str, int]]:
        """Cells that are not measured yet."""
        places = zip(*np.nonzero(~self.result["measured"].values), strict=True)
        quantities, layers = (self.result[dim].values.tolist() for dim in DIMS[:2])
        return [(quantities[i], layers[j]) for i, j in places]

    def write(self, quantity: str, layer: int, patched: np.ndarray) -> None:
        """Take a cell (token, batch); the store says that it is there once it is."""
        at = self.result["quantity"].values.tolist().index(quantity), self.result["layer"].values.tolist().index(layer)
        base, source = self.result["base"].values, self.result["source"].values
        found = {"patched": patched, "recovered": recovered(patched - base, base, source), "measured": True}
        for name, value in found.items():
            self.result[name].values[at] = value
        if self.path is None:
            return
        import zarr

        group = zarr.open_group(self.path, mode="r+")
        for name, value in found.items():
            group[name][at] = value  # pyright: ignore[reportIndexIssue, reportArgumentType]


def opened(whole: xr.Dataset, store: str | PathLike[str] | None) -> Cells:
    """Cells of a sweep of which `whole` has all but these: a new store, or what an interrupted one left.

    Raises:
        ValueError: the store is no `*.zarr`, or of another sweep.
    """
    shape = tuple(whole.sizes[dim] for dim in DIMS)
    blank = whole.assign({name: (DIMS, np.full(shape, np.nan)) for name in ("patched", "recovered")})
    blank["measured"] = (DIMS[:2], np.zeros(shape[:2], bool))
    if store is None:
        return Cells(blank, None)
    path = Path(path_like("store", store))
    if path.suffix != ".zarr":
        raise ValueError(f"a sweep is kept in a store whose name ends in .zarr, which can grow; got {path.name!r}")
    if not path.exists():
        save(blank.chunk({"quantity": 1, "layer": 1}), path)
        return Cells(blank, path)
    before = open_dataset(path).load()
    _check_same(before, blank, path)
    return Cells(before, path)


def _check_same(before: xr.Dataset, now: xr.Dataset, path: Path) -> None:
    instead = "name another store, or remove it"
    if before.attrs.get("analysis") != "patching" or "measured" not in before:
        raise ValueError(f"{path} holds something else than a sweep: {instead}")
    for name, what in SAME.items():
        if before.attrs.get(name) != now.attrs[name]:
            raise _other(path, what, before.attrs.get(name), now.attrs[name], instead)
    for name in DIMS[:3]:
        if before[name].values.tolist() != now[name].values.tolist():
            raise _other(path, f"{name} axis", before[name].values.tolist(), now[name].values.tolist(), instead)
    rounding = 16 * torch.finfo(getattr(torch, now.attrs["dtype"])).eps
    for name in ("base", "source"):
        old, new = before[name].values, now[name].values
        if not np.allclose(old, new, rtol=0.0, atol=rounding * np.abs(old).max()):
            raise _other(path, f"metric: of the {name} it", old.tolist(), new.tolist(), instead)


def _other(path: Path, what: str, held: Any, asked: Any, instead: str) -> ValueError:
    return ValueError(f"{path} is a sweep with another {what}: there {held}, here {asked}; {instead}")
