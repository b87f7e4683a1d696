"""Keys that come again: what a write does to the older ones."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar, recall
from mamba_probe.tasks import mqar as task_of

MODELS = [("mamba1", "last"), ("mamba2", "last"), ("mamba1", "overwrite")]


@pytest.fixture(scope="module")
def rows(tool):
    """24 pairs over 8 keys."""
    return tool.repeated_keys(n_keys=9, n_values=64, n_pairs=24, batch=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("mixer", "writes"), MODELS)
def test_newest_value_wins(mixer, writes, dtype, rows, tool):
    ids, target = rows
    logits = tool.logits_of(mqar(mixer, 9, 64, writes=writes, dtype=dtype), ids, rows=16)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) > (0.999 if writes == "overwrite" else 0)


@pytest.mark.parametrize(("mixer", "writes"), MODELS)
def test_numpy_recurrence_agrees(mixer, writes, rows, evaluate_lm, tool):
    ids, target = rows[0][:2], rows[1][:2]
    construction = mqar(mixer, 9, 64, writes=writes, dtype=torch.float64)
    logits = evaluate_lm(construction.model, ids)
    assert tool.share(logits.argmax(-1), target) == 1
    assert np.abs(logits - tool.logits_of(construction, ids)).max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_adding_fails(mixer, rows, tool):
    ids, target = rows
    assert tool.share(tool.logits_of(mqar(mixer, 9, 64), ids, rows=16).argmax(-1), target) < 0.5


def test_more_than_half_kept_is_too_much(rows, monkeypatch, tool):
    """Older values together weigh r / (1 - r) of the newest: 9 at r = 0.9."""
    monkeypatch.setattr(recall, "KEPT", 0.9)
    ids, target = rows
    assert tool.share(tool.logits_of(mqar("mamba1", 9, 64, writes="last"), ids, rows=16).argmax(-1), target) < 0.9


@pytest.mark.parametrize(("mixer", "writes"), MODELS)
def test_keys_that_come_once_are_answered_too(mixer, writes, tool):
    task = task_of(batch=4, length=64, n_pairs=8, vocab=64)
    logits = tool.logits_of(mqar(mixer, 32, 32, writes=writes), task.input_ids, rows=4)
    assert task.accuracy(logits.argmax(-1)) == (32, 32)


def test_overwriting_touches_the_channels_of_its_key_alone(rows, evaluate, tool):
    """delta is 40 where a value follows the channel's key, and e^-40 elsewhere."""
    construction, ids = mqar("mamba1", 9, 64, writes="overwrite", dtype=torch.float64), rows[0][:2]
    hidden, mixer = [], construction.model.backbone.layers[0].mixer
    handle = mixer.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].detach()))
    tool.logits_of(construction, ids, rows=2)
    handle.remove()
    delta = evaluate(mixer, hidden[0]).delta
    for channel, label in enumerate(construction.channels):
        if label.startswith("value bit"):
            key = int(label.split()[-1])
            write = (ids >= 9) & (np.pad(ids, ((0, 0), (1, 0)))[:, :-1] == key)
            assert np.abs(delta[write, channel] - 40).max(initial=0) < 1e-4
            assert delta[~write, channel].max() < 1e-16


def test_exact_overwrite_takes_more_channels():
    """n_keys - 1 times the value's bits, the previous key's, one constant, and padding to a multiple of the model."""
    config = mqar("mamba1", 9, 64, writes="overwrite").model.config
    assert (config.hidden_size, config.intermediate_size, config.state_size) == (9 + 8, 85, 1)
    assert 8 * 8 + 8 + 1 <= config.intermediate_size < 8 * 8 + 8 + 1 + config.hidden_size


@pytest.mark.parametrize(("writes_since", "answered"), [(80, True), (140, False)])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_float32_loses_what_was_written_long_ago(mixer, writes_since, answered, tool):
    """0.4^140 = 2e-56 is 0 in float32; a value overwritten in place is not lost."""
    rng, ids = np.random.default_rng(1), np.zeros((4, 2 * writes_since + 4), dtype=int)
    ids[:, 0], ids[:, 1], ids[:, -2] = 1, 40, 1
    ids[:, 2:-2:2], ids[:, 3:-2:2] = rng.integers((2, 9), (9, 73), (4, writes_since, 2)).transpose(2, 0, 1)
    predicted = tool.logits_of(mqar(mixer, 9, 64, writes="last"), ids)[:, -2].argmax(-1)
    assert ((predicted == 40) == answered).all()
    assert (tool.logits_of(mqar("mamba1", 9, 64, writes="overwrite"), ids)[:, -2].argmax(-1) == 40).all()
