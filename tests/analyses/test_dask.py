"""Traces on dask: every analysis gives what it gives in memory, however the store is cut, and on a cluster too."""

import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pytest
import xarray as xr
from dask.local import get_sync
from distributed import Client, LocalCluster

import mamba_probe as mp
from mamba_probe import analyses
from mamba_probe.ablating import ablate_units
from mamba_probe.analyses import (
    ablation,
    association,
    attribution,
    hidden_attention,
    lti_limits,
    memory_horizon,
    recall_circuit,
    receptive_field,
    sinks,
    state_dynamics,
    wavelet_alignment,
)  # fmt: skip
from mamba_probe.analyses.recall_circuit.heads import induction_heads
from mamba_probe.associating import associating
from mamba_probe.relevance import relevance
from mamba_probe.trace.store import open_dataset, save

VARIABLES = ["delta", "A", "B", "C", "x", "z", "y", "h", "u", "out"]
CUTS: dict[str, dict[str, int]] = {
    "whole": {},
    "a layer, 2 rows": {"layer": 1, "batch": 2},
    "7 tokens": {"token": 7},
    "3 channels": {"channel": 3, "head": 3},
    "all": {"layer": 1, "batch": 1, "token": 5, "channel": 2, "head": 2, "state": 1},
}
FEW: dict[str, Any] = {"n_bootstrap": 5}


@cache
def recorded() -> dict[str, xr.Dataset]:
    """A model that solves its task, its layer taken twice; weights, and what else the analyses take."""
    built, task = mp.constructions.mqar(n_keys=8, n_values=8), mp.tasks.mqar(batch=4, length=32, n_pairs=3, vocab=16)
    with mp.attach(built.model) as probe:
        trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
        ablated = ablate_units(probe, task, group=8, n_random=2)
        found, explained = associating(probe, task), relevance(probe, task)
    kernels = xr.Dataset({"values": (("kernel", "lag"), np.random.default_rng(0).standard_normal((3, 64)))})
    return {
        "trace": twice(trace), "weights": twice(weights), "ablated": ablated, "associated": found,
        "relevance": explained, "kernels": kernels,
    }  # fmt: skip


def twice(data: xr.Dataset) -> xr.Dataset:
    return xr.concat(
        [data, data.assign_coords(layer=data["layer"] + 1)], "layer", data_vars="minimal", coords="minimal",
        compat="override", join="exact", combine_attrs="override",
    )  # fmt: skip


def random_trace(family: str, seed: int = 0, n_layers: int = 2, n_rows: int = 3, n_tokens: int = 24) -> xr.Dataset:
    """A trace of random numbers, padded; of Mamba-2 with two groups, of S4D with complex states."""
    rng, over = np.random.default_rng(seed), ("layer", "batch", "token")
    shape, head = (n_layers, n_rows, n_tokens), "head" if family == "mamba2" else "channel"
    step = np.exp(rng.normal(-1, 1, (*shape, 6))).astype("float32")
    data: dict[str, Any] = {name: ((*over, "model"), rng.standard_normal((*shape, 5))) for name in ("u", "out")}
    if family == "s4d":
        parts = rng.standard_normal((2, 3, n_layers, 6, 4))
        A, B, C = parts[0] + 1j * parts[1]
        constant = ("layer", head, "state")
        data |= {"A": (constant, -np.abs(A.real) + 1j * A.imag), "B": (constant, B), "C": (constant, C)}
        data |= {"delta": (("layer", head), step[:, 0, 0]), "x": ((*over, head), rng.standard_normal(step.shape))}
    else:
        data |= {
            name: ((*over, "group", "state"), rng.standard_normal((*shape, 2, 4)).astype("float32")) for name in "BC"
        }
        data |= {"delta": ((*over, head), step)}
        x = ((*over, head, "head_channel"), (*step.shape, 2)) if family == "mamba2" else ((*over, head), step.shape)
        data |= {"x": (x[0], rng.standard_normal(x[1]))}
        wide = ("layer", head) if family == "mamba2" else ("layer", head, "state")
        data |= {"A": (wide, -np.exp(rng.standard_normal((n_layers, 6, 4)[: len(wide)])).astype("float32"))}
    valid = np.ones(shape[1:], bool)
    valid[0, :3] = False
    data = {name: (dims, np.where(_masked(dims, valid), of, np.nan)) for name, (dims, of) in data.items()}
    position = np.where(valid, np.cumsum(valid, axis=1) - 1, -1)
    coords = {
        "layer": 4 + np.arange(n_layers),
        head: np.arange(6),
        "valid": (over[1:], valid),
        "position": (over[1:], position),
    }
    return xr.Dataset(
        data, coords, {"schema_version": 1, "family": family, "discretization": "zoh" if family == "s4d" else "euler"}
    )


def _masked(dims: tuple[str, ...], valid: np.ndarray) -> Any:
    return valid.reshape(1, *valid.shape, *(1 for _ in dims[3:])) if "token" in dims else True


TRACED: dict[str, Callable[..., xr.Dataset]] = {
    "wavelet_alignment": lambda trace, other: wavelet_alignment.measure(trace, baseline=other, n_kept=2, **FEW),
    "memory_horizon": lambda trace, _: memory_horizon.measure(
        trace, level=["1/e", 0.1], tokens=[6, 9], mass=True, event_tokens=5, **FEW
    ),
    "hidden_attention": lambda trace, _: hidden_attention.measure(trace, query_tokens=[5, 20], **FEW),
    "state_dynamics": lambda trace, other: state_dynamics.measure(trace, every=4, baseline=other, **FEW),
    "receptive_field": lambda trace, other: receptive_field.measure(trace, train_length=16, baseline=other, **FEW),
    "sinks": lambda trace, _: sinks.measure(trace, n_shifts=19, **FEW),
}
"""Of a trace and another of the same rows."""
SOLVED: dict[str, Callable[[dict[str, xr.Dataset]], xr.Dataset]] = {
    "recall_circuit": lambda of: recall_circuit.measure(of["trace"], weights=of["weights"], **FEW),
    "induction_heads": lambda of: induction_heads(of["trace"], n_bootstrap=5),
    "hidden_attention": lambda of: hidden_attention.measure(of["trace"], weights=of["weights"], **FEW),
    "ablation": lambda of: ablation.measure(of["trace"], ablated=of["ablated"], **FEW),
    "association": lambda of: association.measure(of["associated"], **FEW),
    "attribution": lambda of: attribution.measure(of["relevance"], **FEW),
    "lti_limits": lambda of: lti_limits.measure(of["kernels"]["values"], n_states=(2, 4), fits=("fourier",)),
}
"""Of what `recorded` gives."""


def stored(data: xr.Dataset, folder: Path, cut: dict[str, int], suffix: str = ".zarr") -> xr.Dataset:
    """The same from a store whose chunks are cut like this, opened lazily."""
    folder.mkdir(parents=True, exist_ok=True)
    cut = {dim: size for dim, size in cut.items() if dim in data.dims}
    coords = {str(name): coord.variable for name, coord in data.coords.items()}
    path = save(data.chunk(cut).assign_coords(coords), folder / f"data{suffix}")
    found = (mp.open_trace if "B" in data or "delta" in data else open_dataset)(path)
    assert dask.is_dask_collection(found)
    return found


class StandIn:
    """A scheduler that does what a cluster does to a task: the graph travels as bytes, and no task may come back."""

    def __init__(self) -> None:
        self.tasks, self.others, self.busy = 0, 0, False

    def __call__(self, graph: Any, keys: Any, **_options: Any) -> Any:
        assert not self.busy, "a task asked the cluster that waits for it"
        here = cloudpickle.loads(cloudpickle.dumps(graph))
        n_tasks = sum(str(key).startswith("_task-") for key in dict(here.__dask_graph__()))
        self.tasks, self.others, self.busy = self.tasks + n_tasks, self.others + (n_tasks == 0), True
        try:
            return get_sync(here, keys)
        finally:
            self.busy = False


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    scheduler = StandIn()
    with dask.config.set(scheduler=scheduler):
        yield scheduler


def of_traces(family: str, name: str, folder: Path, cut: dict[str, int], suffix: str = ".zarr") -> tuple[Any, Any]:
    """The result in memory, and one that is still to be measured, of stores."""
    traces = [random_trace(family, seed) for seed in (0, 1)]
    lazy = [stored(trace, folder / str(i), cut, suffix) for i, trace in enumerate(traces)]
    return TRACED[name](*traces), lambda: TRACED[name](*lazy)


def of_recorded(name: str, folder: Path, cut: dict[str, int]) -> tuple[Any, Any]:
    lazy = Stored(folder, cut)
    return SOLVED[name](recorded()), lambda: SOLVED[name](lazy)


class Stored(dict[str, xr.Dataset]):
    """What `recorded` gives, each part from a store, written when it is asked for."""

    def __init__(self, folder: Path, cut: dict[str, int]) -> None:
        super().__init__()
        self.folder, self.cut = folder, cut

    def __missing__(self, key: str) -> xr.Dataset:
        self[key] = stored(recorded()[key], self.folder / key, self.cut)
        return self[key]


def tasks_of(name: str) -> int:
    """How often an analysis goes through the two layers of a trace, times 2; a baseline is gone through beside it."""
    return 2 * {"receptive_field": 8, "state_dynamics": 2, "association": 0, "attribution": 0, "lti_limits": 0}.get(
        name, 1
    )


def test_every_analysis_is_here():
    assert set(analyses.common.analysis.analyses()) | {"lti_limits"} == {*TRACED, *SOLVED} - {"induction_heads"}


QUICK = ("sinks", "hidden_attention", "memory_horizon", "recall_circuit")


def quick_or_long(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", quick_or_long(TRACED))
def test_a_stored_trace_gives_the_same_and_a_task_a_layer(name, tmp_path, stand_in):
    expected, measured = of_traces("mamba", name, tmp_path, CUTS["7 tokens"])
    stand_in.tasks = stand_in.others = 0
    xr.testing.assert_identical(measured(), expected)
    assert (stand_in.tasks, stand_in.others) == (tasks_of(name), 0), "the trace is read by tasks alone"


@pytest.mark.parametrize("name", quick_or_long(SOLVED))
def test_a_stored_recording_gives_the_same_and_a_task_a_layer(name, tmp_path, stand_in):
    expected, measured = of_recorded(name, tmp_path, CUTS["a layer, 2 rows"])
    stand_in.tasks = 0
    xr.testing.assert_identical(measured(), expected)
    assert stand_in.tasks == tasks_of(name)
    if name == "recall_circuit":
        assert expected["solved"], "signatures are scored"


@pytest.mark.long
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "s4d"])
def test_a_stored_trace_gives_the_same_however_it_is_cut(family, cut, name, tmp_path):
    if (family, name) == ("s4d", "sinks"):
        return  # refused: its step sizes are constants
    for suffix in (".zarr", ".nc") if cut in ("whole", "7 tokens") else (".zarr",):
        expected, measured = of_traces(family, name, tmp_path / suffix[1:], CUTS[cut], suffix)
        xr.testing.assert_identical(measured(), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("cut", CUTS)
def test_a_stored_recording_gives_the_same_however_it_is_cut(cut, name, tmp_path):
    expected, measured = of_recorded(name, tmp_path, CUTS[cut])
    xr.testing.assert_identical(measured(), expected)


def test_what_is_in_memory_is_measured_here(stand_in):
    """A trace in memory, and one that was cut in memory: to send either away would take what it was to save."""
    trace = random_trace("mamba")
    expected = sinks.measure(trace, n_shifts=19, **FEW)
    assert stand_in.others == 0
    xr.testing.assert_identical(sinks.measure(trace.chunk(layer=1, token=7), n_shifts=19, **FEW), expected)
    assert stand_in.tasks == 0
    assert stand_in.others > 0


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_a_scheduler_of_dask_does_it_too(scheduler, tmp_path):
    expected, measured = of_traces("mamba", "hidden_attention", tmp_path, CUTS["a layer, 2 rows"])
    with dask.config.set(scheduler=scheduler):
        xr.testing.assert_identical(measured(), expected)


@pytest.mark.parametrize("name", quick_or_long(["hidden_attention", "receptive_field"]))
def test_blocks_of_heads_that_end_with_chunks_differ_by_rounding_alone(name, tmp_path, monkeypatch):
    """A trace too large to be read at once is summed in blocks of heads, which end where chunks do.

    Two orders of a sum of n numbers differ by at most 2 (n - 1) u sum |terms|, u = 2^-53 (Higham 2002, 4.2); what is
    compared is a mean or a norm of at most 24 tokens, 6 heads and 3 rows of numbers whose sum of sizes is `scale`.
    """
    trace = random_trace("mamba")
    lazy = stored(trace, tmp_path, {"channel": 4})
    expected = TRACED[name](trace, None)
    monkeypatch.setattr(hidden_attention.stream, "READ_BYTES", 8 * 24 * 4)
    found = TRACED[name](lazy, None)
    rounding = 2 * 24 * 6 * 3 * 2.0**-53
    changed = 0
    for key in ("layer_mean_distance", "layer_by_lag", "aggregate_entropy", "layer_mixer_profile", "alpha"):
        if key in expected:
            one, other = expected[key].values, found[key].values
            scale = np.nanmax(np.abs(trace_scale(trace))) if key == "alpha" else np.nanmax(np.abs(one))
            np.testing.assert_allclose(other, one, rtol=0, atol=rounding * scale)
            changed += not np.array_equal(one, other, equal_nan=True)
    assert changed, "the order of the sums is another"


def trace_scale(trace: xr.Dataset) -> np.ndarray:
    """Bound of |alpha|: |C| |B| delta at the largest."""
    B, C = (np.nanmax(np.abs(trace[name].values)) for name in "BC")
    return trace["delta"].values * B * C * trace.sizes["state"]


# -- a cluster ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two processes of one thread, on this machine's loopback alone; gone when the tests of this file are."""
    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, threads_per_worker=1, silence_logs=50, **here) as cluster, Client(cluster) as found:
        yield found


def _ran(dask_worker: Any) -> list[str]:
    """The layers that a worker has measured, by their tasks' keys."""
    return sorted({str(one[0]) for one in dask_worker.state.log if str(one[0]).startswith("_task-")})


def test_a_cluster_gives_the_same_by_all_its_workers_and_says_what_is_wrong(tmp_path, client):
    """One test, since every process of the suite would start a cluster of its own for another."""
    trace = random_trace("mamba", n_layers=8)
    lazy, cut = stored(trace, tmp_path / "sinks", CUTS["a layer, 2 rows"]), {"n_shifts": 19} | FEW
    before, expected = client.run(_ran), sinks.measure(trace, **cut)
    xr.testing.assert_identical(sinks.measure(lazy, **cut), expected)
    ran = {worker: set(keys) - set(before[worker]) for worker, keys in client.run(_ran).items()}
    assert len(ran) == 2
    assert all(ran.values()), "both workers measure layers"
    assert len(set.union(*ran.values())) == 8
    trace["A"][1, 2] = 0.5
    with pytest.raises(ValueError, match="`A` of layer 5 must be finite and at most 0"):
        memory_horizon.measure(stored(trace, tmp_path / "wrong", {}))


@pytest.mark.long
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "s4d"])
def test_a_cluster_gives_the_same_of_every_analysis(family, name, tmp_path, client):
    if (family, name) == ("s4d", "sinks"):
        return  # refused: its step sizes are constants
    expected, measured = of_traces(family, name, tmp_path, CUTS["7 tokens"])
    xr.testing.assert_identical(measured(), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVED)
def test_a_cluster_gives_the_same_of_every_recording(name, tmp_path, client):
    expected, measured = of_recorded(name, tmp_path, CUTS["a layer, 2 rows"])
    xr.testing.assert_identical(measured(), expected)


@pytest.mark.long
def test_a_persisted_trace_is_read_from_here(tmp_path, client):
    """It lies on the cluster, where no task can read it by itself."""
    expected, cut = sinks.measure(random_trace("mamba"), n_shifts=19, **FEW), CUTS["a layer, 2 rows"]
    lazy = stored(random_trace("mamba"), tmp_path, cut).persist()
    xr.testing.assert_identical(sinks.measure(lazy, n_shifts=19, **FEW), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "s4d"])
def test_every_analysis_gives_the_same_on_a_cluster(family, name, tmp_path, client):
    if (family, name) == ("s4d", "sinks"):
        return  # refused: its step sizes are constants
    for suffix in (".zarr", ".nc"):
        expected, measured = of_traces(family, name, tmp_path / suffix[1:], CUTS["7 tokens"], suffix)
        xr.testing.assert_identical(measured(), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVED)
def test_every_analysis_of_a_recording_gives_the_same_on_a_cluster(name, tmp_path, client):
    expected, measured = of_recorded(name, tmp_path, CUTS["3 channels"])
    xr.testing.assert_identical(measured(), expected)


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_of(name: str, folder: Path, n_layers: int, n_rows: int) -> tuple[int, int]:
    """Most bytes that an analysis of a store held in this process beside its result, and the bytes of the trace."""
    trace = random_trace("mamba", n_layers=n_layers, n_rows=n_rows, n_tokens=2048)
    lazy = mp.open_trace(save(trace.chunk(layer=1, batch=1), folder / f"{n_layers}x{n_rows}.zarr"))
    tracemalloc.start()
    result = TRACED[name](lazy, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - result.nbytes, trace.nbytes


@pytest.mark.long
@pytest.mark.parametrize("name", ["sinks", "hidden_attention"])
def test_memory_does_not_grow_with_the_layers_or_the_rows(name, tmp_path):
    """Of what a trace grows by, an eighth at most."""
    small, held = peak_of(name, tmp_path, 2, 2)
    for shape in ((8, 2), (2, 8)):
        large, size = peak_of(name, tmp_path, *shape)
        assert large - small < (size - held) / 8, f"{shape}: {small} -> {large} bytes of {held} -> {size}"
