"""The Triton backward without a GPU: through the interpreter, and compiled for an H200."""

import json

import pytest


def test_interpreted_gradients_hold_the_bound(script):
    assert len(script("interpreted_backward.py", TRITON_INTERPRET="1")) == 22


@pytest.mark.long
def test_interpreted_gradients_of_every_pair_of_features(script):
    assert len(script("interpreted_backward.py", "all", TRITON_INTERPRET="1")) == 77


def test_the_backward_compiles_for_an_h200(script):
    """Two warps on each of an SM's four schedulers; what is spilled is constants of the loop."""
    found = [json.loads(line) for line in script("resources.py", "backward")]
    assert [one["case"] for one in found] == ["backward bf16"] * 2 + ["backward fp32"] * 2
    for one in found:
        assert one["reg"] <= 255, one
        assert one["stack"] <= 96, one
        assert one["shared"] <= 16 * 1024, one
