import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import Task, mqar


@st.composite
def sizes(draw):
    n_pairs = draw(st.integers(1, 12))
    length = 2 * draw(st.integers(2 * n_pairs, 2 * n_pairs + 20))
    vocab = 2 * draw(st.integers(n_pairs + 1, n_pairs + 30))
    batch, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**32))
    return {"batch": batch, "length": length, "n_pairs": n_pairs, "vocab": vocab, "seed": seed}


def asked(task):
    """Every query as (row, token, key, answer, source), read off the arrays one by one."""
    for row, token in zip(*np.nonzero(task.role == "query"), strict=True):
        yield row, token, task.input_ids[row, token], task.target[row, token], task.source_token[row, token]


@settings(deadline=None, max_examples=60)
@given(sizes())
def test_target_is_the_value_that_follows_the_key(size):
    task = mqar(**size)
    queries = list(asked(task))
    assert len(queries) == task.n_query == size["batch"] * size["n_pairs"]
    for row, _, key, answer, source in queries:
        context = task.input_ids[row, : 2 * size["n_pairs"]].tolist()
        at = context[0::2].index(key)
        assert (answer, source) == (context[2 * at + 1], 2 * at + 1)
        assert task.role[row, source] == "value"
        assert task.input_ids[row, source] == answer


@settings(deadline=None, max_examples=60)
@given(sizes())
def test_layout(size):
    task, context, half = mqar(**size), 2 * size["n_pairs"], size["vocab"] // 2
    keys, values = task.input_ids[:, 0:context:2], task.input_ids[:, 1:context:2]
    assert keys.min() >= 1
    assert keys.max() < half <= values.min()
    assert values.max() < size["vocab"]
    for row in range(size["batch"]):
        queries = task.input_ids[row][task.role[row] == "query"]
        assert len(set(keys[row])) == len(set(values[row])) == size["n_pairs"]
        assert sorted(queries) == sorted(keys[row])
        assert not (np.flatnonzero(task.role[row] == "query") % 2).any()
    assert set(np.unique(task.role[:, :context])) == {"key", "value"}
    assert set(np.unique(task.role[:, context:])) <= {"query", "filler"}
    silent = task.role != "query"
    assert (task.target[silent] == -1).all()
    assert (task.source_token[silent] == -1).all()
    assert ((task.input_ids == 0) == (task.role == "filler")).all()


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_seed_determines_the_task(size):
    first, again = mqar(**size), mqar(**size)
    for name in ("input_ids", "role", "target", "source_token"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.params["seed"] == size["seed"]


def test_seeds_differ():
    assert not np.array_equal(mqar(seed=0).input_ids, mqar(seed=1).input_ids)


def test_first_gap_follows_the_power_law():
    """The query of the first pair is the first draw, so its gap has exactly the law p(g) ~ (g + 1)^(a - 1)."""
    task = mqar(batch=40_000, length=32, n_pairs=2, vocab=8, seed=3, power_a=0.5)
    row, token = np.nonzero(task.source_token == 1)
    count = np.bincount((token - 4) // 2, minlength=14)
    law = np.arange(1, 15) ** -0.5
    law /= law.sum()
    chi_square = (((count - row.size * law) ** 2) / (row.size * law)).sum()
    assert chi_square < 42.6  # 13 degrees of freedom, p = 5e-5
    assert count.sum() == 40_000


def test_second_gap_is_drawn_without_replacement():
    """P(second = g) = sum_f p(f) p(g) / (1 - p(f)) over f != g: sequential draws, as numpy's choice makes them."""
    task = mqar(batch=40_000, length=12, n_pairs=2, vocab=8, seed=4)
    _, token = np.nonzero(task.source_token == 3)
    count = np.bincount((token - 4) // 2, minlength=4)
    p = np.arange(1, 5) ** -0.99
    p /= p.sum()
    law = np.array([sum(p[f] * p[g] / (1 - p[f]) for f in range(4) if f != g) for g in range(4)])
    assert (((count - 40_000 * law) ** 2) / (40_000 * law)).sum() < 22.6  # 3 degrees of freedom, p = 5e-5


def test_accuracy_counts_queries_only():
    task = mqar(batch=2, length=16, n_pairs=2, vocab=16)
    assert task.accuracy(task.target) == (4, 4)
    assert task.accuracy(np.zeros_like(task.target)) == (0, 4)
    wrong = task.target.copy()
    wrong[tuple(np.argwhere(task.target >= 0)[0])] += 1
    assert task.accuracy(wrong) == (3, 4)


def test_repr_names_sizes_and_seed():
    assert repr(mqar(batch=3, seed=7)) == "Task(mqar: batch=3, length=128, vocab=256, n_query=24, seed=7)"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 30}, r"length >= 2 \* \(n_pairs \+ n_keys\) \(got 30 < 32\)"),
        ({"length": 63}, r"length even \(got 63\)"),
        ({"vocab": 16}, r"vocab // 2 - 1 >= n_keys, which is n_pairs unless given \(got 7 < 8\)"),
        ({"vocab": 255}, r"vocab even \(got 255\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"n_pairs": 0}, r"n_pairs >= 1 \(got 0\)"),
        ({"power_a": 0.0}, r"power_a > 0 and finite \(got 0.0\)"),
        ({"filler": "noise"}, r"filler='noise' is unknown; known: zero, random"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        mqar(**changed)


def test_all_failing_inequalities_are_named():
    with pytest.raises(ValueError, match=r"length >= 2 .*; vocab even"):
        mqar(length=8, vocab=255)


def test_smallest_sizes_are_accepted():
    assert mqar(batch=1, length=4, n_pairs=1, vocab=4).n_query == 1
    assert mqar(batch=1, length=32, n_pairs=8, vocab=18).n_query == 8


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (np.zeros((2, 3), dtype=int), r"prediction: expected the shape of input_ids .* \(2, 16\), got \(2, 3\)"),
        (np.zeros((2, 16)), "prediction: expected token ids, got dtype float64"),
    ],
)
def test_accuracy_refuses(prediction, message):
    with pytest.raises(ValueError, match=message):
        mqar(batch=2, length=16, n_pairs=2, vocab=16).accuracy(prediction)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": np.zeros((1, 3), dtype=int)}, r"target: expected the shape of input_ids .*\(1, 4\), got \(1, 3\)"),
        ({"input_ids": np.full((1, 4), 4)}, r"input_ids: expected values in \[0, 4\), got \[4, 4\]"),
        ({"source_token": np.full((1, 4), 4)}, r"source_token: expected values in \[-1, 4\)"),
        ({"role": np.full((1, 4), "verb")}, "role: expected key, value, query, filler, kept, marker; got 'verb'"),
        ({"input_ids": np.zeros(4, dtype=int)}, r"input_ids: expected \(batch, token\), got shape \(4,\)"),
    ],
)
def test_task_refuses(changed, message):
    task = mqar(batch=1, length=4, n_pairs=1, vocab=4)
    arrays = {name: getattr(task, name) for name in ("input_ids", "role", "target", "source_token")}
    with pytest.raises(ValueError, match=message):
        Task(name="mine", vocab=4, **(arrays | changed))
