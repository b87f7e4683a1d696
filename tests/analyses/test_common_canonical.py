"""The canonical form: one code path for both families, valid tokens only, wrong recordings refused by name."""

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses.common import Canonical, described, interval, refuse, resamples


def grouped(n_heads: int = 6, n_groups: int = 2, n_tokens: int = 5) -> xr.Dataset:
    generator = np.random.default_rng(0)
    step = ("layer", "batch", "token")
    selection = generator.standard_normal((1, 2, n_tokens, n_groups, 3)).astype("float32")
    return xr.Dataset(
        {
            "delta": ((*step, "head"), generator.uniform(0.1, 1, (1, 2, n_tokens, n_heads)).astype("float32")),
            "A": (("layer", "head"), -generator.uniform(0.1, 1, (1, n_heads)).astype("float32")),
            "B": ((*step, "group", "state"), selection),
            "C": ((*step, "group", "state"), selection + 1),
        },
        {
            "layer": [7],
            "batch": [0, 1],
            "head": np.arange(n_heads),
            "valid": (("batch", "token"), np.ones((2, n_tokens), bool)),
            "position": (("batch", "token"), np.tile(np.arange(n_tokens), (2, 1))),
        },
        {"schema_version": 1, "family": "mamba2", "discretization": "euler", "n_heads": n_heads, "n_groups": n_groups},
    )


def test_heads_read_their_group() -> None:
    assert Canonical(grouped(), "delta", "A", "B", "C").groups().tolist() == [0, 0, 0, 1, 1, 1]


def test_recorded_heads_keep_their_group_when_only_some_were_recorded() -> None:
    assert Canonical(grouped().isel(head=[2, 3]), "delta", "A").groups().tolist() == [0, 1]


def test_heads_that_do_not_divide_into_groups_are_refused() -> None:
    trace = grouped()
    trace.attrs["n_heads"] = 7
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        Canonical(trace, "delta", "A").groups()


def test_one_decay_a_head_gets_a_state_dimension_of_one() -> None:
    trace = grouped()
    decay = Canonical(trace, "delta", "A").decay(0)
    assert decay.shape == (6, 1)
    np.testing.assert_array_equal(decay[:, 0], trace["A"].values[0])


def test_a_row_holds_valid_tokens_only_in_float64() -> None:
    trace = grouped()
    trace["valid"][1, [0, 4]] = False
    trace["position"][1] = [-1, 0, 1, 2, -1]
    trace["delta"][0, 1, [0, 4]] = np.nan
    row = Canonical(trace, "delta", "A").row(0, 1)
    assert row.position.tolist() == [0, 1, 2]
    assert row.index(2) == 2
    assert row.cumulative.dtype == np.float64
    np.testing.assert_array_equal(row.cumulative, np.cumsum(trace["delta"].values[0, 1, 1:4].astype(float), axis=0))


def test_a_token_that_the_row_lacks_is_named() -> None:
    with pytest.raises(
        ValueError, match="token 9 is not among this row's valid tokens, which run from position 0 to 4"
    ):
        Canonical(grouped(), "delta", "A").row(0, 0).index(9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_name_layer_row_token_and_variable(bad: float) -> None:
    trace = grouped()
    trace["delta"][0, 1, 3, 2] = bad
    with pytest.raises(ValueError, match="`delta` is NaN or infinite in layer 7, row 1, at valid token 3"):
        Canonical(trace, "delta", "A").row(0, 1)


def test_a_negative_step_is_refused() -> None:
    trace = grouped()
    trace["delta"][0, 0, 1, 0] = -0.1
    with pytest.raises(ValueError, match="`delta` of layer 7 is negative in row 0"):
        Canonical(trace, "delta", "A").row(0, 0)


@pytest.mark.parametrize(("value", "text"), [(0.1, "at most 0"), (np.nan, "must be finite"), (1j, "complex")])
def test_a_decay_that_is_none_is_refused(value: complex, text: str) -> None:
    trace = grouped()
    trace["A"] = trace["A"].astype(type(value)) * 0 + value
    with pytest.raises(ValueError, match=text):
        Canonical(trace, "delta", "A").decay(0)


def test_a_row_of_padding_is_refused() -> None:
    trace = grouped()
    trace["valid"][1] = False
    with pytest.raises(ValueError, match="row 1 of `batch` has no valid token"):
        Canonical(trace, "delta", "A")


def test_positions_that_do_not_grow_are_refused() -> None:
    trace = grouped()
    trace["position"][0] = [0, 1, 1, 2, 3]
    with pytest.raises(ValueError, match="`position` must grow"):
        Canonical(trace, "delta", "A")


@pytest.mark.parametrize("name", ["delta", "valid", "position"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"lacks `{name}`"):
        Canonical(grouped().drop_vars(name), "delta", "A")


def test_gaps_take_the_stored_sum_or_are_refused() -> None:
    trace = grouped()
    stored = np.cumsum(trace["delta"].values.astype(float), axis=2)
    kept = trace.isel(token=[0, 2, 4])
    with pytest.raises(ValueError, match="not contiguous and the trace lacks `delta_cumsum`"):
        Canonical(kept, "delta", "A").row(0, 0)
    kept["delta_cumsum"] = (kept["delta"].dims, stored[:, :, [0, 2, 4]])
    row = Canonical(kept, "delta", "A").row(0, 0)
    assert not row.contiguous
    np.testing.assert_array_equal(row.cumulative, stored[0, 0, [0, 2, 4]])
    kept["delta_cumsum"] = -kept["delta_cumsum"]
    with pytest.raises(ValueError, match="`delta_cumsum` of layer 7 falls"):
        Canonical(kept, "delta", "A").row(0, 0)


def test_replicates_draw_every_row_count() -> None:
    draws = resamples(5, 300, seed=1)
    assert (draws.sum(axis=1) == 5).all()
    assert abs(draws.mean() - 1) < 1e-12
    assert draws.std() > 0.5


def test_the_interval_covers_the_mean_of_normal_rows() -> None:
    rows = np.random.default_rng(0).standard_normal(400)
    low, high = interval(lambda draws: draws @ rows / 400, 400, 500, seed=0)
    assert low < rows.mean() < high
    assert 0.15 < high - low < 0.25  # 2 * 1.96 / sqrt(400) = 0.196


def test_draws_that_are_alike_are_computed_once_and_counted_each() -> None:
    rows, asked = np.random.default_rng(0).standard_normal(3), []

    def mean(draws: np.ndarray) -> np.ndarray:
        asked.append(tuple(draws.tolist()))
        return draws @ rows / 3

    found = interval(mean, 3, 200, seed=2)
    every = [draws @ rows / 3 for draws in resamples(3, 200, seed=2)]
    np.testing.assert_array_equal(found, np.quantile(every, [0.025, 0.975], method="inverted_cdf"))
    assert len(asked) == len(set(asked)) == 10  # ways of drawing three of three rows


def test_one_row_has_no_interval() -> None:
    assert np.isnan(interval(lambda draws: draws * 1.0, 1, 10, seed=0)).all()


def test_infinite_replicates_are_ordered() -> None:
    low, high = interval(lambda draws: np.where(draws[0] > 0, np.inf, 3.0), 2, 200, seed=0)
    assert (low, high) == (3.0, np.inf)


def test_too_few_replicates_are_refused() -> None:
    with pytest.raises(ValueError, match="n_bootstrap must be at least 2; got 1"):
        interval(lambda draws: draws, 3, 1, seed=0)


def test_results_carry_names_and_units() -> None:
    result = described({"x": (("layer",), np.ones(2), "a length", "token")}, {"layer": [0, 1]}, {"null": "none"})
    assert result.x.attrs == {"long_name": "a length", "units": "token"}


def test_arguments_without_use_are_refused() -> None:
    refuse("some_analysis", weights=None)
    with pytest.raises(ValueError, match=r"some_analysis\.measure does not use baseline"):
        refuse("some_analysis", weights=None, baseline=1)


@pytest.mark.parametrize("name", ["delta", "A"])
def test_what_heads_and_states_are_is_asked_of_every_trace(name: str) -> None:
    with pytest.raises(ValueError, match=f"lacks `{name}`"):
        Canonical(grouped().drop_vars(name), "B")
