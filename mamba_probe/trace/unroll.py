"""Sequences out of rows that beam search reordered: every token's row is followed back to the prompt."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import check_held

__all__ = ["unrolled"]


def unrolled(trace: xr.Dataset, sequences: Any = None) -> xr.Dataset:
    r"""A trace whose rows are sequences, each with its own history.

    Where a sequence has its token t in row $r_t$, it has the one before it in $r_{t-1} = \mathrm{parent\_row}(r_t, t)$.

    Args:
        trace: a recording of `generate()`, or of any code that reorders the rows of a cache.
        sequences: (sequence, token) ids that `generate()` returned: each is found among all that was tried, also when
            its beam had ended before the others did. Its last token was drawn and never fed, so that it is not in the
            trace, nor is the padding after it. None: the rows as they stand at the last recorded token.

    Returns:
        The trace with one row a sequence; `prompt_id` and `call` are those of the row in which it ends, `parent_row` is
        gone. Tokens after a sequence's end are NaN, with `valid` False.

    Raises:
        ValueError: no trace, no `parent_row`, a parent that a selection left out, rows of several recordings,
            or ids that were not recorded, or in several calls.

    >>> steps = {"token_id": [[5, 8], [6, 9]], "parent_row": [[0, 1], [1, 0]]}
    >>> rows = {"prompt_id": ("batch", [0, 1]), "call": ("batch", [0, 0])}
    >>> coords = {name: (("batch", "token"), values) for name, values in steps.items()} | rows
    >>> trace = xr.Dataset(coords=coords, attrs={"schema_version": 1, "family": "mamba"})
    >>> unrolled(trace)["token_id"].values
    array([[6, 8],
           [5, 9]])
    """
    check_held(trace, "parent_row", "prompt_id", "call")
    parent = _by_place(trace)
    n_row, n_token = parent.shape
    ends = [(row, n_token - 1) for row in range(n_row)] if sequences is None else _found(trace, parent, sequences)
    row, last = np.array(ends).T
    rows = np.repeat(row[:, None], n_token, axis=1)
    for token in range(n_token - 1, 0, -1):
        before = parent[rows[:, token], token]
        rows[:, token - 1] = np.where((token <= last) & (before >= 0), before, rows[:, token])
    return _taken(trace.drop_vars("parent_row"), rows, np.arange(n_token) <= last[:, None])


def _by_place(trace: xr.Dataset) -> np.ndarray:
    """parent_row as places along `batch`; -1 where a row has no token."""
    parent, known = trace["parent_row"].transpose("batch", "token").values, trace["prompt_id"].values
    if len(np.unique(known)) < len(known):
        raise ValueError("the trace was put together of several, whose rows share a `prompt_id`: unroll each by itself")
    missing = (parent >= 0) & ~np.isin(parent, known)
    if missing.any():
        row, at = map(int, np.argwhere(missing)[0])
        raise ValueError(
            f"row {known[row]} continues row {parent[row, at]} at token {at}, and this selection has no such row:"
            " unroll the whole trace, and select then"
        )
    order = np.argsort(known)
    return np.where(parent < 0, -1, order[np.searchsorted(known, parent, sorter=order).clip(0, len(order) - 1)])


def _found(trace: xr.Dataset, parent: np.ndarray, sequences: Any) -> list[tuple[int, int]]:
    """The row and token where each of the sequences ends."""
    check_held(trace, "token_id")
    ids = np.asarray(sequences)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"sequences needs integer ids (sequence, token); got {ids.dtype} of shape {ids.shape}")
    fed, call = trace["token_id"].transpose("batch", "token").values, trace["call"].values
    return [_end(parent, fed, call, one, at) for at, one in enumerate(ids)]


def _end(parent: np.ndarray, fed: np.ndarray, call: np.ndarray, ids: np.ndarray, at: int) -> tuple[int, int]:
    """Where the longest beginning of `ids` that was fed ends; what is left of it is one token, and padding."""
    here, n_fed = np.arange(len(fed)), 0
    for token in range(min(len(ids), fed.shape[1])):
        after = fed[:, token] == ids[token]
        after &= np.isin(parent[:, token], here) if token else True
        if not after.any():
            break
        here, n_fed = np.flatnonzero(after), token + 1
    if not n_fed or len(np.unique(ids[n_fed + 1 :])) > 1:
        raise ValueError(
            f"sequence {at} was not recorded: no row went on with id {ids[n_fed]} at token {n_fed}, and more than"
            " padding follows. Pass the ids that generate() returned in this recording"
        )
    if len(np.unique(call[here])) > 1:
        raise ValueError(
            f"sequence {at} was recorded in several calls, {sorted(set(call[here].tolist()))}: pass the rows of one,"
            " trace.isel(batch=trace.call == ...).probe.unrolled(ids)"
        )
    return int(here[0]), n_fed - 1


def _taken(trace: xr.Dataset, rows: np.ndarray, within: np.ndarray) -> xr.Dataset:
    """The entries (row, token) of everything over batch and token, absent where a sequence has ended."""
    absent: dict[str, Any] = {"valid": False, "phase": "", "token_text": "", "role": ""}
    both = {
        "batch": xr.DataArray(rows, dims=("batch", "token")),
        "token": xr.DataArray(range(rows.shape[1]), dims="token"),
    }
    inside = xr.DataArray(within, dims=("batch", "token"))
    made: dict[Any, Any] = {}
    for name, array in trace.variables.items():
        if "batch" not in array.dims:
            continue
        if "token" not in array.dims:
            made[name] = array.isel(batch=rows[:, -1])
            continue
        one = xr.DataArray(array).isel(both).transpose(*array.dims)
        fill = absent.get(str(name), np.nan if array.dtype.kind in "fc" else -1)
        made[name] = (array.dims, one.where(inside, fill).astype(array.dtype).data, array.attrs)
    every = {name: made.get(name, array) for name, array in trace.variables.items()}
    return xr.Dataset({n: every[n] for n in trace.data_vars}, {n: every[n] for n in trace.coords}, trace.attrs)
