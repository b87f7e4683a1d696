"""The comparison's statistics: scipy as oracle, theorems of the swap test, coverage, the paired interval's width."""

import numpy as np
import pytest
from scipy import stats

from mamba_probe.analyses.comparison import core
from mamba_probe.analyses.comparison.estimate import Resampling, each, refit


def compared(ours: np.ndarray, reference: np.ndarray, **how: object):
    """Both (row, cell), through the estimator, with one row at a time."""
    rows = {"reference": reference, "ours": ours}
    chosen = Resampling(**({"statistic": "mean", "paired": True, "n_bootstrap": 250, "seed": 0} | how))
    lengths = {label: len(values) for label, values in rows.items()}
    return each(lambda label, row: rows[label][row[0]], lengths, "reference", chosen)


def pairs(n_rows: int, n_cells: int, rho: float, difference: float = 0.0, seed: int = 0):
    draw = np.random.default_rng(seed)
    shared, own, other = draw.normal(size=(3, n_rows, n_cells))
    a, b = (np.sqrt(rho) * shared + np.sqrt(1 - rho) * noise for noise in (own, other))
    return a + difference, b


@pytest.mark.parametrize("statistic", core.STATISTICS)
@pytest.mark.parametrize("n_rows", [5, 8])
def test_the_swap_test_is_scipys_permutation_of_samples(statistic, n_rows):
    a, b = pairs(n_rows, 3, 0.5, 0.4, seed=n_rows)
    found = core.swapped(a, b, statistic, 0)

    def distance(x, y, axis):
        where = np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0)
        x, y = (one.mean(0) if statistic == "mean" else np.sort(one, 0)[(len(one) - 1) // 2] for one in where)
        return np.abs(x - y)

    for cell in range(3):
        oracle = stats.permutation_test(
            (a[:, cell], b[:, cell]), distance, permutation_type="samples", vectorized=True, alternative="greater",
            n_resamples=np.inf,
        )  # fmt: skip
        assert found[cell] == pytest.approx(oracle.pvalue, abs=1e-12)


def test_drawn_swaps_agree_with_scipys_within_their_own_error():
    a, b = pairs(30, 1, 0.5, 0.4)
    found = core.swapped(a, b, "mean", 0)[0]
    oracle = stats.permutation_test(
        (a[:, 0], b[:, 0]), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert 0.001 < oracle < 0.2
    assert abs(found - oracle) < 5 * np.sqrt(oracle / core.PERMUTATIONS)


def test_the_p_values_of_all_swaps_of_a_sample_are_those_of_a_uniform_law():
    """Under the null each swap is as likely; over all of them P(p <= alpha) = alpha at every attainable alpha."""
    n = 7
    size = np.random.default_rng(0).random((n, 1)) + 0.1
    sign = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) % 2)
    found = core.swapped(size * sign.T, np.zeros((n, 2**n)), "mean", 0)
    assert np.allclose(np.sort(found), np.repeat(np.arange(2, 2**n + 1, 2), 2) / 2**n)


def test_p_is_uniform_on_simulated_rows_without_a_difference():
    assert stats.kstest(core.swapped(*pairs(10, 500, 0.6, seed=3), "mean", 0), "uniform").pvalue > 0.01
    a, b = pairs(10, 200, 0.0, seed=3)
    assert stats.kstest(core.permuted(a[:7], 3 * b, "mean", 0), "uniform").pvalue > 0.01


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    "statistic", ["mean", *(pytest.param(each, marks=pytest.mark.long) for each in core.STATISTICS if each != "mean")]
)
def test_the_interval_covers_a_known_difference(statistic, paired):
    a, b = pairs(60, 200, 0.6 if paired else 0.0, difference=0.7, seed=5)
    found = compared(a, b, statistic=statistic, paired=paired).differences
    covered = ((found.low <= 0.7) & (found.high >= 0.7)).mean()
    assert 0.90 <= covered <= 0.99


def test_the_paired_interval_is_narrower_by_the_correlation():
    """Var(a - b) = 2 sigma^2 (1 - rho), against 2 sigma^2 of independent rows."""
    rho = 0.8
    a, b = pairs(200, 60, rho, seed=7)
    widths = [
        np.mean(found.high - found.low) for found in (compared(a, b, paired=p).differences for p in (True, False))
    ]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(1 - rho), rel=0.05)
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(2 * (1 - rho) / 200), rel=0.05)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_is_scipys_percentile_bootstrap(paired):
    a, b = pairs(25, 1, 0.5, 0.3, seed=9)
    found = compared(a, b, paired=paired, n_bootstrap=4000).differences
    oracle = stats.bootstrap(
        (a[:, 0], b[:, 0]), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=paired, vectorized=True,
        method="percentile", n_resamples=4000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = oracle.high - oracle.low
    assert abs(found.low.item() - oracle.low) < 0.05 * width
    assert abs(found.high.item() - oracle.high) < 0.05 * width


def test_welchs_t_of_parted_rows_is_scipys():
    a, b = pairs(4, 2, 0.0, 1.0, seed=11)
    b = 3 * b[:3]
    found = core.permuted(a, b, "mean", 0)
    for cell in range(2):
        oracle = stats.permutation_test(
            (a[:, cell], b[:, cell]), lambda x, y, axis: np.abs(stats.ttest_ind(x, y, equal_var=False, axis=axis)[0]),
            vectorized=True, alternative="greater", n_resamples=np.inf,
        )  # fmt: skip
        assert found[cell] == pytest.approx(oracle.pvalue, abs=1e-12)


def test_parted_rows_that_are_constant_have_the_least_and_the_greatest_p():
    one, zero = np.ones((4, 1)), np.zeros((4, 1))
    assert core.permuted(one, zero, "mean", 0)[0] == 2 / 70
    assert core.permuted(one, one, "mean", 0)[0] == 1.0


def test_holm_keeps_the_family_error_and_is_by_hand():
    p = np.array([[0.04, 0.01], [np.nan, 0.03]])
    assert np.allclose(core.holm(p), [[0.06, 0.03], [np.nan, 0.06]], equal_nan=True)
    null = np.random.default_rng(0).random((2000, 10))
    assert (np.array([core.holm(row).min() for row in null]) <= 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_a_row_that_is_nan_in_either_leaves_the_pair_and_is_counted():
    a, b = pairs(9, 2, 0.5, 1.0)
    a[2, 0] = b[5, 0] = np.nan
    found = compared(a, b)
    kept = [0, 1, 3, 4, 6, 7, 8]
    assert found.n_rows.tolist() == [[7.0, 9.0]]
    assert found.differences.value[0, 0] == pytest.approx((a[kept, 0] - b[kept, 0]).mean())
    assert found.values.value[1, 0] == pytest.approx(np.nanmean(a[:, 0]))
    alone = compared(a[kept, :1], b[kept, :1])
    for name in ("value", "low", "high"):
        assert getattr(found.differences, name)[0, 0] == getattr(alone.differences, name)[0, 0]
    assert found.p[0, 0] == alone.p[0, 0]


def test_infinite_rows_make_a_mean_difference_nan_and_are_ordered_by_medians():
    a, b = np.arange(9.0)[:, None] + 5, np.arange(9.0)[:, None]
    a[6:] = np.inf
    mean, median = compared(a, b), compared(a, b, statistic="median")
    assert np.isnan(mean.differences.value).all()
    assert np.isnan(mean.p).all()
    assert mean.values.value.tolist() == [[4.0], [np.inf]]
    assert mean.n_infinite.tolist() == median.n_infinite.tolist() == [[3.0]]
    assert median.differences.value.tolist() == [[5.0]]
    assert 0 < median.p[0, 0] < 0.1
    assert median.differences.low[0, 0] > 0
    assert median.differences.high[0, 0] == np.inf


def test_rows_without_a_number_have_no_difference():
    a, b = pairs(4, 2, 0.0)
    a[:, 1] = np.nan
    found = compared(a, b)
    assert found.n_rows.tolist() == [[4.0, 0.0]]
    assert np.isnan(found.p[0, 1])
    assert not np.isnan(found.p[0, 0])


def test_a_single_row_has_a_difference_and_no_interval():
    found = compared(np.array([[2.0]]), np.array([[0.5]]))
    assert found.differences.value.item() == 1.5
    assert found.p.item() == 1.0
    assert np.isnan(found.differences.low).all()
    assert np.isnan(found.values.high).all()


def test_pooled_p_of_a_mean_is_that_of_its_rows():
    a, b = pairs(7, 3, 0.5, 0.6)
    rows = {"reference": b, "ours": a}

    def mean(label, drawn):
        return rows[label][slice(None) if drawn is None else drawn].mean(axis=0)

    for paired in (True, False):
        how = Resampling("mean", paired, 20, 0)
        found = refit(mean, {"reference": 7, "ours": 7}, "reference", how)
        np.testing.assert_allclose(found.p[0], compared(a, b, paired=paired).p[0], atol=1e-12)


def test_pooled_p_of_a_curved_measure_keeps_its_level_on_few_rows():
    """Log of a variance, which a percentile bootstrap of 5 rows would find to differ in every fifth pair of samples."""
    rows = np.random.default_rng(0).normal(size=(2, 400, 5))
    p = []
    for ours, reference in zip(*rows, strict=True):
        both = {"reference": reference, "ours": ours}

        def spread(label, drawn, both=both):
            return np.array([np.log(both[label][slice(None) if drawn is None else drawn].var() + 1e-12)])

        how = Resampling("mean", True, 2, 0)
        p.append(refit(spread, {"reference": 5, "ours": 5}, "reference", how).p.item())
    assert min(p) == 2 / 2**5
    assert np.mean(np.array(p) <= 2 / 2**5) <= 0.0625 + 3 * np.sqrt(0.0625 / 400)


def test_one_row_pooled_tells_nothing_of_a_difference():
    both = {"reference": np.array([1.0]), "ours": np.array([2.0])}
    how = Resampling("mean", True, 20, 0)
    found = refit(lambda label, _: both[label], {"reference": 1, "ours": 1}, "reference", how)
    assert found.differences.value.item() == 1.0
    for unknown in (found.p, found.differences.low, found.differences.high, found.values.low):
        assert np.isnan(unknown).all()


@pytest.mark.parametrize(("n", "paired"), [(4, True), (4, False), (20, True), (20, False)])
def test_the_least_p_is_that_of_rows_as_far_apart_as_can_be(n, paired):
    ours, reference = np.arange(n, dtype=float)[:, None] + 1e6, np.arange(n, dtype=float)[:, None]
    test = core.swapped if paired else core.permuted
    assert test(ours, reference, "mean", 0)[0] >= core.least(n, paired) > 0
    if paired:
        assert test(ours, reference, "mean", 0)[0] == pytest.approx(core.least(n, paired))
