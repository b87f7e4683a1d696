"""What a training does: its loss, its step, how it ends, and that it learns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from mamba_probe.training import Point, answered, held_out, initial, rows, train, trainer

LEARNS = {"steps": 30, "every": 10, "batch": 16, "warmup": 5}


def test_thirty_steps_lower_the_loss(each_config):
    result = train(replace(each_config, **LEARNS))
    losses = [point.loss for point in result.curve]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


def test_the_loss_is_the_cross_entropy_over_the_queries(config):
    """By hand from the logits of the model as it began."""
    one = replace(config, steps=1, every=1)
    input_ids, target = rows(one, 0)
    with torch.no_grad():
        logits = initial(one)(input_ids).logits.double().numpy()
    asked = target.numpy() >= 0
    expected = -log_softmax(logits, -1)[asked, target.numpy()[asked]].mean()
    assert asked.sum() == one.batch * one.task["n_pairs"]
    assert train(one).last.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_first_step_is_adamws_by_its_formula(config, clip):
    """With betas .9 and .999 the first step is lr g / (|g| + eps), beside lr weight_decay w; A, D, biases undecayed."""
    one = replace(config, steps=1, every=1, weight_decay=0.5, warmup=0, clip=clip, dtype="float64")
    before, after = initial(one), train(one).model
    input_ids, target = rows(one, 0)
    logits = before(input_ids).logits
    torch.nn.functional.cross_entropy(logits[target >= 0], target[target >= 0]).backward()
    gradients = {name: parameter.grad for name, parameter in before.named_parameters()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    stepped = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        gradient = gradients[name] * scale
        spared = name.endswith(("A_log", ".D", "bias", "norm.weight", "norm_f.weight"))
        kept = parameter.detach() * (1.0 if spared else 1 - 1e-2 * 0.5)
        expected = kept - 1e-2 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(stepped[name], expected, rtol=0, atol=1e-9), name


def test_nothing_but_the_config_decides(config):
    torch.manual_seed(1)
    first, drawn = train(config), torch.rand(1)
    torch.manual_seed(2)
    second = train(config)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # torch's own generator was left alone
    other = train(replace(config, seed=6))
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_it_stops_at_the_accuracy_asked_for(config):
    result = train(replace(config, **LEARNS | {"steps": 3000, "batch": 32}, stop_at=0.6))
    assert result.ended == "accuracy"
    assert result.finished
    assert result.last.step < 3000
    assert result.last.accuracy >= 0.6
    assert all(point.accuracy < 0.6 for point in result.curve[:-1])


def test_a_training_that_diverges_says_so_and_stops(config, tmp_path):
    wild = replace(config, learning_rate=1e30, warmup=0, clip=None)
    result = train(wild, tmp_path)
    assert (result.ended, result.finished, result.last.loss) == ("diverged", True, math.inf)
    assert train(wild, tmp_path).last == result.last


def test_accuracy_counts_the_queries_of_the_held_out_rows(config):
    model = initial(config).train()
    correct = total = 0
    for index in range(2):
        task = held_out(config, "validation", index)
        with torch.no_grad():
            predicted = model(torch.from_numpy(task.input_ids)).logits.argmax(-1).numpy()
        asked = task.target >= 0
        correct, total = correct + int((predicted[asked] == task.target[asked]).sum()), total + int(asked.sum())
    assert answered(model, config) == (correct, total)
    assert model.training
    assert answered(model, config, "test", 3)[1] == 3 * config.batch * 2


def test_rows_are_answered_in_pieces_that_change_nothing(config, monkeypatch):
    model = initial(config)
    whole, seen = answered(model, config), []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(trainer, "TOKENS_A_CALL", 3 * config.draw(1, 0).input_ids.shape[1] + 1)
    assert answered(model, config, batches=2) != (0, 0)
    assert max(seen) == 3
    assert answered(model, config) == whole


def test_each_evaluation_is_told_and_kept(config):
    told = []
    result = train(config, say=lambda config, point: told.append(point))
    assert told == list(result.curve)
    assert [point.step for point in told] == [3, 6, 9, 12]
    assert np.all(np.diff([point.seconds for point in told]) > 0)
    assert not result.model.training


def test_float64_is_trained_in_float64(config):
    model = train(replace(config, dtype="float64", steps=3)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_block_of_one_tap_mixes_no_tokens_but_through_its_state(config):
    """Without convolution the first token's write is all that a later token can see of it."""
    model = initial(replace(config, mixer={"kind": "mamba1", "d_model": 8, "d_state": 4, "d_conv": 1}, layers=1))
    mixer = model.backbone.layers[0].mixer
    mixer.x_proj.weight.data[mixer.sizes["dt_rank"] :] = 0.0  # B = C = 0: nothing goes through the state
    ids = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[5, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, 1:], model(changed).logits[:, 1:])
        mixed = initial(replace(config, layers=1))
        mixed.backbone.layers[0].mixer.x_proj.weight.data[mixer.sizes["dt_rank"] :] = 0.0
        assert not torch.equal(mixed(ids).logits[:, 1], mixed(changed).logits[:, 1])


def test_points_have_their_accuracy():
    assert Point(1, 0.5, 3, 4, 0.1).accuracy == 0.75


def test_the_fused_optimiser_is_for_cuda_alone(config):
    _, optimizer = trainer._made(config)
    assert not optimizer.defaults["fused"]
