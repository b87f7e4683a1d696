"""The analyses of a recorded run, each result saved as netCDF."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr

from mamba_probe.analyses import memory_horizon, recall_circuit, wavelet_alignment
from mamba_probe.run import Run
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.store import check_free, save

__all__ = ["ANALYSES", "analyse", "last_queries"]


def _wavelet(run: Run, seed: int) -> xr.Dataset:
    return wavelet_alignment.measure(run.trace, query_tokens=last_queries(run.trace), seed=seed)


def _horizon(run: Run, seed: int) -> xr.Dataset:
    return memory_horizon.measure(run.trace, seed=seed)


def _recall(run: Run, seed: int) -> xr.Dataset:
    return recall_circuit.measure(
        run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin, seed=seed
    )


ANALYSES: dict[str, Callable[[Run, int], xr.Dataset]] = {
    "recall_circuit": _recall,
    "memory_horizon": _horizon,
    "wavelet_alignment": _wavelet,
}


def analyse(
    run: Run, directory: str | PathLike[str], *, names: Sequence[str] = tuple(ANALYSES), seed: int = 0,
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


def last_queries(trace: xr.Dataset) -> np.ndarray | None:
    """Position of each row's last query, (batch, 1): where a task's model reads. None without a task (last token)."""
    if "role" not in trace.coords:
        return None
    asked = (trace["role"] == "query").values
    last = asked.shape[1] - 1 - asked[:, ::-1].argmax(axis=1)
    return np.take_along_axis(trace["position"].values, last[:, None], axis=1)
