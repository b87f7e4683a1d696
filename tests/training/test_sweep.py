"""A sweep trains each rate as long as the trial, and goes on with the best, whose training is what it is alone."""

from dataclasses import replace

import pytest
import torch

from mamba_probe.training import sweep, train

RATES = (1e-6, 1e-2, 1e-1)


def test_the_best_is_gone_on_with_and_ends_as_it_would_alone(config, tmp_path):
    swept = sweep(config, tmp_path, learning_rates=RATES, trial=6)
    assert [len(curve) for curve in swept.trials.values()] == [2, 2, 2]
    assert {curve[-1].step for curve in swept.trials.values()} == {6}
    best = max(RATES, key=lambda rate: (swept.trials[rate][-1].accuracy, -swept.trials[rate][-1].loss))
    assert (swept.best, swept.finished) == (best, True)
    alone = train(replace(config, learning_rate=best))
    assert torch.equal(swept.result.model.lm_head.weight, alone.model.lm_head.weight)
    assert [point.loss for point in swept.result.curve] == [point.loss for point in alone.curve]


@pytest.mark.parametrize("order", [RATES, RATES[::-1]])
def test_a_rate_that_learns_beats_rates_that_do_not(config, tmp_path, order):
    """1e-6 moves nothing in these steps."""
    swept = sweep(replace(config, batch=16), tmp_path, learning_rates=order, trial=9)
    losses = {rate: curve[-1].loss for rate, curve in swept.trials.items()}
    assert losses[1e-2] < losses[1e-6]
    assert swept.best != 1e-6


@pytest.mark.parametrize("order", [(1e-7, 1e-5), (1e-5, 1e-7)])
def test_among_equal_accuracies_the_least_loss_wins(config, tmp_path, order):
    swept = sweep(config, tmp_path, learning_rates=order, trial=3)
    (one,), (other,) = (swept.trials[rate] for rate in order)
    assert one.accuracy == other.accuracy
    assert swept.trials[1e-5][-1].loss < swept.trials[1e-7][-1].loss
    assert swept.best == 1e-5


def test_a_diverged_rate_loses(config, tmp_path):
    easy = replace(config, clip=None, warmup=0)
    swept = sweep(easy, tmp_path, learning_rates=(1e30, 1e-3), trial=3)
    assert swept.best == 1e-3
    assert swept.trials[1e30][-1].loss == float("inf")


def test_out_of_time_it_is_resumed_where_it_was(config, tmp_path):
    first = sweep(config, tmp_path, learning_rates=(1e-3, 1e-2), trial=6, seconds=0.0)
    assert (first.best, first.result, first.finished) == (None, None, False)
    calls = 1
    while not (now := sweep(config, tmp_path, learning_rates=(1e-3, 1e-2), trial=6, seconds=0.0)).finished:
        calls += 1
        assert calls < 20
    whole = sweep(config, tmp_path / "whole", learning_rates=(1e-3, 1e-2), trial=6)
    assert now.best == whole.best
    assert torch.equal(now.result.model.lm_head.weight, whole.result.model.lm_head.weight)
    again = sweep(config, tmp_path, learning_rates=(1e-3, 1e-2), trial=6)
    assert again.trials == now.trials  # although the best has been trained further since


def test_a_quarter_of_the_steps_is_the_trial_unless_given(config, tmp_path):
    swept = sweep(replace(config, steps=15), tmp_path, learning_rates=(1e-2,))
    assert [point.step for point in swept.trials[1e-2]] == [3, 6]


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3)])
def test_refusals(config, tmp_path, rates):
    with pytest.raises(ValueError, match="at least one, each once"):
        sweep(config, tmp_path, learning_rates=rates)
    with pytest.raises(ValueError, match="until must be a multiple of every = 3"):
        sweep(config, tmp_path, learning_rates=(1e-3,), trial=4)
