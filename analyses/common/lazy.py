"""Traces on dask: who reads them, and a task a layer on the user's cluster.

Without one an analysis goes through the layers here, one after another. With a `dask.distributed` client, or a
scheduler chosen by `dask.config.set(scheduler=...)`, each layer of a stored trace is a task, which reads the store by
itself, as little at a time as is read here: what travels is where the trace lies, and the numbers that come back.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from dask.base import compute, get_scheduler, is_dask_collection
from dask.delayed import delayed

__all__ = ["by_layer", "in_store", "read", "stacked"]

_IN_TASK: ContextVar[bool] = ContextVar("in_task", default=False)
"""Whether this thread runs a task of `by_layer`."""

T = TypeVar("T")
Lazy = TypeVar("Lazy", xr.Dataset, xr.DataArray)


def by_layer(traces: Sequence[xr.Dataset], measured: Callable[..., T], *each: Sequence[Any]) -> list[T]:
    """What `measured(layer, *one of each)` gives for every layer, by position, in order.

    Args:
        traces: all that `measured` reads, of as many layers; a layer is a task where each lies in a store and a
            scheduler was chosen.
        measured: a function that cloudpickle knows, with all it needs.
        each: further arguments, one a layer; what is on dask among them comes to a task in memory.

    >>> by_layer([xr.Dataset({"A": ("layer", [1.0, 2.0])})], lambda layer, name: f"{layer} {name}", "ab")
    ['0 a', '1 b']
    """
    parts = list(zip(range(traces[0].sizes["layer"]), *each, strict=True))
    if _IN_TASK.get() or get_scheduler() is None or not all(map(in_store, traces)):
        return [measured(*part) for part in parts]
    task = delayed(_task)
    return list(compute(*(task(measured, *part) for part in parts)))


def _task(measured: Callable[..., T], *part: Any) -> T:
    token = _IN_TASK.set(True)
    try:
        return measured(*part)
    finally:
        _IN_TASK.reset(token)


def read(lazy: Lazy) -> Lazy:
    """It in memory, one chunk after another in this thread: pools of threads side by side hold more, to no gain.

    Only what was not made a task is left to the scheduler that was chosen, for it may lie there. A task reads by
    itself: were it to ask its cluster, it would wait for what waits for it.
    """
    asked = get_scheduler() is not None and not _IN_TASK.get()
    return lazy.compute(scheduler=None if asked else "synchronous")


def stacked(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Numbers of each layer as arrays over all, a name after another: what was stacked is taken out of `layers`.

    >>> stacked([{"mean": np.zeros(2)}, {"mean": np.ones(2)}])["mean"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    return {name: np.stack([one.pop(name) for one in layers]) for name in list(layers[0])}


def in_store(trace: xr.Dataset) -> bool:
    """Whether a trace is on dask, and none of it in memory: neither here, to be sent, nor on a cluster (`persist`).

    >>> in_store(xr.Dataset({"A": ("layer", [1.0])}).chunk())
    False
    """
    graph: Any = trace.__dask_graph__()
    if not is_dask_collection(trace):
        return False
    first = [next(iter(layer.values()), None) for layer in graph.layers.values() if layer.is_materialized()]
    return not any(isinstance(one, np.ndarray) or type(one).__module__.startswith("distributed.") for one in first)
