"""Paired changes of many units: means, sign flips and their step-down, and the correlation with what units read."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mamba_probe.analyses.ablation.core import correlation, unit_entropy
from mamba_probe.analyses.common.paired import by_row, paired, signs


def by_enumeration(change):
    """Step-down p-values by all sign flips, one unit at a time."""
    n_rows, n_units = change.shape
    flips = [np.array(flip) for flip in itertools.product([1.0, -1.0], repeat=n_rows)]
    mean = np.abs(change.mean(axis=0))
    order, found, highest = np.argsort(-mean), np.zeros(n_units), 0.0
    for place, unit in enumerate(order):
        rest = order[place:]
        reached = sum(
            np.abs((flip[:, None] * change[:, rest]).mean(axis=0)).max() >= mean[unit] - 1e-12 for flip in flips
        )
        highest = found[unit] = max(highest, reached / len(flips))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_p_values_are_those_of_every_sign_flip(seed):
    change = np.random.default_rng(seed).normal([1.5, 0.6, 0, 0, -0.8], 1.0, (7, 5))
    np.testing.assert_allclose(paired(change, 20, seed=0)["_p"], by_enumeration(change), atol=1e-12)


def test_one_unit_is_a_sign_flip_test():
    change = np.random.default_rng(9).standard_normal((8, 1)) + 0.7
    oracle = stats.permutation_test((change[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert paired(change, 20, seed=0)["_p"].item() == pytest.approx(oracle.pvalue, abs=1e-12)


def test_by_chance_one_in_twenty_has_any_unit():
    found = sum(
        bool((paired(np.random.default_rng(seed).standard_normal((12, 6)), 2, seed)["_p"] <= 0.05).any())
        for seed in range(200)
    )
    assert 2 <= found <= 20, "binomial(200, 0.05) lies within 2 .. 20 but for 0.2 %"


def test_a_large_unit_does_not_hide_a_small_one():
    change = np.random.default_rng(0).standard_normal((12, 2)) * 0.01 + [5.0, 0.1]
    assert (paired(change, 20, seed=0)["_p"] < 0.01).all()


def test_intervals_are_percentiles_over_rows_and_rows_without_a_number_are_left_out():
    change = np.arange(12.0).reshape(6, 2)
    gap = np.concatenate([change, np.full((2, 2), np.nan)])
    whole, less = paired(change, 100, seed=3), paired(gap, 100, seed=3)
    for key in whole:
        np.testing.assert_array_equal(whole[key], less[key])
    assert whole[""].tolist() == [5.0, 6.0]
    assert (whole["_low"] < 5).all()
    assert (whole["_high"] > 5).all()


def test_one_row_has_a_mean_alone():
    found = paired(np.array([[1.0, 2.0]]), 20, seed=0)
    assert found[""].tolist() == [1.0, 2.0]
    assert np.isnan([found["_low"], found["_high"], found["_p"]]).all()


def test_signs_are_all_or_random():
    few = signs(5, seed=0)
    assert len({tuple(flip) for flip in few.tolist()}) == 31
    assert [1.0] * 5 not in few.tolist()
    assert signs(20, seed=0).shape == (999, 20)


def test_rows_are_means_of_scored_tokens():
    values = np.array([[[1.0, np.nan, 2.0]], [[np.nan, np.nan, np.nan]]])
    np.testing.assert_array_equal(by_row(values), [[1.5], [np.nan]])


def test_correlation_is_scipys():
    rng = np.random.default_rng(1)
    harm, entropy = rng.standard_normal((6, 9)), rng.standard_normal((6, 9))
    harm[:, 3] = harm[:, 4]
    found = correlation(harm, entropy, 50, seed=0)
    assert found[""] == pytest.approx(stats.spearmanr(harm.mean(axis=0), entropy.mean(axis=0)).statistic, abs=1e-12)
    assert found["_low"] <= found[""] <= found["_high"]
    assert found["_null_low"] < -0.3
    assert found["_null_high"] > 0.3


def test_no_correlation_of_few_units_or_of_equal_ones():
    rng = np.random.default_rng(2)
    assert np.isnan(correlation(rng.standard_normal((4, 3)), rng.standard_normal((4, 3)), 10, 0)[""])
    assert np.isnan(correlation(np.zeros((4, 6)), rng.standard_normal((4, 6)), 10, 0)[""])


def test_entropy_of_a_unit_is_the_mean_of_its_heads_that_read():
    entropy = np.array([[[1.0, 3.0, np.nan], [np.nan, np.nan, np.nan]]])
    found = unit_entropy(entropy, [(0, 0, 3), (0, 1, 1), None])
    np.testing.assert_array_equal(found, [[2.0, 3.0, np.nan], [np.nan, np.nan, np.nan]])
