"""Accuracy and margin of associative recall over mixers, key codes and sizes."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar
from mamba_probe.tasks import mqar as task_of

CELLS = [(4, 64, 128), (8, 64, 256), (16, 128, 512)]  # pairs, length, vocab
LARGE = [(32, 256, 1024), (64, 512, 2048)]
KINDS = [(mixer, code) for mixer in ("mamba1", "mamba2") for code in ("one-hot", "constant-weight")]
WEIGHT = {128: 4, 256: 5, 512: 5, 1024: 6, 2048: 6}  # ones in each constant-weight key


def read_by_values(construction, input_ids):
    """Return what the mixer of each token adds to the features of the values, and these features of each value."""
    caught, model = [], construction.model
    mixer = model.backbone.layers[0].mixer
    handle = mixer.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        model(construction.inputs(input_ids), use_cache=False)
    handle.remove()
    return caught[0].double().numpy()


def check(mixer, code, n_pairs, length, vocab, dtype, tool, batch):
    task = task_of(batch, length, n_pairs, vocab, seed=n_pairs)
    construction = mqar(mixer, vocab // 2, vocab // 2, code, dtype=dtype)
    logits = tool.logits_of(construction, task.input_ids)
    assert task.accuracy(logits.argmax(-1)) == (task.n_query, task.n_query)
    if code == "one-hot":
        assert tool.least_margin(logits, task.target) >= 0.999
    elif mixer == "mamba1":
        read = read_by_values(construction, task.input_ids[:1])[..., -vocab // 2 :]
        logits = np.concatenate([np.zeros_like(read), read], axis=-1)
        assert tool.least_margin(logits, task.target[:1]) >= 0.99 / WEIGHT[vocab]


@pytest.mark.parametrize(("mixer", "code"), KINDS)
@pytest.mark.parametrize(("n_pairs", "length", "vocab"), CELLS)
def test_every_query_is_answered(mixer, code, n_pairs, length, vocab, tool):
    check(mixer, code, n_pairs, length, vocab, torch.float32, tool, batch=2)


@pytest.mark.parametrize(("mixer", "code"), KINDS)
def test_every_query_is_answered_in_float64(mixer, code, tool):
    check(mixer, code, *CELLS[1], torch.float64, tool, batch=2)


@pytest.mark.long
@pytest.mark.parametrize(("mixer", "code"), KINDS)
@pytest.mark.parametrize(("n_pairs", "length", "vocab"), LARGE)
def test_every_query_is_answered_at_size(mixer, code, n_pairs, length, vocab, tool):
    check(mixer, code, n_pairs, length, vocab, torch.float32, tool, batch=2)


@pytest.mark.parametrize("code", ["one-hot", "constant-weight"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_numpy_recurrence_gives_the_same_logits(mixer, code, evaluate_lm, tool):
    construction = mqar(mixer, 16, 16, code, dtype=torch.float64)
    task = task_of(2, 32, 5, 32)
    exact = evaluate_lm(construction.model, task.input_ids)
    assert np.abs(tool.logits_of(construction, task.input_ids) - exact).max() < 2e-6  # transformers' norms are float32
    assert task.accuracy(exact.argmax(-1)) == (10, 10)


def test_mamba2_evaluator_agrees_with_a_random_language_model(evaluate_lm, tool):
    twin = mqar("mamba2", 8, 8).randomised(seed=5)
    ids = np.random.default_rng(0).integers(0, 16, (2, 70))
    native = tool.logits_of(twin, ids)
    assert np.abs(evaluate_lm(twin.model, ids) - native).max() < 1e-5 * np.abs(native).max()


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_one_hot_logits_are_overlaps_of_value_codes(mixer, evaluate_lm):
    """Mamba-2's gated norm is undone where what is read is one value alone."""
    construction, task = mqar(mixer, 16, 16, dtype=torch.float64), task_of(2, 32, 5, 32)
    code = construction.model.backbone.embeddings.weight.detach().numpy()[16:, 16:]
    logits = evaluate_lm(construction.model, task.input_ids)[task.target >= 0]
    assert np.abs(logits[:, 16:] - code[task.target[task.target >= 0] - 16] @ code.T).max() < 1e-12
    assert not logits[:, :16].any()


def test_key_codes_of_constant_weight_need_few_states():
    sizes = {vocab: mqar(n_keys=vocab // 2, n_values=4, key_code="constant-weight") for vocab in (128, 256, 512, 2048)}
    states = {vocab: construction.model.config.state_size for vocab, construction in sizes.items()}
    assert states == {128: 8, 256: 10, 512: 11, 2048: 13}


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_values_that_repeat_break_constant_weight_keys_alone(mixer, tool):
    """Sixteen pairs over four values: other keys' shares of one value add up."""
    task = task_of(batch=4, length=128, n_pairs=16, vocab=512, seed=3)
    shared = np.where(task.input_ids >= 256, 256 + task.input_ids % 4, task.input_ids)
    target = np.where(task.target >= 0, 256 + task.target % 4, -1)
    accuracy = {}
    for code in ("one-hot", "constant-weight"):
        logits = tool.logits_of(mqar(mixer, 256, 256, code), shared)
        accuracy[code] = tool.share(logits.argmax(-1), target)
    assert accuracy["one-hot"] == 1
    assert accuracy["constant-weight"] < 0.8


@pytest.mark.parametrize("seed", range(2))
def test_randomised_mamba2_is_at_chance(seed, tool):
    task = task_of(batch=8, length=32, n_pairs=6, vocab=64, seed=2)
    predicted = tool.logits_of(mqar("mamba2", 32, 32).randomised(seed), task.input_ids, rows=8).argmax(-1)
    correct, total = task.accuracy(predicted)
    assert total == 48
    assert correct <= 12


@pytest.mark.parametrize("broken", ["conv1d.weight", "in_proj.weight", "dt_bias", "A_log"])
def test_one_broken_weight_breaks_mamba2(broken, tool):
    """The lag of one key in B, the way of one key to C, the write gate, the lack of decay."""
    task = task_of(batch=4, length=24, n_pairs=6, vocab=16)
    construction = mqar("mamba2", 8, 8)
    weight = dict(construction.model.named_parameters())[f"backbone.layers.0.mixer.{broken}"]
    key, model = int(task.input_ids[0, 0]), construction.model.config.hidden_size
    with torch.no_grad():
        if broken == "conv1d.weight":
            weight[model + key] = weight[model + key].flip(-1)
        elif broken == "in_proj.weight":
            weight[2 * model + 8 + key, key] = 0
        else:
            weight[0] = -80 if broken == "dt_bias" else 3
    assert tool.least_margin(tool.logits_of(construction, task.input_ids), task.target) < 0.5
