"""The analyses of a recorded run, each result saved as netCDF."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses import hidden_attention, memory_horizon, recall_circuit, wavelet_alignment
from mamba_probe.run import Run
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.store import check_free, save

__all__ = ["ANALYSES", "MAIN", "analyse", "analyse_beside", "answerable_queries"]

SPREAD = 8
"""Queries a row of a text, evenly spread over it."""


def _wavelet(run: Run, seed: int) -> xr.Dataset:
    queries = answerable_queries(run.trace)
    twin = None if run.twin is None else run.twin[0]
    result = wavelet_alignment.measure(run.trace, query_tokens=queries, seed=seed, baseline=twin)
    rule = (
        "the last valid token" if queries is None else "the last query whose answer lies in its window, else the last"
    )
    return result.assign_attrs(queries=f"of each row: {rule}")


def _horizon(run: Run, seed: int) -> xr.Dataset:
    return memory_horizon.measure(run.trace, seed=seed)


def _recall(run: Run, seed: int) -> xr.Dataset:
    return recall_circuit.measure(
        run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin, seed=seed
    )


def _attention(run: Run, seed: int) -> xr.Dataset:
    queries, rule = answerable_queries(run.trace), "the last query whose answer lies in its window, else the last"
    if queries is None:
        n_valid = run.trace["valid"].sum("token").values[:, None]
        queries, rule = n_valid * np.arange(1, SPREAD + 1) // SPREAD - 1, f"{SPREAD} tokens, evenly spread"
    result = hidden_attention.measure(run.trace, query_tokens=queries, weights=run.weights, seed=seed)
    return result.assign_attrs(queries=f"of each row: {rule}")


ANALYSES: dict[str, Callable[[Run, int], xr.Dataset]] = {
    "recall_circuit": _recall,
    "memory_horizon": _horizon,
    "wavelet_alignment": _wavelet,
    "hidden_attention": _attention,
}
MAIN = ("recall_circuit", "memory_horizon", "wavelet_alignment")
"""Those of the report."""


def analyse(
    run: Run, directory: str | PathLike[str], *, names: Sequence[str] = MAIN, seed: int = 0,
    say: Callable[[str], None] = lambda _: None, overwrite: bool = False,
) -> dict[str, xr.Dataset]:  # fmt: skip
    """Run the named analyses and write DIRECTORY/NAME.nc.

    Raises:
        ValueError: an unknown analysis (nearest given), or a result that exists, unless overwriting.
    """
    for name in names:
        if name not in ANALYSES:
            raise unknown_name("analysis", name, tuple(ANALYSES))
        check_free(Path(directory) / f"{name}.nc", overwrite)
    results = {}
    for name in names:
        say(f"measuring {name}")
        result = ANALYSES[name](run, seed).compute()
        origin = {key: run.trace.attrs.get(key) for key in ("model", "model_hash", "versions", "created_at")}
        results[name] = result.assign_attrs({f"trace_{key}": value for key, value in origin.items()})
        save(results[name], Path(directory) / f"{name}.nc", overwrite=overwrite)
    return results


def analyse_beside(
    run: Run, directory: str | PathLike[str], *, say: Callable[[str], None] = lambda _: None, **options: Any
) -> dict[str, xr.Dataset]:
    """As `analyse`, of the reference that was recorded beside the model; nothing where none was."""
    return {} if run.beside is None else analyse(run.beside, directory, say=lambda it: say(f"beside: {it}"), **options)


def answerable_queries(trace: xr.Dataset) -> np.ndarray | None:
    """Position of one query a row, (batch, 1): the last whose source lies in the window up to it, else the last query.

    A kernel is taken over the last 2^floor(log2 n) of the n tokens up to its query; where the pair was written before
    that window there is nothing to see. None without a task: then the last valid token is the query.
    """
    if "role" not in trace.coords:
        return None
    position = trace["position"].values
    asked = (trace["role"] == "query").values & trace["valid"].values
    source = np.take_along_axis(position, np.maximum(trace["source_token"].values, 0), axis=1)
    window = 2 ** np.floor(np.log2(np.maximum(position + 1, 1))).astype(int)
    seen = asked & (source > position - window)
    score = np.where(seen, 2, np.where(asked, 1, 0)) * position.shape[1] + np.arange(position.shape[1])
    return np.take_along_axis(position, score.argmax(axis=1)[:, None], axis=1)
