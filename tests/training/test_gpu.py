"""Training on a GPU: the Triton scan (plain torch for S4D) learns as on the CPU, and checkpoints move between them."""

from dataclasses import replace

import pytest

from mamba_probe.training import answered, describe, train

pytestmark = pytest.mark.gpu


def test_the_losses_are_those_of_the_cpu(each_config):
    on_cpu, on_gpu = (train(replace(each_config, device=device)) for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_gpu.curve, on_cpu.curve, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)


def test_a_checkpoint_moves_from_the_cpu_to_the_gpu_and_back(each_config, tmp_path):
    train(each_config, tmp_path, until=3)
    assert train(replace(each_config, device="cuda"), tmp_path, until=9).last.step == 9
    done = train(each_config, tmp_path)
    assert done.ended == "steps"
    assert done.last.loss == pytest.approx(train(each_config).last.loss, rel=2e-3)


def test_it_learns_and_its_card_counts_the_same_on_the_cpu(each_config):
    config = replace(each_config, device="cuda", steps=60, every=20, batch=32)
    result = train(config)
    assert result.curve[-1].loss < result.curve[0].loss - 0.2
    card = describe(result, "x", "x", regenerate="x")
    assert card["engine"] == ["cpu on cuda" if config.mixer["kind"] == "s4d" else "triton on cuda"]
    correct, total = answered(result.model.cpu(), config, "test", 16)
    assert total == card["accuracy"]["total"]
    assert abs(correct - card["accuracy"]["correct"]) <= 2  # ties of the largest logit
