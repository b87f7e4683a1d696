"""Random codes of +1 and -1: right up to chance, with the accuracy that their length predicts."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar
from mamba_probe.tasks import mqar as task_of


def counted(mixer, n_pairs, bits, vocab, tool, batch, length):
    task = task_of(batch, length, n_pairs, vocab, seed=3)
    construction = mqar(mixer, vocab // 2, vocab // 2, "random", bits=bits, seed=0)
    predicted = np.concatenate([tool.logits_of(construction, ids[None]).argmax(-1) for ids in task.input_ids])
    return task.accuracy(predicted)


def agrees(correct, total, noted, z=3.0):
    """Whether `noted`, of three decimals, is in Wilson's score interval of z standard deviations."""
    p = correct / total
    centre, half = p + z**2 / (2 * total), z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    low, high = ((centre + sign * half) / (1 + z**2 / total) for sign in (-1, 1))
    return low - 5e-4 <= noted <= high + 5e-4


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("key_bits", "noted"), [(16, 0.888), (32, 1.0), (64, 1.0)])
def test_accuracy_grows_with_the_key_code(mixer, key_bits, noted, tool):
    """256 queries; the standard error at 0.888 is 0.02."""
    assert agrees(*counted(mixer, 16, (key_bits, 32), 8192, tool, batch=16, length=64), noted)


@pytest.mark.parametrize(("key_bits", "noted"), [(16, 0.906), (64, 1.0)])
def test_accuracy_of_s4d_grows_with_the_key_code(key_bits, noted, tool):
    """4 N d + 2 d channels: 1,056 and 4,128."""
    assert agrees(*counted("s4d", 8, (key_bits, 16), 1024, tool, batch=24, length=64), noted)


@pytest.mark.long
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("key_bits", "value_bits", "noted"), [
    (64, 32, 0.863), (128, 32, 0.994), (256, 32, 1.0), (512, 32, 1.0), (256, 16, 0.959), (256, 64, 1.0),
])  # fmt: skip
def test_accuracy_of_sixty_four_pairs(mixer, key_bits, value_bits, noted, tool):
    assert agrees(*counted(mixer, 64, (key_bits, value_bits), 8192, tool, batch=4, length=256), noted)


def test_s4d_reads_what_mamba_reads(evaluate_lm):
    """The codes of one seed are the same: so is the logit of every token."""
    made = {"n_keys": 16, "n_values": 16, "key_code": "random", "bits": (11, 9), "seed": 4, "dtype": torch.float64}
    task = task_of(2, 32, 5, 32)
    one, other = (evaluate_lm(mqar(mixer, **made).model, task.input_ids) for mixer in ("mamba1", "s4d"))
    assert np.abs(one - other).max() < 1e-12
    assert np.abs(one).max() > 1


def test_s4d_has_a_channel_for_each_pair_of_signs():
    construction = mqar("s4d", 9, 9, key_code="random", bits=(6, 5), seed=0)
    assert construction.sizes["channel"] == 4 * 6 * 5 + 2 * 5 == len(construction.channels)


@pytest.mark.parametrize("complete", [True, False])
def test_mamba2_reads_what_mamba1_reads_up_to_its_norm(complete, evaluate):
    """On balanced codes, the gated norm keeps the direction; without the state that takes the mean off, it is lost."""
    made = {"n_keys": 16, "n_values": 16, "key_code": "random", "bits": (12, 9), "seed": 4, "dtype": torch.float64}
    task, read = task_of(2, 32, 5, 32), []
    constructions = [mqar(mixer, **made) for mixer in ("mamba2", "mamba1")]
    embedding = constructions[0].model.backbone.embeddings.weight.detach().numpy()
    hidden = (embedding / np.sqrt((embedding**2).mean(-1, keepdims=True) + 1e-5))[task.input_ids]
    if not complete:
        with torch.no_grad():
            constructions[0].model.backbone.layers[0].mixer.conv1d.weight[-1] = 0
    for construction in constructions:
        out = evaluate(construction.model.backbone.layers[0].mixer, hidden).out[task.target >= 0]
        read.append(out / np.linalg.norm(out, axis=-1, keepdims=True))
    difference = np.abs(read[0] - read[1]).max()
    assert difference < 1e-12 if complete else difference > 0.1


def test_keys_of_mamba2_are_balanced():
    construction = mqar("mamba2", 9, 9, key_code="random", bits=(6, 5), seed=0)
    key = construction.model.backbone.embeddings.weight.detach().numpy()[1:9, :6]
    assert set(np.unique(key)) == {-1, 1}
    assert not key.sum(1).any()
    assert construction.states == [*(f"key bit {bit}" for bit in range(6)), "mean of the bits' overlap"]


def test_logits_are_products_of_codes(evaluate_lm):
    """Up to the last norm: (1/N) <chi(v), sum over pairs of <phi(query), phi(key)> chi(value)>."""
    construction = mqar("mamba1", 16, 16, "random", bits=(12, 9), seed=4, dtype=torch.float64)
    task = task_of(2, 32, 5, 32)
    embedding = construction.model.backbone.embeddings.weight.detach().numpy()
    key, value = embedding[:16, :12], embedding[16:, 12:21]
    assert set(np.unique(key[1:])) == set(np.unique(value)) == {-1, 1}
    logits = evaluate_lm(construction.model, task.input_ids)
    for row, at in zip(*np.nonzero(task.target >= 0), strict=True):
        ids = task.input_ids[row]
        weight = key[ids[:10:2]] @ key[ids[at]] / 12
        read = weight @ value[ids[1:10:2] - 16]
        scale = np.sqrt((13 + 9) / (13 + (read**2).sum()))  # of the last norm, which is undone for the answer alone
        assert logits[row, at, 16:] == pytest.approx(value @ read * scale, abs=1e-4)


def test_codes_are_those_of_the_seed():
    one, same, other = (mqar("mamba1", 8, 8, "random", bits=(6, 5), seed=seed).model.state_dict() for seed in (1, 1, 2))
    name = "backbone.embeddings.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_transformers_reads_the_saved_mamba2(tmp_path):
    construction = mqar("mamba2", 8, 8, "random", bits=(6, 5), seed=0)
    model, info = type(construction.model).from_pretrained(construction.save(tmp_path), output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, construction.model(ids).logits)
