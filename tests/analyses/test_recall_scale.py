"""Memory of the recall circuit is that of a run of tokens; a trace read in runs has the answers of one read at once."""

import tracemalloc
from collections import Counter

import dask.array
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import recall_circuit
from mamba_probe.analyses.recall_circuit import stream, swaps, tally

CHANNELS, MODEL, STATES, CHUNK = 256, 128, 2, 128
STEP, EACH = ("layer", "batch", "token"), ("batch", "token")
VARIABLES = ("delta", "A", "B", "C", "x", "z", "u", "out")
MIXERS = {
    "mamba": lambda: blocks.MambaBlock(12, d_inner=18, d_state=5),
    "mamba2": lambda: blocks.Mamba2Block(12, d_inner=18, n_heads=6, n_groups=2, d_state=5),
    "s4d": lambda: blocks.S4DBlock(12, d_inner=18, d_state=5),
}
WEIGHTS = xr.Dataset(
    {"conv": (("layer", "channel", "lag"), np.full((1, CHANNELS, 4), 0.25)),
     "conv_bias": (("layer", "channel"), np.ones((1, CHANNELS))),
     "in_proj_x": (("layer", "channel", "model"), np.zeros((1, CHANNELS, MODEL))),
     "x_proj_B": (("layer", "state", "channel"), np.ones((1, STATES, CHANNELS))),
     "x_proj_C": (("layer", "state", "channel"), np.ones((1, STATES, CHANNELS))),
     "out_proj": (("layer", "model", "channel"), np.random.default_rng(0).normal(size=(1, MODEL, CHANNELS))),
     "D": (("layer", "channel"), np.ones((1, CHANNELS))),
     "unembedding": (("vocab", "model"), np.random.default_rng(1).normal(size=(8, MODEL))),
     "norm_f": (("model",), np.ones(MODEL))},
    {"layer": [0]},
)  # fmt: skip


def long_trace(n_tokens):
    """Eight pairs, asked again at the end; each block made when it is read, and how often each was. x is SiLU(1)."""
    reads = Counter()

    def made(name, value, *rest):
        def block(block_info):
            place = block_info[None]
            reads[name, *place["chunk-location"]] += 1
            return np.full(place["chunk-shape"], value, "float32")

        chunks = ((1,), (1,), (CHUNK,) * (n_tokens // CHUNK), *((size,) for size in rest))
        empty = np.empty((0,) * len(chunks), "float32")
        return dask.array.map_blocks(block, chunks=chunks, dtype="float32", meta=empty)

    x = 1 / (1 + np.exp(-1.0))
    data: dict = {
        name: ((*STEP, "channel"), made(name, of, CHANNELS)) for name, of in (("delta", 0.01), ("x", x), ("z", 1))
    }
    data |= {name: ((*STEP, "group", "state"), made(name, 1, 1, STATES)) for name in "BC"}
    data |= {name: ((*STEP, "model"), made(name, 1, MODEL)) for name in ("u", "out")}
    data["A"] = (("layer", "channel", "state"), -np.ones((1, CHANNELS, STATES)))
    role, target, source = np.full((1, n_tokens), "filler"), np.full((1, n_tokens), -1), np.full((1, n_tokens), -1)
    role[0, :16], role[0, -8:] = ("key", "value") * 8, "query"
    target[0, -8:], source[0, -8:] = np.arange(8), np.arange(1, 17, 2)
    coords = {"role": role, "target": target, "prediction": target, "source_token": source}
    coords |= {"valid": np.ones((1, n_tokens), bool), "position": np.arange(n_tokens)[None]}
    indexed = {name: (EACH, array) for name, array in coords.items()}
    return xr.Dataset(data, {"layer": [0], **indexed}, {"schema_version": 1, "family": "mamba"}), reads


def peak(n_tokens):
    trace, _ = long_trace(n_tokens)
    tracemalloc.start()
    recall_circuit.measure(trace, weights=WEIGHTS)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.long
def test_memory_does_not_grow_with_tokens(monkeypatch):
    monkeypatch.setattr(stream, "RUN_BYTES", 2 * CHUNK * 8 * CHANNELS)
    peak(512)  # imports and caches
    short, long = peak(1024), peak(4096)
    assert long < 1.3 * short, "4 times the tokens"
    assert long < 4096 * 8 * CHANNELS, "less than one variable of the layer"


def test_chunks_of_a_store_are_read_once_a_pass(monkeypatch):
    monkeypatch.setattr(stream, "RUN_BYTES", 3 * CHUNK * 8 * CHANNELS - 1)
    trace, reads = long_trace(1024)
    recall_circuit.measure(trace, weights=WEIGHTS)
    passes = {"delta": 2, "B": 2, "x": 3, "z": 1, "C": 1}  # over all tokens, over those that a query reads, x beside u
    for name, n in passes.items():
        of = [reads[name, 0, 0, token, *([0] * (2 if name in "BC" else 1))] for token in range(8)]
        assert of == [n] * 8, name
    assert sum(n for key, n in reads.items() if key[0] == "out") == 1, "one token"


def recorded(family):
    """A trace whose every answer is taken for right, of random weights in float64, after some padding; its weights."""
    torch.manual_seed(0)
    model = blocks.LanguageModel([MIXERS[family]()], 60).double()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape).double() * (0.1 if "log" in name else 0.3)
    with mp.attach(model.eval()) as probe:
        task = mp.tasks.mqar(batch=2, length=24, n_pairs=4, vocab=60, seed=1)
        trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
    return trace.assign_coords(prediction=trace.target.where(trace.target >= 0, 0)), weights


@pytest.mark.parametrize("family", MIXERS)
@pytest.mark.parametrize("most", [1, 2**11])
def test_runs_and_passes_give_the_same(monkeypatch, family, most):
    """Runs of a token and of some, a query and some a pass, a swapped token and some at a time; on dask too."""
    trace, weights = recorded(family)
    whole = recall_circuit.measure(trace, weights=weights, n_bootstrap=5)
    assert whole.identity_error.max() < 1e-5
    monkeypatch.setattr(stream, "RUN_BYTES", most)
    monkeypatch.setattr(tally, "QUERY_BYTES", most)
    monkeypatch.setattr(swaps, "SWAPPED_BYTES", most)
    given = trace if most == 1 else trace.chunk({"token": 7})
    found = recall_circuit.measure(given, weights=weights, n_bootstrap=5)
    xr.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-13)
