"""Where a run is recorded to: memory, or a directory whose stores are each there whole or gone on with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xarray as xr

from mamba_probe.inputs import Labelled
from mamba_probe.probe import Probe
from mamba_probe.trace.store import open_dataset, remove, save
from mamba_probe.trace.untrusted import loaded

__all__ = ["BESIDE", "MEMORY", "STORES", "Into"]

STORES = ("trace.zarr", "weights.nc", "parity.nc", "interventions.nc", "twin.zarr", "twin_weights.nc")
BESIDE = "beside"
"""Folder of the run of a reference, in that of the model's own."""


@dataclass(frozen=True)
class Into:
    """A place to record to.

    Arguments:
        directory: where traces stream to while models run; None is memory.
        overwrite: remove an earlier run there once a new one begins.
        resume: go on with the run that is there: what it has is kept, what it lacks is made.
        shard: see `Probe.record`; only the first process makes what is no trace.
        options: of `Probe.record` to a store: max_memory, compress, force, batch_size, progress.
    """

    directory: Path | None = None
    overwrite: bool = False
    resume: bool = False
    shard: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        """Whether this process makes what is recorded once."""
        return self.shard is None or self.shard[0] == 0

    def begin(self) -> None:
        """Remove an earlier run, where that is asked for, and what is left of one that had no trace yet.

        Nothing of it may stand beside what is new; what stands beside a trace that is gone on with is checked with it.
        """
        if self.directory is None or not self.leads:
            return
        if self.overwrite or not (self.directory / "trace.zarr").exists():
            for name in (*STORES, BESIDE):
                remove(self.directory / name)

    def record(self, probe: Probe, name: str, given: Labelled, **options: Any) -> xr.Dataset:
        """A trace by `Probe.record`, in memory or to DIR/name."""
        options |= self.options
        if self.directory is None:
            return probe.record(given, **options)
        return probe.record(given, store=self.directory / name, resume=self.resume, shard=self.shard, **options)

    def kept(self, name: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
        """A Dataset that is made once: DIR/name where it is there."""
        if self.directory is None:
            return make()
        path = self.directory / name
        if self.resume and path.exists():
            return loaded(open_dataset(path))
        made = make()
        save(made, path)
        return made

    @property
    def alone(self) -> "Into":
        """The same place, for what one process records alone."""
        return replace(self, shard=None)

    @property
    def beside(self) -> "Into":
        """The place of the reference's run."""
        return self if self.directory is None else replace(self, directory=self.directory / BESIDE)


MEMORY = Into()
