import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import keep_nth


@st.composite
def sizes(draw):
    marker = draw(st.booleans())
    length = draw(st.integers(3, 40))
    n = draw(st.integers(int(marker), length - 1))
    if marker:
        n = draw(st.sampled_from([n, None]))
    batch, n_tokens, seed = draw(st.integers(1, 6)), draw(st.integers(2, 30)), draw(st.integers(0, 2**32))
    return {"batch": batch, "length": length, "n": n, "n_tokens": n_tokens, "seed": seed, "marker": marker}


@settings(deadline=None, max_examples=80)
@given(sizes())
def test_the_last_position_asks_for_the_token_at_n(size):
    task = keep_nth(**size)
    assert task.n_query == size["batch"]
    assert task.vocab == size["n_tokens"] + size["marker"]
    assert (task.answers.start, task.answers.stop) == (0, size["n_tokens"])
    for ids, role, target, source in zip(task.input_ids, task.role, task.target, task.source_token, strict=True):
        n, last = size["n"], size["length"] - 1
        if size["marker"]:
            (at,) = np.flatnonzero(ids == size["n_tokens"])
            assert role[at] == "marker"
            n = at + 1 if n is None else n
            assert n == at + 1
        assert (source[last], target[last]) == (n, ids[n])
        assert target[last] < size["n_tokens"]
        assert role[n] == ("query" if n == last else "kept")
        assert role[last] == "query"
        assert (target[:last] == -1).all()
        assert (source[:last] == -1).all()
        assert (role == "filler").sum() == size["length"] - len({n, last}) - size["marker"]


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_params_give_the_task_again(size):
    task = keep_nth(**size)
    again = keep_nth(**task.params)
    for name in ("input_ids", "role", "target", "source_token"):
        assert np.array_equal(getattr(task, name), getattr(again, name))


def test_tokens_are_uniform_and_seeds_differ():
    task = keep_nth(batch=500, length=64, n=3, n_tokens=8)
    count = np.bincount(task.input_ids.ravel(), minlength=8)
    assert ((count - 4000) ** 2 / 4000).sum() < 33.0  # 7 degrees of freedom, p = 3e-5
    assert not np.array_equal(task.input_ids, keep_nth(batch=500, length=64, n=3, n_tokens=8, seed=1).input_ids)


def test_drawn_places_cover_every_index_that_can_be():
    task = keep_nth(batch=500, length=8, n=None, marker=True)
    assert set(task.source_token[:, -1]) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 128}, r"0 <= n <= length - 1 \(got n=128, length=128\)"),
        ({"n": -1}, r"0 <= n <= length - 1 \(got n=-1, length=128\)"),
        ({"n": 0, "marker": True}, r"1 <= n <= length - 1 \(got n=0, length=128\)"),
        ({"n": None}, r"n=None draws n a row, which nothing in the tokens says; give n, or marker=True"),
        ({"n": None, "marker": True, "length": 2}, r"length >= 3 \(got 2\)"),
        ({"n": 1.5}, r"sizes and seed are integers; got n=1.5"),
        ({"n_tokens": 1}, r"n_tokens >= 2 \(got 1\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"marker": 2}, r"marker is True or False; got 2"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        keep_nth(**changed)


def test_smallest_sizes_are_accepted():
    assert keep_nth(batch=1, length=1, n=0, n_tokens=2).source_token.tolist() == [[0]]
    assert keep_nth(batch=1, length=2, n=1, n_tokens=2, marker=True).role.tolist() == [["marker", "query"]]
