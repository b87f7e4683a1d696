"""What a measurement reads and holds: each block of a store once, little more than a layer, the same by any path."""

import tracemalloc

import dask.array
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.memory_horizon import core
from mamba_probe.analyses.memory_horizon.path import TIE, Path

LAYER = "mamba_probe.analyses.memory_horizon.layer"


def stored(n_layers: int, n_tokens: int, n_channels: int, n_states: int = 2) -> tuple[xr.Dataset, dict]:
    """A trace whose blocks of delta (128 tokens, 4 channels) are made when asked for, and how often each was."""
    shape, reads = (n_layers, 1, n_tokens, n_channels), {}

    def block(block_info: dict) -> np.ndarray:
        place = block_info[None]
        at = tuple(place["chunk-location"])
        reads[at] = reads.get(at, 0) + 1
        normal = np.random.default_rng(at).standard_normal(place["chunk-shape"])
        return np.exp(normal - 4).astype("float32")

    chunks = ((1,) * n_layers, (1,), (128,) * (n_tokens // 128), (4,) * (n_channels // 4))
    delta = dask.array.map_blocks(block, chunks=chunks, dtype="float32", meta=np.empty((0,) * 4, "float32"))
    A = -np.geomspace(0.01, 4, n_layers * n_channels * n_states).reshape(n_layers, n_channels, n_states)
    trace = xr.Dataset(
        {"delta": (("layer", "batch", "token", "channel"), delta), "A": (("layer", "channel", "state"), A)},
        {"layer": np.arange(n_layers), "valid": (("batch", "token"), np.ones((1, n_tokens), bool)),
         "position": (("batch", "token"), np.arange(n_tokens)[None])},
        {"schema_version": 1, "family": "mamba"},
    )  # fmt: skip
    assert trace["delta"].shape == shape
    return trace, reads


def peak(trace: xr.Dataset) -> int:
    tracemalloc.start()
    memory_horizon.measure(trace, n_bootstrap=2)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_each_block_of_a_store_is_read_once_whatever_is_asked() -> None:
    trace, reads = stored(2, 256, 8)
    lazy = memory_horizon.measure(trace, level=["1/e", "1/2"], event_tokens=100, tokens=[5])
    assert set(reads.values()) == {1}
    assert len(reads) == 2 * 2 * 2
    assert trace["delta"].chunks is not None, "the trace itself stays on disk"
    xr.testing.assert_identical(
        memory_horizon.measure(trace.load(), level=["1/e", "1/2"], event_tokens=100, tokens=[5]), lazy
    )


def test_a_layer_too_large_to_hold_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, reads = stored(1, 256, 8)
    held = memory_horizon.measure(trace)
    reads.clear()
    monkeypatch.setattr(f"{LAYER}.LAYER_BYTES", 1)
    monkeypatch.setattr(f"{LAYER}.BLOCK_BYTES", 2 * 8 * 256 * 4)  # 4 channels, as they are stored
    xr.testing.assert_identical(memory_horizon.measure(trace), held)
    assert len(reads) == 4
    assert max(reads.values()) == 2, "once for horizons, once for single steps"


@pytest.mark.long
def test_memory_grows_with_a_layer_and_not_with_layers() -> None:
    peak(stored(1, 512, 16)[0])  # imports and caches
    one = peak(stored(1, 2048, 16)[0])
    assert peak(stored(4, 2048, 16)[0]) < 1.2 * one
    assert peak(stored(1, 4096, 16)[0]) < 2.4 * one


@pytest.mark.long
def test_memory_is_of_a_block_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    peak(stored(1, 512, 16)[0])
    monkeypatch.setattr(f"{LAYER}.LAYER_BYTES", 1)
    monkeypatch.setattr(f"{LAYER}.BLOCK_BYTES", 2 * 8 * 4096 * 8)
    few, many = (peak(stored(1, 4096, n)[0]) for n in (16, 64))
    assert many < 1.35 * few, "4 times the channels: their results, and no more of delta"


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_a_path_is_reached_where_a_search_says(spread: float) -> None:
    """Steps alike, uneven, and so uneven that cells hold many tokens; runs of 0, and a start far from 0."""
    generator = np.random.default_rng(0)
    delta = np.exp(spread * generator.standard_normal(3000))
    delta[generator.integers(0, 3000, 300)] = 0
    threshold = np.array([1e-12, 0.3, 1.0, 40.0, delta.sum() / 2, 1e300, np.inf])
    for start in (0.0, 1e4):
        cumulative = start + np.cumsum(delta)
        found = Path(cumulative).reached(threshold)
        for state, passed in enumerate(threshold):
            wanted = np.searchsorted(cumulative, cumulative + passed * (1 - TIE))
            np.testing.assert_array_equal(found[state], np.maximum(wanted, np.arange(1, 3001)))


@pytest.mark.parametrize("start", [0.0, 1e-300])
def test_a_path_that_stands_still_is_never_passed(start: float) -> None:
    assert (Path(np.full(5, start)).reached(np.array([1.0, np.inf])) == 5).all()


def test_a_row_seen_from_its_end_has_the_same_counts() -> None:
    """Backward horizons one by one, against what is known of them from the forward ones."""
    generator = np.random.default_rng(0)
    position, threshold = np.arange(300), np.geomspace(0.01, 1e3, 30)
    reached = Path(np.cumsum(np.exp(generator.standard_normal(300)))).reached(threshold)
    steps, censored = core.forward(reached, position)
    assert 0 < censored.mean() < 1
    _, least = core.counts(steps, censored, 303)
    exact, same = core.counts(*core.backward(reached, position), 303)
    np.testing.assert_array_equal(same, least)
    np.testing.assert_array_equal(core.mirrored(least, steps[:, 0]), exact)


def test_equal_horizons_are_those_of_a_path_with_equal_steps() -> None:
    position, threshold = np.array([0, 1, 2, 5, 6, 9]), np.array([0.2, 0.5, 1.3, 9.0])
    for at in (np.arange(6), position):
        wanted = core.forward(Path(0.5 * (at + 1)).reached(threshold), at)
        found = core.frozen(core.lti(threshold * (1 - TIE), np.array([0.5])), at)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)
