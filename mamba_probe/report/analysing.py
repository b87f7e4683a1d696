"""The analyses of a recorded run, each result saved as netCDF."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import xarray as xr

from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.run import Run
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.store import check_free, save

__all__ = ["ALL", "MAIN", "analyse", "analyse_beside", "measurable"]

MAIN = ("recall_circuit", "memory_horizon", "wavelet_alignment")
"""Those that a report has unless it is asked for others."""
ALL = "all"
"""What asks for every analysis that the run has what it needs for, those of `MAIN` first."""


def measurable(run: Run, names: Sequence[str] = (ALL,)) -> tuple[tuple[str, ...], dict[str, str]]:
    """The analyses that `names` stand for, and what the run lacks for each that is left out.

    Only those that `ALL` brought are left out; one that is named and lacks something is refused.

    Raises:
        ValueError: an unknown analysis (nearest given), one twice, or a named one that lacks something.
    """
    known = analyses()
    for name in names:
        if name != ALL and name not in known:
            raise unknown_name("analysis", name, (*known, ALL))
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"analyses need distinct names, or {ALL!r}; got {', '.join(names) or 'none'}")
    wanted = list(dict.fromkeys((*MAIN, *known))) if ALL in names else list(names)
    lacking = {name: lack for name in wanted if (lack := known[name].lacks(run))}
    refused = [name for name in lacking if name in names]
    if refused:
        raise ValueError(f"{refused[0]} needs {lacking[refused[0]]}, which this run of {_model(run)} has not")
    return tuple(name for name in wanted if name not in lacking), lacking


def analyse(
    run: Run, directory: str | PathLike[str], *, names: Sequence[str] = MAIN, seed: int = 0,
    say: Callable[[str], None] = lambda _: None, overwrite: bool = False,
) -> dict[str, xr.Dataset]:  # fmt: skip
    """Run the named analyses and write DIRECTORY/NAME.nc; see `measurable`.

    Where `ALL` is asked for, an analysis that refuses the run is said and left out, and the others go on.

    Raises:
        ValueError: an unknown analysis (nearest given), one that the run lacks something for, or a result that exists,
            unless overwriting.
    """
    chosen, lacking = measurable(run, names)
    for name in chosen:
        check_free(Path(directory) / f"{name}.nc", overwrite)
    for name, lack in lacking.items():
        say(f"left out: {name}, which needs {lack}")
    results = {}
    for name in chosen:
        say(f"measuring {name}")
        try:
            result = analyses()[name].of_run(run, seed).compute()
        except (ValueError, OSError) as error:
            if name in names:
                raise
            say(f"failed: {name}: {error}")
            continue
        origin = {key: run.trace.attrs.get(key) for key in ("model", "model_hash", "versions", "created_at")}
        results[name] = result.assign_attrs({f"trace_{key}": value for key, value in origin.items()})
        save(results[name], Path(directory) / f"{name}.nc", overwrite=overwrite)
    return results


def analyse_beside(
    run: Run, directory: str | PathLike[str], *, say: Callable[[str], None] = lambda _: None, **options: Any
) -> dict[str, xr.Dataset]:
    """As `analyse`, of the reference that was recorded beside the model; nothing where none was."""
    return {} if run.beside is None else analyse(run.beside, directory, say=lambda it: say(f"beside: {it}"), **options)


def _model(run: Run) -> str:
    return str(run.trace.attrs.get("model", "a model"))
