"""Random codes of +1 and -1: right up to chance, with the accuracy that their length predicts."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar
from mamba_probe.tasks import mqar as task_of


def accuracy(n_pairs, key_bits, tool, batch, length=None):
    task = task_of(batch, length or 4 * n_pairs, n_pairs, vocab=8192, seed=3)
    construction = mqar("mamba1", 4096, 4096, "random", bits=(key_bits, 32), seed=0)
    predicted = np.concatenate([tool.logits_of(construction, ids[None]).argmax(-1) for ids in task.input_ids])
    return tool.share(predicted, task.target)


@pytest.mark.parametrize(("key_bits", "noted"), [(16, 0.888), (32, 1.0), (64, 1.0)])
def test_accuracy_grows_with_the_key_code(key_bits, noted, tool):
    """256 queries; the standard error at 0.888 is 0.02."""
    assert abs(accuracy(16, key_bits, tool, batch=16) - noted) < 0.06


@pytest.mark.long
@pytest.mark.parametrize(("key_bits", "noted"), [(64, 0.863), (128, 0.994), (256, 1.0)])
def test_accuracy_of_sixty_four_pairs(key_bits, noted, tool):
    assert abs(accuracy(64, key_bits, tool, batch=4, length=256) - noted) < 0.06


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
