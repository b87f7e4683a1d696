"""The Triton backward without a GPU: through the interpreter, and compiled for an H200."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def script(name, *arguments, **environment):
    """A fresh interpreter, in which Triton was not imported yet; TRITON_INTERPRET stays out of this process."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(name), *arguments]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_interpreted_gradients_hold_the_bound():
    assert len(script("interpreted_backward.py", TRITON_INTERPRET="1")) == 22


@pytest.mark.long
def test_interpreted_gradients_of_every_pair_of_features():
    assert len(script("interpreted_backward.py", "all", TRITON_INTERPRET="1")) == 77


def test_the_backward_compiles_for_an_h200():
    """Two warps on each of an SM's four schedulers; what is spilled is constants of the loop."""
    found = [json.loads(line) for line in script("resources.py", "backward")]
    assert [one["case"] for one in found] == ["backward bf16"] * 2 + ["backward fp32"] * 2
    for one in found:
        assert one["reg"] <= 255, one
        assert one["stack"] <= 96, one
        assert one["shared"] <= 16 * 1024, one
