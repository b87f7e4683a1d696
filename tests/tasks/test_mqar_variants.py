"""Random filler and repeated keys, beside the plain task of test_mqar."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import mqar


@st.composite
def sizes(draw):
    n_pairs = draw(st.integers(1, 12))
    n_keys = draw(st.integers(1, n_pairs))
    length = 2 * draw(st.integers(n_pairs + n_keys, n_pairs + n_keys + 20))
    vocab = 2 * draw(st.integers(n_pairs + 1, n_pairs + 30))
    batch, seed, filler = (
        draw(st.integers(1, 6)),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from(["zero", "random"])),
    )
    return {
        "batch": batch, "length": length, "n_pairs": n_pairs, "n_keys": n_keys, "vocab": vocab, "seed": seed,
        "filler": filler,
    }  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(sizes())
def test_target_is_the_last_value_of_the_key(size):
    task, n_pairs, n_keys = mqar(**size), size["n_pairs"], size["n_keys"]
    assert task.n_query == size["batch"] * n_keys
    for ids, role, target, source in zip(task.input_ids, task.role, task.target, task.source_token, strict=True):
        pairs = [(ids[2 * i], ids[2 * i + 1]) for i in range(n_pairs)]
        assert len({value for _, value in pairs}) == n_pairs
        assert len({key for key, _ in pairs}) == n_keys
        queries = np.flatnonzero(role == "query")
        assert {ids[at] for at in queries} == {key for key, _ in pairs}
        for at in queries:
            last = max(i for i, (key, _) in enumerate(pairs) if key == ids[at])
            assert (target[at], source[at]) == (pairs[last][1], 2 * last + 1)
        assert (target[role != "query"] == -1).all()
        assert (source[role != "query"] == -1).all()
        assert role[: 2 * n_pairs].tolist() == ["key", "value"] * n_pairs


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_params_give_the_task_again(size):
    task = mqar(**size)
    again = mqar(**task.params)
    for name in ("input_ids", "role", "target", "source_token"):
        assert np.array_equal(getattr(task, name), getattr(again, name))


@pytest.mark.parametrize("n_keys", [8, 3])
def test_random_filler_changes_filler_only(n_keys):
    zero, random = (mqar(batch=16, n_keys=n_keys, seed=5, filler=filler) for filler in ("zero", "random"))
    said = zero.role != "filler"
    assert np.array_equal(zero.input_ids[said], random.input_ids[said])
    for name in ("role", "target", "source_token"):
        assert np.array_equal(getattr(zero, name), getattr(random, name))
    assert not zero.input_ids[~said].any()


def test_random_filler_is_uniform_over_the_whole_vocabulary():
    task = mqar(batch=2000, length=64, n_pairs=2, vocab=20, filler="random", seed=1)
    filler = task.input_ids[task.role == "filler"]
    count = np.bincount(filler, minlength=20)
    assert ((count - filler.size / 20) ** 2 / (filler.size / 20)).sum() < 54.0  # 19 degrees of freedom, p = 3e-5


def test_repeats_fall_on_any_places():
    """Three pairs, two keys: one key is repeated, and the law of which two places share it is uniform."""
    task = mqar(batch=9000, length=12, n_pairs=3, vocab=12, n_keys=2, seed=2)
    first, second, third = task.input_ids[:, 0:6:2].T
    count = np.array([(first == second).sum(), (first == third).sum(), (second == third).sum()])
    assert count.sum() == 9000
    assert ((count - 3000) ** 2 / 3000).sum() < 20.0  # 2 degrees of freedom, p = 5e-5


def test_as_many_keys_as_pairs_is_the_plain_task():
    assert np.array_equal(mqar(seed=4).input_ids, mqar(seed=4, n_keys=8).input_ids)


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        ({}, "532dbff164af308f"),
        ({"batch": 64, "length": 64, "n_pairs": 4, "vocab": 128}, "9fe548e3fbd9cbb1"),
        ({"batch": 3, "length": 48, "n_pairs": 5, "vocab": 40, "seed": 11, "power_a": 0.5}, "1f698a7781bb9e97"),
    ],
)
def test_the_plain_task_is_as_stored(size, digest):
    """The card of the shipped model counts answers on seeded tasks: what a seed gives must never change."""
    task, found = mqar(**size), hashlib.sha256()
    for array in (task.input_ids, task.target, task.source_token):
        found.update(np.ascontiguousarray(array).astype("<i8").tobytes())
    assert found.hexdigest()[:16] == digest


def test_stored_token_ids():
    row = mqar().input_ids[0]
    assert row[:16].tolist() == [12, 227, 4, 199, 85, 188, 89, 219, 110, 130, 3, 180, 21, 177, 93, 211]
    assert row[16:26].tolist() == [89, 0, 3, 0, 0, 0, 85, 0, 12, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_keys": 9}, r"1 <= n_keys <= n_pairs \(got 9, 8\)"),
        ({"n_keys": 0}, r"1 <= n_keys <= n_pairs \(got 0, 8\)"),
        ({"n_keys": 2, "length": 18}, r"length >= 2 \* \(n_pairs \+ n_keys\) \(got 18 < 20\)"),
        ({"n_keys": 2, "vocab": 14}, r"vocab // 2 >= n_pairs \(got 7 < 8\)"),
        ({"n_keys": 2.0}, r"sizes and seed are integers; got n_keys=2.0"),
        ({"seed": None}, r"sizes and seed are integers; got seed=None"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        mqar(**changed)
