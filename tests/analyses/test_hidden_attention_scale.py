"""Long traces of many channels: time linear in tokens a query, memory that neither queries nor channels fill."""

import json
import subprocess
import sys

import numpy as np
import pytest

CHILD = """
import json, pathlib, re, sys, time
import dask.array as da, numpy as np, xarray as xr
from mamba_probe.analyses import hidden_attention

n_layers, n_tokens, n_channels, n_heads, n_queries = map(int, sys.argv[1:])
state, block = 16, min(128, n_channels, 2**23 // n_tokens)

def most():  # MiB held at once; ru_maxrss would hold what the test's own process has too
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

def steps(block_id):  # selected by the channel and the token, so that the answer is known without the trace
    token = np.arange(n_tokens)[:, None]
    channel = np.arange(block_id[3] * block, (block_id[3] + 1) * block)
    return (0.02 + 0.01 * np.sin(0.37 * token + channel)).astype("float32")[None, None]

def selection(phase):
    token = np.arange(n_tokens, dtype="float32")[:, None]
    values = np.cos(0.11 * token * (1 + phase) + np.arange(state, dtype="float32")).astype("float32")
    return da.from_array(np.broadcast_to(values[None, None, :, None], (1, 1, n_tokens, 1, state)), chunks=-1)

delta = da.map_blocks(
    steps, chunks=((1,) * n_layers, (1,), (n_tokens,), (block,) * (n_channels // block)), dtype="float32",
    meta=np.empty((0, 0, 0, 0), "float32"),
)
place = ("layer", "batch", "token")
trace = xr.Dataset(
    {"delta": ((*place, "channel"), delta),
     "A": (("layer", "channel", "state"), np.broadcast_to(-np.arange(1.0, state + 1), (n_layers, n_channels, state))),
     **{name: ((*place, "group", "state"), da.concatenate([selection(i)] * n_layers)) for i, name in enumerate("BC")}},
    {"layer": np.arange(n_layers), "channel": np.arange(n_channels),
     "valid": (("batch", "token"), np.ones((1, n_tokens), bool)),
     "position": (("batch", "token"), np.arange(n_tokens)[None])},
    {"schema_version": 1, "family": "mamba", "discretization": "euler", "n_heads": n_channels},
)
before = most()
began = time.process_time()
result = hidden_attention.measure(
    trace.isel(layer=[0]), query_tokens=list(range(n_tokens - n_queries, n_tokens)), aggregate="mean_absolute",
    heads=None if n_heads == n_channels else list(range(n_heads)),
)
print(json.dumps({
    "seconds": time.process_time() - began,
    "mib": most() - before,
    "trace_mib": trace["delta"].nbytes / 2**20,
    "last": result["alpha"].values[0, 0, -1, -9:].tolist(),
    "distance": result["mean_distance"].values[0, 0, -1, 0],
}))
"""
STATE = 16


def measured(n_layers, n_tokens, n_channels, n_heads, n_queries=1):
    sizes = [str(size) for size in (n_layers, n_tokens, n_channels, n_heads, n_queries)]
    done = subprocess.run([sys.executable, "-c", CHILD, *sizes], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(n_tokens, n_channels, n_sources=9):
    """Mean |alpha| over channels of the last sources: from the formulas of the trace, never the trace itself."""
    token = np.arange(n_tokens - n_sources, n_tokens)
    delta = (0.02 + 0.01 * np.sin(0.37 * token[:, None] + np.arange(n_channels))).astype("float32").astype(float)
    elapsed = np.cumsum(delta[::-1], axis=0)[::-1] - delta
    B, C = (
        np.cos(0.11 * token[:, None].astype("float32") * (1 + i) + np.arange(STATE, dtype="float32")).astype("float32")
        for i in range(2)
    )
    rate = np.arange(1.0, STATE + 1)
    alpha = np.einsum("sh,shn,sn,n->sh", delta, np.exp(-elapsed[..., None] * rate), B, C[-1])
    return np.abs(alpha).mean(axis=1)


def test_the_small_size_agrees_with_its_formulas():
    small = measured(2, 256, 8, 8)
    np.testing.assert_allclose(small["last"], expected(256, 8), rtol=1e-6)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_32k_tokens_of_a_130m_sized_trace_take_linear_time_at_constant_memory():
    """1,536 channels and 24 layers: the step sizes alone are beyond what is ever held."""
    long = measured(24, 32_768, 1_536, 1_536)
    quarter = measured(24, 8_192, 1_536, 1_536)
    narrow = measured(24, 32_768, 384, 384)
    more = measured(24, 32_768, 384, 384, n_queries=4)
    np.testing.assert_allclose(long["last"], expected(32_768, 1_536), rtol=1e-6)
    assert long["trace_mib"] > 4_000
    assert long["mib"] < 500
    assert long["mib"] < narrow["mib"] + 150, "channels do not fill memory"
    assert more["mib"] < narrow["mib"] + 100, "queries do not fill memory"
    assert long["seconds"] < 7 * quarter["seconds"], "linear: 4 times the tokens"
    assert more["seconds"] < 5 * narrow["seconds"], "linear in queries"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_million_tokens_on_one_block_of_channels():
    million, quarter = measured(1, 2**20, 128, 8), measured(1, 2**18, 128, 8)
    np.testing.assert_allclose(million["last"], expected(2**20, 8), rtol=1e-6)
    assert million["mib"] < 1_100
    assert million["seconds"] < 7 * quarter["seconds"]
