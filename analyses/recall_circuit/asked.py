"""What a task trace asks, and whether the model answers it."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.recall_circuit.core import Questions
from mamba_probe.trace import require

__all__ = ["Asked", "no_task", "read_task"]


def no_task(trace: xr.Dataset) -> str:
    """Why a trace asks nothing; empty when it does."""
    if "role" not in trace.coords:
        return "the trace has no task roles (record a task, e.g. mp.tasks.mqar, with probe.record(task))"
    if not (trace["role"] == "query").any():
        return "no token has the role query"
    return ""


@dataclass(frozen=True)
class Asked:
    """The queries of a trace over (batch, token), and the vocabulary of values."""

    query: Bool[np.ndarray, "batch token"]
    correct: Bool[np.ndarray, "batch token"]
    role: np.ndarray
    target: Int[np.ndarray, "batch token"]
    source: Int[np.ndarray, "batch token"]
    values: Int[np.ndarray, " value"]

    def questions(
        self, canonical: Canonical, row: int, which: Bool[np.ndarray, "batch token"], offset: int
    ) -> Questions:
        """The queries of one row in `which` with at least two candidate writes at `offset`, the largest scanned."""
        valid = canonical.valid[row]
        index = np.cumsum(valid) - 1
        pairs = index[(self.role[row] == "value") & valid]
        query = np.flatnonzero(which[row])
        query = query[((pairs + offset)[None] <= index[query][:, None]).sum(axis=1) >= 2]
        value = np.searchsorted(self.values, self.target[row, query])
        keys = np.isin(self.role[row][valid], ("key", "query"))
        return Questions(index[query], index[self.source[row, query]], value, pairs, keys)


def read_task(canonical: Canonical, values: Int[np.ndarray, " value"] | None) -> Asked:
    """Roles, answers and predictions of a trace.

    Args:
        canonical: the trace.
        values: token ids that a query may have to name; None: those the task says, else the targets that occur.

    Raises:
        ValueError: a coordinate is missing, or a query has no target, source or prediction.
    """
    trace = canonical.trace
    _check_gaps(canonical)
    require(trace, "target", "source_token")
    if "prediction" not in trace.coords:
        raise ValueError(
            "the trace has task roles but no `prediction`: without answers there is no accuracy to gate on. "
            "Record the task with a language model, whose logits give it."
        )
    role, target, source, prediction = (
        trace[name].transpose("batch", "token").values for name in ("role", "target", "source_token", "prediction")
    )
    query = (role == "query") & canonical.valid
    source = np.where(query, source - (int(trace["token"].values[0]) if "token" in trace.coords else 0), -1)
    for name, given in (("target", target), ("prediction", prediction), ("source_token", source)):
        if np.any(given[query] < 0):
            raise ValueError(
                f"`{name}` must be given at every query; {int((given[query] < 0).sum())} of {query.sum()} lack it"
            )
    _check_sources(role, source, query)
    if values is None and "answers" in trace.attrs:
        values = np.arange(*trace.attrs["answers"])
    return Asked(query, query & (prediction == target), role, target, source, _values(target[query], values))


def _check_gaps(canonical: Canonical) -> None:
    for row in range(canonical.n_rows):
        if not canonical.contiguous(row):
            raise ValueError(
                f"recall_circuit needs every token between a write and its read; row {row} has gaps. "
                "Record with tokens=None."
            )


def _check_sources(
    role: np.ndarray, source: Int[np.ndarray, "batch token"], query: Bool[np.ndarray, "batch token"]
) -> None:
    batch, token = np.nonzero(query)
    found = source[batch, token]
    wrong = (found >= token) | (role[batch, np.minimum(found, role.shape[1] - 1)] != "value")
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"`source_token` must name an earlier token with the role value; query {token[i]} of row {batch[i]} "
            f"names {found[i]}"
        )


def _values(targets: Int[np.ndarray, " query"], values: Int[np.ndarray, " value"] | None) -> Int[np.ndarray, " value"]:
    chosen = np.unique(targets if values is None else np.asarray(values))
    outside = np.setdiff1d(targets, chosen)
    if len(outside):
        raise ValueError(f"`values` must hold every target; it lacks {outside[:5].tolist()}")
    if len(chosen) < 2:
        raise ValueError(
            f"recall needs at least two possible values; got {chosen.tolist()}. Pass values= or record more rows"
        )
    return chosen
