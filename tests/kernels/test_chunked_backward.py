"""The backward of A (head,) without a GPU: through Triton's interpreter, and compiled for an H200."""

import json

import pytest


def test_interpreted_gradients_hold_the_bound(interpreted):
    assert len(interpreted("interpreted_chunked_backward.py")) == 24


@pytest.mark.long
def test_interpreted_gradients_of_every_pair_of_features(interpreted):
    assert len(interpreted("interpreted_chunked_backward.py", "all")) == 76


def taken(script, dtype):
    found = [json.loads(line) for line in script("resources_chunked_backward.py", dtype)]
    names = ["steps", "boundary", "inputs", "projections", "steps_backward", "sums"]
    assert [one["kernel"] for one in found] == [f"{name}_kernel" for name in names]
    return dict(zip(names, found, strict=True))


def test_the_kernels_compile_for_an_h200(script):
    """Two programs on an SM; what is spilled is little beside the products."""
    found = taken(script, "bfloat16")
    assert max(one["shared"] for one in found.values()) <= 113 * 1024
    assert found["boundary"]["reg"] <= 128
    for name, limit in {
        "steps": 0,
        "boundary": 0,
        "inputs": 160,
        "projections": 256,
        "steps_backward": 0,
        "sums": 0,
    }.items():
        assert found[name]["stack"] <= limit, found[name]


@pytest.mark.long
def test_exact_products_fit_an_h200(script):
    """Of float32 inputs: what is split spills, but it runs."""
    found = taken(script, "float32")
    assert max(one["shared"] for one in found.values()) <= 227 * 1024
    assert found["boundary"]["stack"] <= 64
