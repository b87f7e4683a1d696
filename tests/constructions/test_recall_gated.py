"""Random filler, keys and values among it: it pollutes a memory that is always open."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar, mqar_gated
from mamba_probe.tasks import mqar as task_of

CELLS = [(4, 64, 128, 16), (16, 128, 512, 4)]


def polluted(n_pairs, length, vocab, batch, tool):
    task = task_of(batch, length, n_pairs, vocab, seed=7)
    return tool.random_filler(task), task.target


@pytest.mark.parametrize("code", ["one-hot", "constant-weight"])
@pytest.mark.parametrize(("n_pairs", "length", "vocab", "batch"), CELLS)
def test_every_query_is_answered(code, n_pairs, length, vocab, batch, tool):
    ids, target = polluted(n_pairs, length, vocab, batch, tool)
    construction = mqar_gated(vocab // 2, vocab // 2, n_pairs, length, code)
    with torch.no_grad():
        pieces = construction.inputs(ids).split(2)
        predicted = np.concatenate([construction.answer(construction.model(hidden)) for hidden in pieces])
    assert tool.share(predicted, target) == 1


@pytest.mark.parametrize("code", ["one-hot", "constant-weight"])
def test_without_the_position_it_fails(code, tool):
    """About 0.96 and 0.84 at these sizes."""
    ids, target = polluted(4, 64, 128, 48, tool)
    accuracy = tool.share(tool.logits_of(mqar("mamba1", 64, 64, code), ids, rows=16).argmax(-1), target)
    assert 0.6 < accuracy < (1 if code == "one-hot" else 0.95)


def test_float64_recurrence_writes_at_the_values_of_the_pairs_alone(tool, evaluate):
    ids, target = polluted(4, 64, 128, 2, tool)
    construction = mqar_gated(64, 64, 4, 64, dtype=torch.float64)
    found = evaluate(construction.model, construction.inputs(ids))
    read = np.zeros_like(ids, dtype=bool)
    read[:, 1:8:2] = True
    assert np.abs(found.delta[read] - 1).max() < 1e-5
    assert found.delta[~read].max() < 1e-13
    assert tool.share(construction.answer(torch.tensor(found.out)), target) == 1


def test_logits_stand_one_apart(tool, evaluate):
    ids, target = polluted(4, 64, 128, 2, tool)
    construction = mqar_gated(64, 64, 4, 64, dtype=torch.float64)
    code = construction.inputs(np.arange(128).reshape(2, 64))[1, :, 64:-1].numpy()
    overlap = evaluate(construction.model, construction.inputs(ids)).out[..., 64:-1] @ code.T
    assert tool.least_margin(np.concatenate([np.zeros_like(overlap), overlap], axis=-1), target) > 1 - 1e-11


def test_randomised_twin_fails(tool):
    ids, target = polluted(4, 64, 128, 16, tool)
    twin = mqar_gated(64, 64, 4, 64).randomised(0)
    with torch.no_grad():
        assert tool.share(twin.answer(twin.model(twin.inputs(ids))), target) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_code": "random"}, 'key_code=\'random\' is not supported; use "one-hot" or "constant-weight"'),
        ({"n_pairs": 0}, r"n_pairs >= 1 \(got 0\)"),
        ({"n_keys": 1}, r"n_keys >= 2, the filler and a key \(got 1\)"),
        ({"n_values": 1}, r"n_values >= 2 \(got 1\)"),
        ({"n_pairs": 8, "length": 16}, r"length > 2 \* n_pairs \(got 16 <= 16\)"),
        ({"beta": 0.0}, r"beta > 0 and finite \(got 0.0\)"),
        ({"dtype": torch.bfloat16}, "got torch.bfloat16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar_gated(**arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((1, 7), dtype=int), "input_ids must have 8 tokens in a row, got 7"),
        (np.full((1, 8), 16), r"mqar_gated: input_ids must be in \[0, 16\), got \[16, 16\]"),
    ],
)
def test_impossible_tokens(ids, message):
    with pytest.raises(ValueError, match=message):
        mqar_gated(n_keys=8, n_values=8, n_pairs=2, length=8).inputs(ids)
