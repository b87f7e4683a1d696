"""How far a reduction has come, in one file that is always whole."""

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mamba_probe.reducing.reduction import Accumulating

__all__ = ["Progress"]

SAME = ("model_hash", "inputs_sha256", "by", "reductions", "backend", "dtype", "versions", "edits", "batch_size")
"""What a call must share with the one that wrote a file, to go on with it to the same bits."""


class Progress:
    """The arrays of reductions and the rows that are in them, saved and read again; of no path nothing is done.

    Arguments:
        path: `*.npz`, or None.
        folded: reductions; where the file is there they get its arrays.
        attrs: what the call is.

    Raises:
        ValueError: a reduction that cannot be saved; a file of another call, or none of ours.
    """

    def __init__(self, path: str | PathLike[str] | None, folded: Sequence[Any], attrs: Mapping[str, Any]):
        self._path, self._folded = None if path is None else Path(path), folded
        self._call = json.dumps({name: attrs[name] for name in SAME})
        self.rows = 0
        if self._path is None:
            return
        if self._path.suffix != ".npz":
            raise ValueError(f"a checkpoint's name ends in .npz; got {self._path.name!r}")
        foreign = [one for one in folded if not isinstance(one, Accumulating)]
        if foreign:
            raise ValueError(f"checkpoint= keeps reductions of mp.reduce; {foreign[0]!r} cannot be saved")
        if self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                said = json.loads(str(held["said"]))
                arrays = [held[f"array_{i}"] for i in range(len(said["names"]))]
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is no checkpoint of a reduction, or damaged ({error}): remove it") from error
        ours, theirs = json.loads(self._call), json.loads(said["call"])
        other = [name for name in SAME if ours[name] != theirs.get(name)]
        if other:
            raise ValueError(
                f"{path} is of another call: its {other[0]} is {theirs.get(other[0])}, not {ours[other[0]]}. Choose"
                " another checkpoint=, or remove it"
            )
        self.rows = int(said["rows"])
        for (one, of, name), array in zip(said["names"], arrays, strict=True):
            self._folded[one].arrays[of, name] = array

    def save(self, rows: int) -> None:
        """Write the arrays, with the first `rows` rows in them; what was there stays till this is whole."""
        self.rows = rows
        if self._path is None:
            return
        names = [(i, *key) for i, one in enumerate(self._folded) for key in one.arrays]
        arrays = {f"array_{i}": self._folded[one].arrays[of, name] for i, (one, of, name) in enumerate(names)}
        said = json.dumps({"call": self._call, "rows": rows, "names": names})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, said=np.array(said), **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
