"""Whether the rows of several traces are the same prompts."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["check_paired"]


def check_paired(traces: Mapping[Hashable, Any]) -> str:
    """Check that row i of every trace is the same prompt, and say by what.

    The valid token ids of each row are compared, wherever padding stands; of traces without `token_id` (hidden
    states), `prompt_id` and `valid`.

    Raises:
        ValueError: the first difference.
    """
    (first, trace), *others = traces.items()
    for label, other in others:
        if trace.sizes["batch"] != other.sizes["batch"]:
            counts = f"{first!r} has {trace.sizes['batch']} rows, {label!r} has {other.sizes['batch']}"
            raise _unpaired(counts)
    names = [name for name in ("token_id", "prompt_id") if all(_by_row(one, name) for one in traces.values())]
    if not names:
        raise _unpaired("the traces have neither token_id nor prompt_id in common")
    for label, other in others:
        for row in range(trace.sizes["batch"]):
            _check_row(names[0], row, (first, trace), (label, other))
    return (
        "token_id" if names[0] == "token_id" else "prompt_id and valid (no token_id: whether inputs agree is unknown)"
    )


def _by_row(trace: xr.Dataset | xr.DataArray, name: str) -> bool:
    return name in trace.coords and "batch" in trace[name].dims


def _check_row(
    name: str, row: int, ours: tuple[Hashable, xr.Dataset | xr.DataArray], theirs: tuple[Hashable, Any]
) -> None:
    a, b = (_read(trace, name, row) for _, trace in (ours, theirs))
    alike = np.flatnonzero(a[: len(b)] != b[: len(a)])
    where = f"{name} differs in row {row} of `batch`"
    if len(alike):
        at = f" at valid token {alike[0]}" if name == "token_id" else ""
        raise _unpaired(f"{where}{at}: {a[alike[0]]} in {ours[0]!r}, {b[alike[0]]} in {theirs[0]!r}")
    lengths = [len(a), len(b)] if name == "token_id" else [_length(trace, row) for _, trace in (ours, theirs)]
    if lengths[0] != lengths[1]:
        raise _unpaired(
            f"row {row} of `batch` has {lengths[0]} valid tokens in {ours[0]!r}, {lengths[1]} in {theirs[0]!r}"
        )


def _read(trace: xr.Dataset | xr.DataArray, name: str, row: int) -> np.ndarray:
    values = np.atleast_1d(trace[name].isel(batch=row).values)
    if name == "token_id" and "valid" in trace.coords:
        return values[trace["valid"].isel(batch=row).values.astype(bool)]
    return values


def _length(trace: xr.Dataset | xr.DataArray, row: int) -> int:
    return int(trace["valid"].isel(batch=row).sum()) if "valid" in trace.coords else -1


def _unpaired(reason: str) -> ValueError:
    return ValueError(
        f"rows can be paired only where they are the same prompts: {reason}. Record all on the same rows, or pass"
        " paired=False for the wider interval of independent rows"
    )
