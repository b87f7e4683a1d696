"""A training small enough to run whole in about a second, and trainings of it."""

from dataclasses import replace

import pytest

from mamba_probe.training import Config, train

TASK = {"name": "mqar", "length": 12, "n_pairs": 2, "vocab": 12}
MIXERS = {
    "mamba1": {"kind": "mamba1", "d_model": 8, "d_state": 4},
    "mamba2": {"kind": "mamba2", "d_model": 8, "d_state": 4, "n_heads": 2},
    "s4d": {"kind": "s4d", "d_model": 8, "d_state": 2},
}


@pytest.fixture
def config():
    return Config(
        TASK, MIXERS["mamba1"], layers=2, steps=12, batch=4, every=3, warmup=3, learning_rate=1e-2, seed=5,
        evaluation_batches=2,
    )  # fmt: skip


@pytest.fixture(params=sorted(MIXERS))
def each_config(request, config):
    return replace(config, mixer=MIXERS[request.param])


@pytest.fixture(scope="session")
def solved():
    """A small model that has learned a part of its task: its accuracy is neither 0 nor 1."""
    config = Config(TASK, MIXERS["mamba2"], layers=1, steps=150, batch=32, every=50, learning_rate=1e-2, seed=1)
    return train(config)
