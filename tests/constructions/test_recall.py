from math import comb

import numpy as np
import pytest
import torch

from mamba_probe.constructions import mqar
from mamba_probe.tasks import mqar as task_of

DTYPES = [torch.float32, torch.float64]


def native(construction, task):
    with torch.no_grad():
        return construction.model(construction.inputs(task.input_ids), use_cache=False).logits.double().numpy()


def margin(logits, task):
    """How far the answer's logit stands above the best other one, at the least of the queries."""
    asked = logits[task.target >= 0]
    answer = np.take_along_axis(asked, task.target[task.target >= 0][:, None], axis=1)
    np.put_along_axis(asked, task.target[task.target >= 0][:, None], -np.inf, axis=1)
    return (answer[:, 0] - asked.max(1)).min()


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def large(request):
    return mqar(n_keys=128, n_values=128, dtype=request.param)


@pytest.mark.parametrize("length", [64, 128])
def test_transformers_answers_every_query(large, length):
    task = task_of(batch=2, length=length, n_pairs=8, vocab=256, seed=11)
    logits = native(large, task)
    assert task.accuracy(logits.argmax(-1)) == (16, 16)
    assert margin(logits, task) >= 0.999


def test_float64_recurrence_answers_every_query(large, evaluate_lm):
    task = task_of(batch=2, length=64, n_pairs=8, vocab=256, seed=12)
    logits = evaluate_lm(large.model, task.input_ids)
    exact = large.dtype == torch.float64
    assert task.accuracy(logits.argmax(-1)) == (16, 16)
    assert margin(logits, task) >= (1 - 1e-12 if exact else 0.999)


@pytest.mark.parametrize("sizes", [(4, 16, 18, 2), (12, 48, 26, 8), (16, 64, 64, 4)])
def test_other_sizes(sizes):
    n_pairs, length, vocab, batch = sizes
    task = task_of(batch, length, min(n_pairs, vocab // 2 - 1), vocab, seed=1)
    construction = mqar(n_keys=vocab // 2, n_values=vocab // 2)
    assert task.accuracy(native(construction, task).argmax(-1)) == (task.n_query, task.n_query)


def test_logits_at_queries_are_overlaps_of_value_codes(evaluate_lm):
    """The answer has its weight w, each other value the number of ones it shares, and every key 0."""
    construction, task = mqar(n_keys=16, n_values=16, dtype=torch.float64), task_of(2, 32, 5, 32)
    code = construction.model.backbone.embeddings.weight.detach().numpy()[16:, 16:]
    logits = evaluate_lm(construction.model, task.input_ids)[task.target >= 0]
    overlap = code[task.target[task.target >= 0] - 16] @ code.T
    assert np.abs(logits[:, 16:] - overlap).max() < 1e-12
    assert not logits[:, :16].any()


@pytest.mark.parametrize("n_values", [2, 3, 6, 7, 64, 128])
def test_value_codes_are_distinct_of_one_weight_and_as_short_as_can_be(n_values):
    construction = mqar(n_keys=4, n_values=n_values)
    code = construction.model.backbone.embeddings.weight.detach().numpy()[4:, 4:]
    bits = code.shape[1]
    assert len({tuple(row) for row in code}) == n_values <= comb(bits, bits // 2)
    assert (code.sum(1) == bits // 2).all()
    assert bits == 2 or comb(bits - 1, (bits - 1) // 2) < n_values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_is_one_at_values_and_none_elsewhere(dtype, evaluate):
    """The write gate: every channel of every value token has delta 1, all other tokens below 1e-17."""
    construction, task = mqar(n_keys=16, n_values=16, dtype=dtype), task_of(2, 32, 5, 32)
    caught = {}
    mixer = construction.model.backbone.layers[0].mixer
    handle = mixer.register_forward_pre_hook(lambda module, inputs: caught.update(hidden=inputs[0]))
    native(construction, task)
    handle.remove()
    delta = evaluate(mixer, caught["hidden"]).delta
    assert np.abs(delta[task.role == "value"] - 1).max() < 1e-5
    assert delta[task.role != "value"].max() < 1e-17


def test_filler_embedding_is_zero():
    assert not mqar(n_keys=8, n_values=8).model.backbone.embeddings.weight[0].any()


@pytest.mark.parametrize("seed", range(3))
def test_randomised_twin_is_at_chance(seed):
    task = task_of(batch=8, length=32, n_pairs=6, vocab=64, seed=2)
    correct, total = task.accuracy(native(mqar(n_keys=32, n_values=32).randomised(seed), task).argmax(-1))
    assert total == 48
    assert correct <= 9  # chance is 1 of 6 for a guess among the row's values: 8


@pytest.mark.parametrize("broken", ["conv1d.weight", "x_proj.weight", "dt_proj.bias"])
def test_one_broken_weight_breaks_it(broken):
    """The lag of one key in B, the way of one key to its state, the write gate of one value bit."""
    task = task_of(batch=4, length=24, n_pairs=6, vocab=16)
    construction = mqar(n_keys=8, n_values=8)
    weight = dict(construction.model.named_parameters())[f"backbone.layers.0.mixer.{broken}"]
    key = int(task.input_ids[0, 0])
    assert margin(native(construction, task), task) >= 0.999
    with torch.no_grad():
        if broken == "conv1d.weight":
            weight[key] = weight[key].flip(-1)
        elif broken == "x_proj.weight":
            weight[1 + key, key] = 0
        else:
            weight[16] = -80
    assert margin(native(construction, task), task) < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "s5"}, 'mixer=\'s5\' is not supported; use one of "mamba1", "mamba2", "s4d"'),
        ({"mixer": "s4"}, "did you mean 's4d'"),
        ({"mixer": "s4d", "writes": "overwrite"}, r"writes='overwrite' needs mixer=\"mamba1\": S4D is time-invariant"),
        ({"mixer": "s4d", "writes": "last"}, r"writes='last' needs mixer=\"mamba1\" or \"mamba2\": S4D is time-inv"),
        ({"mixer": "mamba"}, r"did you mean 'mamba[12]'\?"),
        ({"key_code": "two-hot"}, r"key_code='two-hot' is not supported; .*-hot\", \"constant-weight\", \"random\""),
        ({"writes": "first"}, r"writes='first' is not supported; use one of \"add\", \"last\", \"overwrite\""),
        ({"key_code": "constant-weight", "writes": "last"}, r"writes='last' needs key_code=\"one-hot\""),
        ({"mixer": "mamba2", "writes": "overwrite"}, r"writes=\"overwrite\" needs mixer=\"mamba1\""),
        ({"key_code": "random", "bits": (8, 8)}, r"needs bits=.* and a seed \(got .* seed=None\)"),
        ({"key_code": "random", "seed": 0}, r"needs bits=\(key bits, value bits\) and a seed \(got bits=None"),
        ({"key_code": "random", "bits": (0, 8), "seed": 0}, r"at least one bit .*bits=\(0, 8\)"),
        ({"key_code": "random", "bits": (9, 8), "seed": 0, "mixer": "mamba2"}, r"even number of key bits, .*\(got 9\)"),
        ({"key_code": "random", "bits": (5, 8), "seed": 0}, r"2\*\*5 >= n_keys - 1, a code a key \(got 32 < 63\)"),
        ({"key_code": "random", "bits": (6, 8), "seed": 0, "mixer": "mamba2"}, r"C\(6, 3\) >= n_keys - 1, .*20 < 63"),
        ({"key_code": "random", "bits": (8, 5), "seed": 0, "mixer": "s4d"}, r"2\*\*5 >= n_values, .*\(got 32 < 64\)"),
        ({"bits": (8, 8)}, r"bits and seed go with key_code=\"random\" alone \(got bits=\(8, 8\), seed=None\)"),
        ({"n_keys": 1}, r"n_keys >= 2, the filler and a key \(got 1\)"),
        ({"n_values": 1}, r"n_values >= 2 \(got 1\)"),
        ({"dtype": torch.bfloat16}, "got torch.bfloat16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar(**arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(4, dtype=int), r"input_ids must be integers \(batch, token\), got int64 of shape \(4,\)"),
        (np.zeros((1, 4)), "got float64"),
        (np.full((1, 4), 16), r"input_ids must be in \[0, 16\), got \[16, 16\]"),
    ],
)
def test_impossible_tokens(ids, message):
    with pytest.raises(ValueError, match=message):
        mqar(n_keys=8, n_values=8).inputs(ids)
