import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import induction, induction_every_token


@st.composite
def sizes(draw):
    occurrences = draw(st.integers(1, 8))
    length = draw(st.integers(2 * occurrences + 1, 2 * occurrences + 30))
    vocab = draw(st.integers(3, 20))
    batch, seed, special = draw(st.integers(1, 6)), draw(st.integers(0, 2**32)), draw(st.sampled_from([0, vocab - 1]))
    return {
        "batch": batch, "length": length, "vocab": vocab, "occurrences": occurrences, "seed": seed, "special": special,
    }  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(sizes())
def test_answer_follows_the_last_earlier_special_token(size):
    task, last, special = induction(**size), size["length"] - 1, size["special"]
    assert task.n_query == size["batch"]
    assert special not in task.answers
    assert len(task.answers) == size["vocab"] - 1
    for ids, role, target, source in zip(task.input_ids, task.role, task.target, task.source_token, strict=True):
        before = [t for t in range(last) if ids[t] == special]
        assert len(before) == size["occurrences"]
        assert ids[last] == special
        assert (source[last], target[last]) == (before[-1] + 1, ids[before[-1] + 1])
        assert target[last] in task.answers
        expected = ["filler"] * last + ["query"]
        for t in before:
            expected[t : t + 2] = ["key", "value"]
        assert role.tolist() == expected
        assert (target[:last] == -1).all()
        assert (source[:last] == -1).all()


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_params_give_the_task_again(size):
    task = induction(**size)
    again = induction(**task.params)
    for name in ("input_ids", "role", "target", "source_token"):
        assert np.array_equal(getattr(task, name), getattr(again, name))


def test_places_are_every_set_without_neighbours_equally_often():
    """Two of five places, none adjacent: {0,2} {0,3} {0,4} {1,3} {1,4} {2,4}."""
    task = induction(batch=6000, length=7, occurrences=2, seed=3)
    _, place = np.nonzero(task.role == "key")
    sets, count = np.unique(place.reshape(-1, 2), axis=0, return_counts=True)
    assert sets.tolist() == [[0, 2], [0, 3], [0, 4], [1, 3], [1, 4], [2, 4]]
    assert ((count - 1000) ** 2 / 1000).sum() < 28.0  # 5 degrees of freedom, p = 4e-5


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(2, 12), st.integers(0, 2**32))
def test_every_token_asks_what_followed_it(batch, length, vocab, seed):
    task = induction_every_token(batch, length, vocab, seed)
    for ids, role, target, source in zip(task.input_ids, task.role, task.target, task.source_token, strict=True):
        for t in range(length):
            before = [s for s in range(t) if ids[s] == ids[t]]
            expected = ("query", ids[before[-1] + 1], before[-1] + 1) if before else ("filler", -1, -1)
            assert (role[t], target[t], source[t]) == expected
    again = induction_every_token(**task.params)
    assert np.array_equal(task.input_ids, again.input_ids)


def test_every_token_is_uniform():
    count = np.bincount(induction_every_token(batch=500, length=64, vocab=8).input_ids.ravel(), minlength=8)
    assert ((count - 4000) ** 2 / 4000).sum() < 33.0  # 7 degrees of freedom, p = 3e-5


def test_seeds_differ():
    for task in (induction, induction_every_token):
        assert not np.array_equal(task(seed=0).input_ids, task(seed=1).input_ids)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 8, "occurrences": 4}, r"length >= 2 \* occurrences \+ 1 \(got 8 < 9\)"),
        ({"occurrences": 0}, r"occurrences >= 1 \(got 0\)"),
        ({"vocab": 2}, r"vocab >= 3 \(got 2\)"),
        ({"special": 3}, r"special == 0 or special == vocab - 1, so that the answers are a range \(got 3\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"length": "long"}, r"sizes and seed are integers; got length='long'"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        induction(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 1}, r"length >= 2 \(got 1\)"),
        ({"vocab": 1}, r"vocab >= 2 \(got 1\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"seed": 0.5}, r"sizes and seed are integers; got seed=0.5"),
    ],
)
def test_every_token_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        induction_every_token(**changed)
