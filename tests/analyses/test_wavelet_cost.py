"""Cost grows as tokens do; memory by a block of heads, not by layers, rows or heads; a store on disk gives the same."""

import time
import tracemalloc

import dask.array
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import kernels


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
    xr.testing.assert_allclose(wavelet_alignment.measure(trace, **options), whole, rtol=1e-9)


def test_memory_is_of_a_block_of_heads(monkeypatch):
    monkeypatch.setattr(kernels, "AT_ONCE", 4 * 4096)
    few, many = (lazy_trace(1, 1, 4096, n).chunk(channel=4) for n in (4, 16))
    wavelet_alignment.measure(few)
    assert peak(many, n_span=2)[1] < 1.5 * peak(few, n_span=2)[1], "4 times the heads"


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
