"""A zoo of tiny checkpoints: one trained until it recalls, the others as training begins."""

from dataclasses import replace

import pytest

from mamba_probe import zoo
from mamba_probe.training import Config, Point, describe, initial, train
from mamba_probe.training.trainer import Result

RECALL = Config(
    {"name": "mqar", "length": 16, "n_pairs": 2, "vocab": 16},
    {"kind": "mamba2", "d_model": 16, "d_state": 8, "n_heads": 2},
    layers=1, steps=600, batch=32, every=50, learning_rate=2e-2, warmup=10, stop_at=0.97, evaluation_batches=2,
)  # fmt: skip
KEEP = Config(
    {"name": "keep_nth", "length": 16, "n": 5, "n_tokens": 16}, {"kind": "mamba1", "d_model": 8, "d_state": 4},
    steps=100, batch=32, mixture=[{"length": 8}, {"length": 16}],
)  # fmt: skip
S4D = {"kind": "s4d", "d_model": 8, "d_state": 4, "backend": "convolution"}
UNTRAINED = {
    "trained-keep-mamba1-64": KEEP,
    "trained-keep-s4d-64": replace(KEEP, mixer=S4D, mixture=()),
    "trained-mqar-s4d-small": replace(RECALL, mixer=S4D),
    "trained-mqar-no-conv": replace(RECALL, mixer={"kind": "mamba1", "d_model": 8, "d_state": 4, "d_conv": 1}),
    "trained-induction-mamba1": replace(KEEP, task={"name": "induction", "length": 32, "vocab": 8}, mixture=()),
}


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("zoo")
    results = {"trained-mqar-mamba2": train(RECALL)}
    for name, config in UNTRAINED.items():
        results[name] = Result(config, initial(config).eval(), (Point(100, 2.0, 1, 10, 1.0),), "steps")
    for name, result in results.items():
        beyond = [{"length": 64}] if "keep" not in name else []
        card = describe(result, name, "Tiny.", regenerate="the tests", unseen_batches=4, beyond=beyond)
        zoo.save(result.model, card, directory / name)
    return directory
