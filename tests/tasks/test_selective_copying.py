import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import selective_copying


@st.composite
def sizes(draw):
    n_tokens = draw(st.integers(1, 10))
    length = draw(st.integers(2 * n_tokens, 2 * n_tokens + 30))
    batch, vocab, seed = draw(st.integers(1, 6)), draw(st.integers(4, 20)), draw(st.integers(0, 2**32))
    return {"batch": batch, "length": length, "n_tokens": n_tokens, "vocab": vocab, "seed": seed}


@settings(deadline=None, max_examples=80)
@given(sizes())
def test_markers_ask_for_the_data_in_order(size):
    task, marker, start = selective_copying(**size), size["vocab"] - 1, size["length"] - size["n_tokens"]
    assert task.n_query == size["batch"] * size["n_tokens"]
    for ids, role, target, source in zip(task.input_ids, task.role, task.target, task.source_token, strict=True):
        data = [(t, int(token)) for t, token in enumerate(ids) if token not in (0, marker)]
        assert [(int(s), int(a)) for s, a in zip(source[start:], target[start:], strict=True)] == data
        assert ids[start:].tolist() == [marker] * size["n_tokens"]
        assert marker not in ids[:start]
        assert role.tolist() == [
            "query" if t >= start else "kept" if ids[t] else "filler" for t in range(size["length"])
        ]
        assert all(answer in task.answers for _, answer in data)
        assert (target[:start] == -1).all()
        assert (source[:start] == -1).all()
    assert (task.answers.start, task.answers.stop) == (1, marker)


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_params_give_the_task_again(size):
    task = selective_copying(**size)
    again = selective_copying(**task.params)
    for name in ("input_ids", "role", "target", "source_token"):
        assert np.array_equal(getattr(task, name), getattr(again, name))


def test_places_and_data_are_uniform():
    task = selective_copying(batch=6000, length=6, n_tokens=2, vocab=8, seed=1)
    sets, count = np.unique(task.source_token[:, -2:], axis=0, return_counts=True)
    assert len(sets) == 6
    assert ((count - 1000) ** 2 / 1000).sum() < 28.0  # 5 degrees of freedom, p = 4e-5
    data = np.bincount(task.target[:, -2:].ravel(), minlength=7)[1:]
    assert ((data - 2000) ** 2 / 2000).sum() < 28.0
    assert not np.array_equal(selective_copying(seed=0).input_ids, selective_copying(seed=1).input_ids)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 15}, r"length >= 2 \* n_tokens \(got 15 < 16\)"),
        ({"n_tokens": 0}, r"n_tokens >= 1 \(got 0\)"),
        ({"vocab": 3}, r"vocab >= 4, noise, marker and two data tokens \(got 3\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"vocab": 16.0}, r"sizes and seed are integers; got vocab=16.0"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        selective_copying(**changed)
