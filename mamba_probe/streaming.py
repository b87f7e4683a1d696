"""A recording that goes to a Zarr store while the model runs: layer by layer, block of rows by block of rows.

The model's thread hands each layer's tensors to writers, and waits for them only where more than `max_memory` bytes
are under way. A block enters the store once all that was posted of it is on disk, so that what stops the process, a
kill, a full disk or a lost GPU, leaves the blocks before it.
"""

import errno
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from mamba_probe.keeping import Courier, Kept, host_like, widened
from mamba_probe.recorder import Plan
from mamba_probe.trace.blocks import Drift
from mamba_probe.trace.store import open_trace, remove
from mamba_probe.trace.stream import Layout, Stream

__all__ = ["IN_MEMORY", "GrowingSink", "StreamSink"]

IN_MEMORY = 2**30
"""Bytes on their way to a store at a time, where the user names no `max_memory`."""
WRITERS = 8
"""Threads; they wait for the disk more than they compute."""
AHEAD = 2
"""Blocks that may wait for their entry while the model goes on."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Posted:
    """A block under way: what its writers still do."""

    first: int
    mask: np.ndarray | None
    writes: list[tuple[str, Future[list[Drift | None]]]] = field(default_factory=list)


class _Posting(Kept):
    """The tensors of one call, each handed on to be written once it is on the host."""

    posted = True

    def __init__(self, sink: "StreamSink", layers: Sequence[int], courier: Courier, block: _Posted):
        super().__init__(layers, courier, "host")
        self._sink, self._block = sink, block

    def _send(self, name: str, first: int, whole: Tensor) -> None:
        """As many layers at a time as may be under way."""
        a_layer = whole[0].numel() * widened(whole.dtype).itemsize
        for some in whole.split(max(1, self._sink.most // max(1, a_layer))):
            self._sink.room(len(some) * a_layer)
            target = host_like(some, len(some))
            self._sink.post(self._block, name, first, target, self._courier.send(target, some))
            first += len(some)

    def array(self, layer: int, name: str) -> np.ndarray:
        """One layer's tensor, from the store."""
        return self._sink.written(self._block, name, self._place[layer])


class StreamSink:
    """Writes the blocks of a recording whose rows and tokens are known beforehand.

    A fault of a writer is raised where the model next hands something over, and at the latest by `close`.

    Arguments:
        stream: the store.
        plan: what is recorded.
        rows: of a block; block k begins at row k * rows.
        max_memory: bytes on their way at most.
        label: gives a block, which begins at a row, the labels of its input.
    """

    def __init__(
        self, stream: Stream, plan: Plan, rows: int, max_memory: int, label: Callable[[xr.Dataset, int], xr.Dataset]
    ):
        self._stream, self._plan, self._rows, self.most, self._label = stream, plan, rows, max_memory, label
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="mamba_probe writer")
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="mamba_probe journal")
        self._under_way: deque[tuple[int, Future[Any]]] = deque()
        self._bytes = 0
        self._block: _Posted | None = None
        self._entries: deque[Future[None]] = deque()

    def kept(self, courier: Courier, first: int, mask: Tensor | None) -> Kept:
        """See `Sink`."""
        self._block = _Posted(first, None if mask is None else mask.cpu().numpy().astype(bool))
        return _Posting(self, self._plan.layers, courier, self._block)

    def room(self, n_byte: int) -> None:
        """Wait until so many bytes more may be under way."""
        while self._under_way and (self._bytes + n_byte > self.most or self._under_way[0][1].done()):
            size, write = self._under_way.popleft()
            with_room(self._stream.path, write.result)
            self._bytes -= size

    def post(self, block: _Posted, name: str, first: int, target: Tensor, arrived: Any) -> None:
        """Have layers from place `first` on written, once they have arrived."""
        write = self._writers.submit(self._write, block, name, first, target, arrived)
        block.writes.append((name, write))
        self._under_way.append((target.nbytes, write))
        self._bytes += target.nbytes

    def _write(self, block: _Posted, name: str, first: int, target: Tensor, arrived: Any) -> list[Drift | None]:
        if arrived is not None:
            arrived.synchronize()
        whole = target.numpy()
        valid = self._valid(block, whole.shape[1:3])
        if not valid.all():
            whole[:, ~valid] = np.nan
        return [self._stream.put(name, first + at, block.first, layer, valid) for at, layer in enumerate(whole)]

    def _valid(self, block: _Posted, shape: tuple[int, ...]) -> np.ndarray:
        if block.mask is None:
            return np.ones(shape, bool)
        return block.mask if self._plan.tokens is None else block.mask[:, list(self._plan.tokens)]

    def written(self, block: _Posted, name: str, layer: int) -> np.ndarray:
        """What was written of one layer of a block that is under way."""
        for _, write in block.writes:
            with_room(self._stream.path, write.result)
        return self._stream.read(name, layer, block.first, self._rows)

    def take(self, block: xr.Dataset, first: int) -> None:
        """See `Sink`. The block is entered once its writes are done, beside the next one's model call."""
        posted, self._block = self._block, None
        if posted is None or posted.first != first:
            raise RuntimeError(f"the rows from {first} on are whole, and their tensors were not handed over")
        self._entries.append(self._keeper.submit(self._enter, posted, self._label(block, first)))
        while len(self._entries) > 1 and (len(self._entries) > AHEAD or self._entries[0].done()):
            with_room(self._stream.path, self._entries.popleft().result)

    def _enter(self, posted: _Posted, rows: xr.Dataset) -> None:
        drift: dict[str, Drift] = {}
        for name, write in posted.writes:
            for one in write.result():
                if one is not None:
                    drift[name] = drift.get(name, Drift()) + one
        self._stream.label({"edits": rows.attrs["edits"]})
        self._stream.enter(posted.first // self._rows, posted.first, rows, drift)

    def close(self, whole: bool) -> None:
        """See `Sink`. After a fault the blocks that are whole are entered, and that fault is not covered by another."""
        try:
            for entry in self._entries:
                if whole:
                    with_room(self._stream.path, entry.result)
                else:
                    entry.exception()
        finally:
            self._writers.shutdown(wait=True, cancel_futures=True)
            self._keeper.shutdown(wait=True, cancel_futures=True)
            self._stream.close()

    def opened(self) -> xr.Dataset:
        """See `Sink`."""
        return open_trace(self._stream.path)


class GrowingSink:
    """Writes rows whose number and length nobody knows beforehand, a block once it is whole.

    Arguments:
        path: of the store, made for the first block.
        overwrite: whether to replace what is there.
        compress, narrow: see `Layout`.
    """

    def __init__(self, path: Path, plan: Plan, overwrite: bool, compress: str | None, narrow: Mapping[str, str]):
        self._path, self._plan, self._overwrite = path, plan, overwrite
        self._layout = Layout(1, compress=compress, narrow=narrow)
        self._stream: Stream | None = None
        self._number = 0
        self._fault: Exception | None = None

    def kept(self, courier: Courier, first: int, mask: Tensor | None) -> Kept:
        """See `Sink`."""
        return Kept(self._plan.layers, courier, "host")

    def take(self, block: xr.Dataset, first: int) -> None:
        """See `Sink`. Once rows could not be written none are: the store would have a gap."""
        if self._fault is not None:
            raise self._fault
        try:
            with_room(self._path, self._append, block, first)
        except Exception as fault:
            self._fault = fault
            raise

    def _append(self, block: xr.Dataset, first: int) -> None:
        if self._stream is None:
            if self._overwrite:
                remove(self._path)
            self._stream = Stream.create(self._path, block, self._layout, {"rows": "as they come"})
        self._stream.reserve(first + block.sizes["batch"], block["token"].values.tolist())
        self._stream.label({"edits": block.attrs["edits"]})
        valid, drift = block["valid"].values, {}
        for name in self._plan.steps:
            for at, layer in enumerate(block[name].values):
                found = self._stream.put(name, at, first, layer, valid)
                if found is not None:
                    drift[name] = drift.get(name, Drift()) + found
        self._stream.enter(self._number, first, block, drift)
        self._number += 1

    def close(self, whole: bool) -> None:
        """See `Sink`."""
        if self._stream is not None:
            with_room(self._path, self._stream.close, whole and self._fault is None)

    def opened(self) -> xr.Dataset:
        """See `Sink`."""
        return open_trace(self._path)


def with_room(path: Path, call: Callable[..., Any], *given: Any) -> Any:
    """`call`, whose want of space is said with what to do.

    Raises:
        OSError: no space is left.
    """
    try:
        return call(*given)
    except OSError as error:
        if error.errno not in NO_SPACE or str(path) in str(error.strerror):
            raise
        there = "It opens, and holds every block of rows that was whole" if path.exists() else "Nothing of it was made"
        raise OSError(
            error.errno,
            f"no space is left for {path}. {there}: make room, and go on with resume=True (--resume); a recording() of"
            " calls as they come is begun anew",
        ) from error
