"""No row of an evaluation is ever trained on, whatever the seeds; data are a function of seed and step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_probe.training import SPLITS, held_out, rows, seed_of, train, trainer

SEEDS, INDICES = st.integers(0, 2**20 - 1), st.integers(0, 2**32 - 1)


@given(SEEDS, INDICES, SEEDS, INDICES)
def test_a_seed_belongs_to_one_split_one_training_and_one_step(seed, index, other_seed, other_index):
    for split in SPLITS:
        for other in SPLITS:
            equal = seed_of(split, seed, index) == seed_of(other, other_seed, other_index)
            assert equal == ((split, seed, index) == (other, other_seed, other_index))


def test_the_splits_are_disjoint_by_their_residues():
    for split, residue in zip(SPLITS, range(3), strict=True):
        assert {seed_of(split, seed, index) % 4 for seed in (0, 1, 77) for index in (0, 1, 2**31)} == {residue}


def test_what_a_training_and_its_evaluations_draw(config, monkeypatch):
    """The seeds as drawn, not as promised."""
    drawn = {"training": set(), "held out": set()}
    draw, now = type(config).draw, ["training"]

    def spy(self, batch, seed, step=None):
        drawn[now[0]].add(seed)
        return draw(self, batch, seed, step)

    answered = trainer.answered

    def evaluating(*args, **kwargs):
        now[0] = "held out"
        result = answered(*args, **kwargs)
        now[0] = "training"
        return result

    started = trainer._steps

    def stepping(*args):
        drawn["training"] -= {0}  # of finding the vocabulary, where no row is learned from
        return started(*args)

    monkeypatch.setattr(type(config), "draw", spy)
    monkeypatch.setattr(trainer, "answered", evaluating)
    monkeypatch.setattr(trainer, "_steps", stepping)
    result = train(config)
    assert drawn["training"] == {seed_of("training", 5, step) for step in range(12)}
    evaluating(result.model, config, "test")
    assert drawn["held out"] == {seed_of(split, 5, index) for split in SPLITS[1:] for index in range(2)}
    assert not drawn["training"] & drawn["held out"]


def test_rows_are_new_each_step_and_the_same_each_time(config):
    first, again, later = rows(config, 0)[0], rows(config, 0)[0], rows(config, 1)[0]
    assert first.equal(again)
    assert not first.equal(later)
    assert not first.equal(rows(replace(config, seed=6), 0)[0])


def test_a_fixed_set_is_gone_through_over_and_over_when_asked(config):
    fixed = replace(config, fixed_batches=2)
    assert rows(fixed, 0)[0].equal(rows(fixed, 2)[0])
    assert not rows(fixed, 0)[0].equal(rows(fixed, 1)[0])
    assert not (rows(fixed, 0)[0].numpy() == held_out(fixed, "validation", 0).input_ids).all()


def test_a_mixture_is_trained_in_turn_and_never_evaluated(config):
    mixed = replace(config, mixture=({"length": 8}, {"length": 16}, {}))
    assert [rows(mixed, step)[0].shape[1] for step in range(6)] == [8, 16, 12, 8, 16, 12]
    assert held_out(mixed, "validation", 0).input_ids.shape == (4, 12)
    assert rows(mixed, 2)[0].equal(rows(config, 2)[0])
    assert train(mixed).last.total == 2 * 4 * 2


def test_refusals(config):
    with pytest.raises(ValueError, match=r"unknown split 'valid'.*validation"):
        seed_of("valid", 0, 0)
    with pytest.raises(ValueError, match=r"index of a batch must be in 0 .. 4294967295; got -1"):
        seed_of("test", 0, -1)
    with pytest.raises(ValueError, match='held-out rows are of split "validation" or "test"'):
        held_out(config, "training", 0)
