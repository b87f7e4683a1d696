"""Cost grows as tokens do; memory by a block of heads, not by layers, rows or heads; a store is read once if needed."""

import time
import tracemalloc
from collections import Counter

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr.storage

import mamba_probe as mp
from mamba_probe.analyses import wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import core, kernels, passes, span
from mamba_probe.trace.store import save


def lazy_trace(n_layers, n_rows, n_tokens, n_channels, n_states=2):
    """A trace whose every block is made when it is asked for."""
    step, chunks = ("layer", "batch", "token"), (1, 1, n_tokens)

    def made(*rest):
        generator = dask.array.random.default_rng(0)
        return generator.uniform(0.1, 1.0, (n_layers, n_rows, n_tokens, *rest), chunks=(*chunks, *rest)).astype(
            "float32"
        )

    return xr.Dataset(
        {
            "delta": ((*step, "channel"), made(n_channels) * 0.01),
            "A": (("layer", "channel", "state"), np.full((n_layers, n_channels, n_states), -0.5, "float32")),
            "B": ((*step, "group", "state"), made(1, n_states)),
            "C": ((*step, "group", "state"), made(1, n_states)),
        },
        {"layer": np.arange(n_layers), "valid": (("batch", "token"), np.ones((n_rows, n_tokens), bool)),
         "position": (("batch", "token"), np.tile(np.arange(n_tokens), (n_rows, 1)))},
        {"schema_version": 1, "family": "mamba", "discretization": "euler"},
    )  # fmt: skip


def peak(trace, **options):
    tracemalloc.start()
    started = time.perf_counter()
    result = wavelet_alignment.measure(trace, n_bootstrap=2, n_sampled=2, **options)
    seconds = time.perf_counter() - started
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, found, seconds


@pytest.mark.long
def test_memory_does_not_grow_with_layers_and_rows():
    small, large = (lazy_trace(n, n, 2048, 4) for n in (1, 2))
    wavelet_alignment.measure(small)  # imports and caches
    assert peak(large)[1] < 1.2 * peak(small)[1], "4 times the trace"


def test_a_store_on_disk_gives_the_same(tmp_path):
    trace = lazy_trace(2, 2, 200, 5).compute()
    trace.chunk(layer=1, batch=1).to_zarr(tmp_path / "trace.zarr", consolidated=False)
    stored = xr.open_zarr(tmp_path / "trace.zarr", consolidated=False)
    for kernel in ("write", "mixer"):
        xr.testing.assert_identical(
            wavelet_alignment.measure(stored, kernel=kernel), wavelet_alignment.measure(trace, kernel=kernel)
        )


@pytest.mark.parametrize("read", [False, True])
def test_blocks_of_heads_give_the_same(monkeypatch, read):
    trace = lazy_trace(2, 1, 100, 7).compute()
    options = {
        "n_kept": 3,
        "n_sampled": 4,
        "read_out": np.random.default_rng(0).standard_normal((4, 7)) if read else None,
    }
    whole = wavelet_alignment.measure(trace, **options)
    monkeypatch.setattr(kernels, "AT_ONCE", 300)
    monkeypatch.setattr(kernels, "READ", 500)
    xr.testing.assert_allclose(wavelet_alignment.measure(trace, **options), whole, rtol=1e-9)


def test_memory_is_of_a_block_of_heads(monkeypatch):
    monkeypatch.setattr(kernels, "AT_ONCE", 4 * 4096)
    monkeypatch.setattr(kernels, "READ", 4 * 4096)
    few, many = (lazy_trace(1, 1, 4096, n).chunk(channel=4) for n in (4, 16))
    wavelet_alignment.measure(few)
    assert peak(many, n_span=2)[1] < 1.5 * peak(few, n_span=2)[1], "4 times the heads"


def test_a_span_on_disk_is_not_in_memory(monkeypatch):
    monkeypatch.setattr(kernels, "AT_ONCE", 4 * 4096)
    monkeypatch.setattr(kernels, "READ", 4 * 4096)
    monkeypatch.setattr(core, "ROTATED", 128)
    monkeypatch.setattr(core, "SPIKE_WINDOW", 64)
    trace = lazy_trace(1, 1, 4096, 32).chunk(channel=4)
    wavelet_alignment.measure(trace)
    held = peak(trace, order_lags=16)[1]
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    assert held - peak(trace, order_lags=16)[1] > 0.9 * (2 * 32 * 4096 * 8), "executed and null"


@pytest.mark.parametrize(("held", "spans"), [(1, 1), (2 * 7 * 256, 2), (2**24, 4)])
def test_spans_of_one_pass_are_held_at_a_time(monkeypatch, held, spans):
    """Two queries, each as executed and as its null: a span holds its kernels once, and none after its result."""
    made, most = [], []

    class Watched(passes.Query):
        def add(self, kernel):
            super().add(kernel)
            made.append(self)
            most.append(sum(one.span.functions(0, 256).base.nbytes for one in {id(one): one for one in made}.values()))

    monkeypatch.setattr(passes, "Query", Watched)
    monkeypatch.setattr(passes, "HELD", held)
    wavelet_alignment.measure(lazy_trace(1, 1, 300, 7).compute(), query_tokens=[260, 299])
    assert max(most) == spans * 7 * 256 * 8


def test_memory_is_linear_in_tokens():
    wavelet_alignment.measure(lazy_trace(1, 1, 64, 4))
    short, long = (peak(lazy_trace(1, 1, n, 4))[1] for n in (2**13, 2**15))
    assert long < 4.4 * short, "4 times the tokens"


@pytest.mark.long
def test_memory_does_not_grow_with_queries(monkeypatch):
    monkeypatch.setattr(passes, "HELD", 1)
    trace = lazy_trace(1, 1, 4096, 16)
    one, many = (peak(trace, query_tokens=list(range(4095 - n, 4095)))[1] for n in (1, 8))
    assert many < 1.2 * one, "8 times the queries"


@pytest.mark.parametrize("held", [1, 700, 2**25])
def test_passes_over_a_row_give_the_same(monkeypatch, held):
    trace = lazy_trace(2, 2, 100, 7).compute()
    options = {"query_tokens": [20, 50, 99], "n_kept": 3, "baseline": trace * 1.5}
    options["baseline"].attrs = trace.attrs
    whole = wavelet_alignment.measure(trace, **options)
    monkeypatch.setattr(passes, "HELD", held)
    xr.testing.assert_identical(wavelet_alignment.measure(trace, **options), whole)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A trace on disk, its last 30 tokens padding, in chunks of 20 tokens and 3 channels; and what is read of it."""
    trace = lazy_trace(2, 1, 130, 7).compute()
    trace = trace.assign_coords(valid=trace["valid"] & (trace["token"] < 100), token=np.arange(130))
    chunked = trace.chunk({"layer": 1, "batch": 1, "token": 20, "channel": 3, "state": 1})
    path = save(chunked, tmp_path / "trace.zarr")
    found, get = Counter(), zarr.storage.LocalStore.get

    async def counted(self, key, *rest, **more):
        found[key] += 1
        return await get(self, key, *rest, **more)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
    opened = mp.open_trace(path)
    found.clear()
    return opened, found


def read_of(found, name):
    return {key: count for key, count in found.items() if key.startswith(f"{name}/c/")}


@pytest.mark.parametrize("kernel", ["mixer", "write"])
@pytest.mark.parametrize("options", [{}, {"query_tokens": [30, 60, 99], "n_kept": 2}, {"read_out": np.ones((2, 7))}])
def test_a_chunk_of_a_store_is_read_once_if_needed(stored, kernel, options):
    trace, found = stored
    wavelet_alignment.measure(trace, kernel=kernel, **options)
    of_delta = {f"delta/c/{layer}/0/{token}/{part}" for layer in (0, 1) for token in range(5) for part in range(3)}
    assert read_of(found, "delta") == dict.fromkeys(of_delta, 1), "of 7 chunks of tokens two are padding"
    of_selection = {f"{layer}/0/{token}/0/{state}" for layer in (0, 1) for token in range(5) for state in (0, 1)}
    for name in ("B", "C"):
        needed = {f"{name}/c/{key}" for key in of_selection} if kernel == "mixer" else set()
        assert read_of(found, name) == dict.fromkeys(needed, 1)


def test_layers_that_are_not_chosen_are_not_read(stored):
    trace, found = stored
    wavelet_alignment.measure(trace.isel(layer=[1]))
    assert {key.split("/")[2] for name in ("delta", "B", "C") for key in read_of(found, name)} == {"1"}


@pytest.mark.parametrize(
    ("chunks", "size", "ends"),
    [((), 3, [3, 6, 7]), ((3, 3, 1), 3, [3, 6, 7]), ((3, 3, 1), 4, [3, 7]), ((3, 3, 1), 1, [3, 6, 7]),
     ((7,), 2, [7]), ((7,), 1, [1, 2, 3, 4, 5, 6, 7]), ((2, 3, 2), 5, [5, 7])],
)  # fmt: skip
def test_heads_are_read_by_whole_chunks_where_those_are_small(chunks, size, ends):
    found = list(kernels._slices(7, chunks, size))
    assert [part.stop for part in found] == ends
    assert [part.start for part in found] == [0, *ends[:-1]]


@pytest.mark.long
def test_a_million_tokens_of_one_block_of_channels():
    """Time and memory by the token stay as they are from 2^17 to 2^20 tokens: both are linear."""
    wavelet_alignment.measure(lazy_trace(1, 1, 64, 4))
    cost = {}
    for power in (17, 20):
        result, memory, seconds = peak(lazy_trace(1, 1, 2**power, 4))
        assert result.window.item() == 2**power
        assert np.isfinite(result.layer_best_cosine.item())
        cost[power] = np.array([memory, seconds]) / 2**power
    assert (cost[20] < 1.5 * cost[17]).all(), cost
    assert cost[20][0] < 2000, "bytes a token: 4 channels in float64, some tens of arrays"
