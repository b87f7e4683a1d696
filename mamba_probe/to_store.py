"""`probe.record(store="run.zarr")`: what is asked, checked before anything runs, and the blocks one after another."""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe.arguments import whole as whole_number
from mamba_probe.estimate import layout_of
from mamba_probe.inputs import CorpusInput, ModelInput
from mamba_probe.keeping import Courier
from mamba_probe.other_run import OtherRun
from mamba_probe.progress import bar
from mamba_probe.recorder import ABSENT, Plan, assembled
from mamba_probe.rows import Rows
from mamba_probe.streaming import IN_MEMORY, StreamSink, with_room
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.memory import free_memory, n_bytes, readable
from mamba_probe.trace.store import check_free, remove
from mamba_probe.trace.stream import COMPRESSIONS, NARROWABLE, Layout, Stream

__all__ = ["Storing", "check_fits", "identity_of", "shard", "stream", "template"]

NEVER_NARROW = ("delta_cumsum", "A")
"""Sums over tokens, and what every decay is made of: their errors grow with the row."""
PATIENCE = 600.0
"""Seconds that a process waits for the first of its peers to make the store."""


@dataclass(frozen=True)
class Storing:
    """How a recording goes to a Zarr store; see `Probe.record`."""

    path: Path
    overwrite: bool = False
    resume: bool = False
    max_memory: int = IN_MEMORY
    compress: str | None = None
    narrow: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    shard: tuple[int, int] | None = None

    @classmethod
    def checked(
        cls, store: str | os.PathLike[str], plan: Plan, *, overwrite: bool = False, resume: bool = False,
        max_memory: int | str | None = None, compress: str | None = None, narrow: Any = None, force: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> "Storing":  # fmt: skip
        """From what a user asks.

        Raises:
            ValueError: a store that exists, unknown names, a shard that cannot be, overwriting what is resumed.
        """
        follows = shard is not None and shard[:1] != (0,)  # the first process of a job makes the store
        path = check_free(store, overwrite or resume or follows)
        if overwrite and (resume or shard is not None):
            raise ValueError(
                "overwrite=True starts anew, and resume=True or shard= goes on with what is there: choose one"
            )
        if compress is not None and compress not in COMPRESSIONS:
            raise unknown_name("compression", compress, COMPRESSIONS)
        if shard is not None and not (len(shard) == 2 and 0 <= shard[0] < shard[1]):
            raise ValueError(f"shard is (this process' number, how many there are), from (0, 1) on; got {shard!r}")
        most = IN_MEMORY if max_memory is None else n_bytes(max_memory)
        return cls(path, overwrite, resume, most, compress, _narrowing(narrow, plan), force, shard)

    def rows(self, plan: Plan, given: ModelInput, batch_size: int | None, model: nn.Module, width: int) -> int:
        """Of a block: `batch_size`, or as many as fit into `max_memory` together; no more than there are.

        Raises:
            ValueError: batch_size below 1, one layer of one variable does not fit, or the disk has not as many bytes
                left.
        """
        dtype = next(model.parameters()).dtype

        def weight(name: str) -> int:
            shape, kind = layout_of(plan, name, 1, given.length, dtype, width)
            return int(np.prod(shape[1:])) * kind.itemsize

        by_layer = {name: weight(name) for name in plan.steps}
        whole = len(plan.layers) * sum(by_layer.values()) or 1
        asked = None if batch_size is None else whole_number("batch_size", batch_size, 1)
        rows = min(given.batch, asked or max(1, self.max_memory // whole))
        name, largest = max(by_layer.items(), key=lambda item: item[1], default=("", 0))
        if largest * rows > self.max_memory:
            most = self.max_memory // max(1, largest)
            do = f"batch_size={most} or less" if most else "fewer tokens or channels, or a larger max_memory"
            raise ValueError(
                f"one layer of `{name}` of {rows} row(s) weighs {readable(largest * rows)}, more than"
                f" max_memory={readable(self.max_memory)}: pass {do}"
            )
        self._check_disk(whole * given.batch)
        return rows

    def _check_disk(self, weight: int) -> None:
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if weight > free and not (self.force or self.compress or self.narrow or self.path.exists()):
            raise ValueError(
                f"the trace weighs {readable(weight)}, and {place} has {readable(free)} left: record fewer variables,"
                " layers, tokens or channels, compress or narrow it, or pass force=True (--force) to write what fits"
            )

    def opened(self, plan: Plan, first: xr.Dataset, rows: int, n_row: int, identity: Mapping[str, Any]) -> Stream:
        """The store, new or gone on with."""
        layout = Layout(rows, n_row, self.compress, self.narrow)
        if self.shard is not None and self.shard[0] > 0:
            return _followed(self.path, layout, identity, self.shard)
        if self.path.exists() and self.resume:
            return Stream.resume(self.path, layout, identity, self.shard)
        remove(self.path)
        return Stream.create(self.path, first, layout, identity, self.shard)


def stream(
    storing: Storing, plan: Plan, given: ModelInput, rows: int, model: nn.Module, first: xr.Dataset,
    identity: Mapping[str, Any], recording: Any, progress: bool,
) -> xr.Dataset:  # fmt: skip
    """Run the model on the blocks that the store lacks, and open it.

    `recording(sink)` is a context manager that yields a Recorder with this sink, listening.
    """
    held = with_room(storing.path, storing.opened, plan, first, rows, given.batch, identity)
    sink = StreamSink(held, plan, rows, storing.max_memory, lambda block, at: given.label(block, at))
    part, parts = storing.shard or (0, 1)
    spans = given.spans(rows)
    mine = [number for number in range(part, len(spans), parts) if number not in held.done]
    with (
        closing(held),
        recording(sink) as recorder,
        bar("recording", len(mine), progress) as step,
        torch.no_grad(),
    ):
        for number, span in enumerate(spans):
            if number not in mine:
                recorder.skip(span.stop - span.start)
                continue
            step(f"rows {span.start} to {span.stop - 1}")
            model(**given.piece(span))
            recorder.flush()
            step("")
    with warnings.catch_warnings():
        if storing.shard is not None:
            warnings.filterwarnings("ignore", ".*the recording was broken off", UserWarning)  # others go on
        return recorder.dataset


def template(
    plan: Plan, rows: int, length: int, statics: Mapping[str, np.ndarray], attrs: Mapping[str, Any],
    dtype: torch.dtype, width: int,
) -> xr.Dataset:  # fmt: skip
    """What a block will look like: shapes, dtypes, constants; no values."""
    kept = length if plan.tokens is None else len(plan.tokens)
    empty = {name: [np.full((rows, kept), value, dtype=object if name == "phase" else type(value))]
             for name, value in ABSENT.items()}  # fmt: skip
    block = Rows(rows, 0, 0, np.zeros(rows, np.int64), coords=empty)
    steps = {}
    for name in plan.steps:
        shape, kind = layout_of(plan, name, rows, length, dtype, width)
        steps[name] = da.zeros(shape, dtype=kind)  # takes no memory
    return assembled(plan, [block], dict(statics), dict(attrs), Courier(), every=True, steps=steps)


def identity_of(
    plan: Plan, given: ModelInput, rows: int, model: nn.Module, attrs: Mapping[str, Any], storing: Storing,
    edits: Sequence[Any],
) -> dict[str, Any]:  # fmt: skip
    """All that the bits of a recording depend on: a store is gone on with where all of it is equal.

    Of code none is: a hook of the user's own is not seen.
    """
    return {
        "variables": plan.variables, "layers": plan.layers, "tokens": plan.tokens, "channels": plan.channels,
        "rows": given.batch, "batch_size": rows, "length": given.length, "inputs": given.sha256,
        "model": attrs["model_hash"], "dtype": attrs["dtype"], "backend": attrs["backend"],
        "edits": [_edit(edit) for edit in edits],
        "labels": _digest({} if isinstance(given, CorpusInput) else given.labels, given.attrs),
        "config": _config(model), "device": _device(model),
        "versions": attrs["versions"], "compress": storing.compress, "narrow": dict(storing.narrow),
    }  # fmt: skip


def _edit(edit: Any) -> str:
    """An edit and, of one with an array, its numbers; what comes from another run is equal to nothing."""
    value = edit.value
    if isinstance(value, OtherRun):
        return f"{edit!r} {uuid4()}"
    if not isinstance(value, Tensor | np.ndarray):
        return repr(edit)
    pairs = torch.view_as_real(torch.as_tensor(value).detach().cpu() + 0j)
    return f"{edit!r} {_digest({'value': pairs.numpy()}, {})}"


def _device(model: nn.Module) -> str:
    """What computes: other devices, instructions, threads and precisions round otherwise."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, matmul precision {torch.get_float32_matmul_precision()}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def _config(model: nn.Module) -> str:
    """Hash of the settings of a model that has a config: limits of delta are none of its weights."""
    config: Any = getattr(model, "config", None)
    held = config.to_dict() if hasattr(config, "to_dict") else vars(config) if hasattr(config, "__dict__") else {}
    told = {name: repr(held[name]) for name in held if not name.startswith(("_", "transformers"))}
    return _digest({}, told)


def _digest(arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(attrs), sort_keys=True).encode())
    for name, values in sorted(arrays.items()):
        digest.update(f"{name}{values.shape}{values.dtype}".encode())
        digest.update(json.dumps(values.tolist()).encode())
    return digest.hexdigest()


def shard() -> tuple[int, int] | None:
    """This process' number and how many there are, as torchrun tells them; None outside of it.

    >>> shard() is None
    True
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check_fits(weight: int, max_memory: int | str | None, force: bool) -> None:
    """Check that a trace that is to be held in memory fits.

    Raises:
        ValueError: it does not.
    """
    most = free_memory() if max_memory is None else n_bytes(max_memory)
    if weight > most and not force:
        what = f"{readable(most)} of memory are free" if max_memory is None else f"max_memory is {readable(most)}"
        raise ValueError(
            f"the trace weighs {readable(weight)}, and {what}: stream it with store='run.zarr', record fewer"
            " variables, layers, tokens or channels, reduce it (probe.reduce), or pass force=True"
        )


def _narrowing(narrow: Any, plan: Plan) -> dict[str, str]:
    if narrow is None:
        return {}
    asked = dict(narrow) if isinstance(narrow, Mapping) else None
    if asked is None or not all(isinstance(name, str) for name in asked):
        raise ValueError(f'narrow is variables and their dtypes, as {{"B": "float16"}}; got {narrow!r}')
    for name, dtype in asked.items():
        able = tuple(each for each in plan.steps if each not in NEVER_NARROW)
        if name not in able:
            raise unknown_name("variable to narrow", name, able)
        if dtype not in NARROWABLE:
            raise unknown_name("dtype", dtype, NARROWABLE)
    return asked


def _followed(path: Path, layout: Layout, identity: Mapping[str, Any], part: tuple[int, int] | None) -> Stream:
    """The store that the first of this process' peers makes, once it is there."""
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise ValueError(f"{path} was not made within {PATIENCE:.0f} s: is the process of shard 0 running?")
        time.sleep(0.05)
    return Stream.resume(path, layout, identity, part)
