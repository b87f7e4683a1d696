"""Memory horizons: planted ones are recovered, censored ones are never averaged, nulls are what theory says."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.memory_horizon import core
from mamba_probe.analyses.memory_horizon.path import Path


def make_trace(delta: np.ndarray, A: np.ndarray, valid: np.ndarray | None = None, head: str = "channel") -> xr.Dataset:
    """A trace of delta (layer, batch, token, head) and A (layer, head[, state])."""
    valid = np.ones(delta.shape[1:3], bool) if valid is None else valid
    filled = np.where(valid[None, :, :, None], delta, np.nan).astype("float32")
    dims = ("layer", head, "state")[: np.ndim(A)]
    return xr.Dataset(
        {"delta": (("layer", "batch", "token", head), filled), "A": (dims, np.asarray(A, "float32"))},
        {
            "layer": np.arange(delta.shape[0]),
            "batch": np.arange(delta.shape[1]),
            head: np.arange(delta.shape[3]),
            "valid": (("batch", "token"), valid),
            "position": (("batch", "token"), np.where(valid, np.cumsum(valid, axis=1) - 1, -1)),
        },
        {"schema_version": 1, "family": "mamba" if head == "channel" else "mamba2", "discretization": "euler"},
    )


def random_trace(n_rows: int = 3, n_tokens: int = 40, head: str = "channel", seed: int = 0) -> xr.Dataset:
    generator = np.random.default_rng(seed)
    delta = np.exp(generator.normal(-1.5, 1.0, (2, n_rows, n_tokens, 3)))
    shape = (2, 3, 4) if head == "channel" else (2, 3)
    return make_trace(delta, -np.exp(generator.normal(0, 1, shape)), head=head)


def brute(delta: np.ndarray, rate: float, threshold: float, direction: str) -> list[float]:
    """Horizon of every token by multiplying out the decay, one token at a time."""
    found = []
    for s in range(len(delta)):
        passed = delta[s + 1 :] if direction == "forward" else delta[: s + 1][::-1][: max(s, 0)]
        total, answer = 0.0, np.inf
        for k, step in enumerate(passed, start=1):
            total += rate * step
            if total >= threshold:
                answer = k
                break
        found.append(answer)
    return found


@pytest.mark.parametrize("head", ["channel", "head"])
@pytest.mark.parametrize("level", [np.exp(-1), 0.5])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_token_agrees_with_brute_force(head: str, level: float, direction: str) -> None:
    trace = random_trace(head=head)
    result = memory_horizon.measure(trace, level=level, tokens=range(40), n_bootstrap=2)
    found = result[f"token_{direction}_horizon"]
    assert found.dims == ("layer", "batch", "query_token", head, "state")
    A = trace["A"].values.astype(float).reshape(2, 3, -1)
    for layer, row, i, n in np.ndindex(2, 3, 3, A.shape[-1]):
        delta = trace["delta"].values[layer, row, :, i].astype(float)
        wanted = brute(delta, -A[layer, i, n], -np.log(level), direction)
        np.testing.assert_array_equal(found.values[layer, row, :, i, n], wanted)


def test_quantiles_pool_rows_and_count_censored_ones_as_infinite() -> None:
    trace = random_trace()
    result = memory_horizon.measure(trace, tokens=range(40))
    pooled = result.token_forward_horizon.transpose("layer", "channel", "state", "batch", "query_token").values
    pooled = np.sort(pooled.reshape(2, 3, 4, -1), axis=-1)
    at = np.ceil(np.array([0.1, 0.5, 0.9]) * pooled.shape[-1] - 1e-6).astype(int) - 1
    np.testing.assert_array_equal(result.forward_horizon, pooled[..., at])
    np.testing.assert_allclose(result.forward_censored_share, np.isinf(pooled).mean(axis=-1))
    flat = np.sort(pooled.reshape(2, -1), axis=-1)
    at = np.ceil(np.array([0.1, 0.5, 0.9]) * flat.shape[-1] - 1e-6).astype(int) - 1
    np.testing.assert_array_equal(result.layer_forward_horizon, flat[:, at])


def test_lower_bounds_hold_for_a_longer_recording() -> None:
    """What is censored in the first half is at most what the whole recording shows."""
    trace = random_trace(n_tokens=80)
    part = memory_horizon.measure(trace.isel(token=slice(0, 40)), tokens=range(40))
    whole = memory_horizon.measure(trace, tokens=range(40))
    censored = np.isinf(part.token_forward_horizon)
    assert censored.any()
    assert (part.token_forward_horizon_at_least <= whole.token_forward_horizon).all()
    exact = part.token_forward_horizon.where(~censored)
    np.testing.assert_array_equal(exact, whole.token_forward_horizon.where(~censored))


@pytest.mark.parametrize("step", [0.3, 0.1, 0.25, 1.0, 0.07])
def test_constant_delta_gives_the_ceiling_exactly_and_gain_one(step: float) -> None:
    rates = np.array([1.0, 0.5, 2.0])
    result = memory_horizon.measure(make_trace(np.full((1, 2, 400, 1), step), -rates[None, None]), tokens=[0, 100])
    exact = 1 / (rates * np.float64(np.float32(step)))
    np.testing.assert_allclose(result.lti_horizon[0, 0], exact, rtol=1e-12)
    wanted = np.ceil(exact * (1 - 1e-9))
    np.testing.assert_array_equal(result.forward_horizon[0, 0, :, 1], wanted)
    np.testing.assert_array_equal(result.token_forward_horizon[0, 1, 1, 0], wanted)
    np.testing.assert_array_equal(result.null_lti_horizon, result.forward_horizon)
    np.testing.assert_array_equal(result.null_lti_censored_share, result.forward_censored_share)
    assert (result.selectivity_gain == 1).all()
    for end in ("", "_low", "_high"):
        assert result[f"layer_selectivity_gain{end}"].item() == 1, "a time-invariant layer gains nothing"
    np.testing.assert_array_equal(result.null_shuffle_horizon[..., :2], result.forward_horizon[..., :2])
    assert (result.log_spread[0, 0] == 0).all()
    assert (result.null_lti_log_spread == 0).all()


@pytest.mark.parametrize("head", ["channel", "head"])
def test_many_time_invariant_channels_pool_to_gain_one(head: str) -> None:
    """The pooled median counts censored horizons and whole tokens; so must what it is divided by."""
    steps = np.geomspace(0.01, 3.0, 64)
    delta = np.broadcast_to(steps, (1, 3, 48, 64)) * np.array([0.9, 1.0, 1.1])[None, :, None, None]
    A = -np.ones((1, 64, 1) if head == "channel" else (1, 64))
    result = memory_horizon.measure(make_trace(delta, A, head=head))
    assert 0 < result.layer_forward_censored_share.item() < 1
    for name in ("layer_selectivity_gain", "layer_selectivity_gain_low", "layer_selectivity_gain_high"):
        assert result[name].item() == 1, name
    np.testing.assert_array_equal(result.layer_null_lti_horizon, result.layer_forward_horizon)


def test_padding_between_tokens_decays_and_needs_the_cumulative_delta() -> None:
    trace = random_trace(n_rows=2, n_tokens=40)
    cumulative = trace["delta"].astype(float).cumsum("token").transpose(*trace["delta"].dims)
    inside = trace["valid"].copy()
    inside[0, 10:14] = False
    position = np.where(inside, np.cumsum(inside, axis=1) - 1, -1)
    padded = trace.assign_coords(valid=inside, position=(("batch", "token"), position))
    with pytest.raises(ValueError, match="not contiguous and the trace lacks `delta_cumsum`"):
        memory_horizon.measure(padded)
    told = memory_horizon.measure(padded.assign(delta_cumsum=cumulative), tokens=[8])
    steps = told.token_forward_horizon.isel(layer=0, batch=0, query_token=0).values
    Cum, A = cumulative.values[0, 0], trace["A"].values[0]
    valid = np.flatnonzero(inside.values[0])
    for channel, state in np.ndindex(steps.shape):
        later = (Cum[valid[9:], channel] - Cum[valid[8], channel]) * -A[channel, state] >= 1
        assert steps[channel, state] == (1 + later.argmax() if later.any() else np.inf)


def test_keep_holds_after_its_event_and_erases_before() -> None:
    n, n_tokens, beta = 60, 128, 64.0
    delta = np.logaddexp(0, beta * (n + 0.5 - np.arange(n_tokens)))[None, None, :, None]
    trace = make_trace(delta, np.array([[[-1.0]]]))
    result = memory_horizon.measure(trace, tokens=[10, n - 1, n, n + 20], event_tokens=n)
    assert result.token_forward_horizon.values.ravel().tolist() == [1, 1, np.inf, np.inf]
    assert result.token_forward_horizon_at_least.values.ravel().tolist() == [1, 1, n_tokens - n, n_tokens - n - 20]
    before, at, after = result.mean_decay_event.sel(event=["before", "at", "after"]).values.ravel()
    assert before < 1e-12
    assert at == pytest.approx(np.exp(-beta / 2), rel=1e-4)
    assert after == pytest.approx(1, abs=1e-9)
    assert result.lti_horizon.item() < 1e-2
    assert result.forward_censored_share.item() == pytest.approx((n_tokens - n) / n_tokens)


def test_the_shuffle_destroys_what_order_made() -> None:
    """Held in the second half, erased in the first: shuffled, an erase is always near."""
    delta = np.where(np.arange(200) < 100, 5.0, 1e-3)[None, None, :, None]
    result = memory_horizon.measure(make_trace(delta, np.array([[[-1.0]]])))
    assert result.forward_censored_share.item() == pytest.approx(0.505, abs=0.01)
    assert result.null_shuffle_censored_share.item() < 0.1
    assert result.null_shuffle_horizon.sel(quantile=0.9).item() < 8
    assert memory_horizon.measure(make_trace(delta, np.array([[[-1.0]]]))).identical(result)


def test_the_lower_bound_of_a_spread_grows_into_the_spread() -> None:
    result = memory_horizon.measure(random_trace())
    spread, least = result.log_spread.values, result.log_spread_at_least.values
    known = np.isfinite(spread)
    assert 0 < known.mean() < 1
    assert (least[known] <= spread[known] + 1e-12).all()
    assert (spread[known] > 0).any()


def test_decay_statistics_are_means_over_valid_tokens() -> None:
    trace = random_trace()
    result = memory_horizon.measure(trace)
    exponent = trace["delta"].astype(float) * trace["A"].astype(float)
    np.testing.assert_allclose(result.mean_decay, np.exp(exponent).mean(["batch", "token"]), rtol=1e-6)
    np.testing.assert_allclose(result.lyapunov, exponent.mean(["batch", "token"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("left", "right"), [(3, 4), *(pytest.param(*one, marks=pytest.mark.long) for one in ((5, 0), (0, 7)))]
)
def test_padding_changes_nothing(left: int, right: int) -> None:
    trace = random_trace()
    padded = np.pad(trace["delta"].values, ((0, 0), (0, 0), (left, right), (0, 0)), constant_values=99.0)
    valid = np.pad(np.ones((3, 40), bool), ((0, 0), (left, right)))
    other = make_trace(padded, trace["A"].values, valid)
    kwargs = {"tokens": [0, 17], "event_tokens": [5, 6, 7]}
    xr.testing.assert_identical(memory_horizon.measure(other, **kwargs), memory_horizon.measure(trace, **kwargs))


def test_rows_of_unequal_length_count_their_own_tokens() -> None:
    trace = random_trace(n_rows=2)
    trace["valid"][1, 25:] = False
    trace["position"][1, 25:] = -1
    trace["delta"][:, 1, 25:] = np.nan
    result = memory_horizon.measure(trace, tokens=[24])
    alone = memory_horizon.measure(trace.isel(batch=[1], token=slice(0, 25)), tokens=[24])
    np.testing.assert_array_equal(result.token_forward_horizon[:, 1:], alone.token_forward_horizon)
    pooled = np.nansum(trace["delta"].values.astype(float), axis=(1, 2)) / 65
    np.testing.assert_allclose(result.mean_delta, pooled)


def test_dask_equals_memory_and_blocks_of_channels_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace()
    whole = memory_horizon.measure(trace, tokens=[3])
    xr.testing.assert_identical(memory_horizon.measure(trace.chunk(layer=1, batch=1), tokens=[3]), whole)
    monkeypatch.setattr("mamba_probe.analyses.memory_horizon.layer.BLOCK_BYTES", 1)
    xr.testing.assert_identical(memory_horizon.measure(trace, tokens=[3]), whole)


def test_gaps_round_up_to_the_next_recorded_token() -> None:
    trace = random_trace()
    trace["delta_cumsum"] = (trace["delta"].dims, np.cumsum(trace["delta"].values.astype(float), axis=2))
    kept = [0, 1, 5, 6, 7, 15, 16, 30, 39]
    whole = memory_horizon.measure(trace, tokens=kept)
    result = memory_horizon.measure(trace.isel(token=kept), tokens=kept)
    exact = whole.token_forward_horizon.values
    ends = exact + np.array(kept)[:, None, None]
    wanted = np.full(exact.shape, np.inf)
    for token in reversed(kept):
        wanted = np.where(ends <= token, token - np.array(kept)[:, None, None], wanted)
    np.testing.assert_array_equal(result.token_forward_horizon, wanted)
    assert np.isnan(result.null_shuffle_horizon).all()
    assert "rounded up" in result.attrs["gaps"]
    assert "not contiguous" in result.attrs["null"]
    elapsed = trace["delta"].values.astype(float)[:, :, 1:].sum(axis=(1, 2)) / (3 * 39)
    np.testing.assert_allclose(result.mean_delta, elapsed, rtol=1e-12)
    with pytest.raises(ValueError, match="lacks `delta_cumsum`"):
        memory_horizon.measure(trace.isel(token=kept).drop_vars("delta_cumsum"))


def test_intervals_enclose_the_estimate_and_need_rows() -> None:
    result = memory_horizon.measure(random_trace(n_rows=8))
    for name in ("layer_forward_horizon", "layer_lti_horizon", "layer_selectivity_gain"):
        assert (result[f"{name}_low"] <= result[name]).all()
        assert (result[name] <= result[f"{name}_high"]).all()
    assert (result.layer_selectivity_gain_low < result.layer_selectivity_gain_high).all()
    single = memory_horizon.measure(random_trace(n_rows=1))
    assert np.isnan(single.layer_forward_horizon_low).all()
    assert np.isnan(single.layer_selectivity_gain_high)[0]
    assert "one row" in single.attrs["interval"]


def test_no_decay_is_never_reached() -> None:
    result = memory_horizon.measure(make_trace(np.ones((1, 1, 9, 1)), np.zeros((1, 1, 1))))
    assert np.isinf(result.forward_horizon).all()
    assert np.isinf(result.lti_horizon).all()
    assert np.isnan(result.selectivity_gain).all()
    assert result.mean_decay.item() == 1
    assert result.forward_horizon_at_least.sel(quantile=0.9).item() == 9


def test_a_single_token_is_censored() -> None:
    result = memory_horizon.measure(make_trace(np.ones((1, 1, 1, 1)), -np.ones((1, 1, 1))), tokens=[0])
    assert np.isinf(result.token_forward_horizon).all()
    assert result.token_backward_horizon_at_least.item() == 1


def test_every_number_has_a_name_a_unit_and_an_account() -> None:
    result = memory_horizon.measure(random_trace(), tokens=[0], event_tokens=3)
    for name, variable in result.data_vars.items():
        assert variable.attrs["long_name"], name
        assert variable.attrs["units"], name
    assert {"estimator", "null", "interval", "reduces_over", "censoring"} <= set(result.attrs)
    assert all(isinstance(value, str) for value in result.attrs.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"level": 1.0}, "level is a retention and must be above 0 and below 1; got 1.0"),
        ({"level": 0.0}, "got 0.0"),
        ({"tokens": [40]}, r"tokens \[40\] are not among the valid tokens of row 0: 40 tokens at positions 0 to 39"),
        ({"event_tokens": [1, 2]}, "one for each of the 3 rows"),
        ({"event_tokens": 0.5}, "one position"),
        ({"event_tokens": 99}, "99 is not among the valid tokens of row 0"),
        ({"baseline": xr.Dataset()}, r"memory_horizon\.measure does not use baseline"),
        ({"n_bootstrap": 0}, "n_bootstrap must be at least 2"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        memory_horizon.measure(random_trace(), **arguments)


def test_something_that_is_no_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="schema_version"):
        memory_horizon.measure(xr.Dataset({"delta": 1}))


def test_rounding_of_a_sum_adds_no_token() -> None:
    """0.1 ten times is below 1 in float64; the horizon is 10 all the same."""
    reached = Path(np.cumsum(np.full(40, 0.1))).reached(np.array([1.0]))
    steps, censored = core.forward(reached, np.arange(40))
    assert (steps[~censored] == 10).all()


@pytest.mark.parametrize("kind", ["horizon", "gain", "share"])
@pytest.mark.parametrize("n_rows", [1, 4])
def test_plots_draw_the_value_beside_its_nulls(kind: str, n_rows: int) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    result = memory_horizon.measure(random_trace(n_rows=n_rows))
    assert memory_horizon.plot(result, ax, kind=kind) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sum("null" in label for label in labels) == 2
    assert "executed" in labels
    assert (ax.get_xscale() if kind == "share" else ax.get_yscale()) == "log"
    assert ("no interval" in ax.get_ylabel()) == (n_rows == 1 or kind == "share")
    figure.canvas.draw()
    plt.close(figure)


def test_a_plot_marks_what_was_not_reached() -> None:
    import matplotlib.pyplot as plt

    result = memory_horizon.measure(make_trace(np.full((1, 1, 16, 1), 1e-3), -np.ones((1, 1, 1))))
    ax = memory_horizon.plot(result)
    arrows = [line for line in ax.get_lines() if line.get_marker() == "^" and np.isfinite(line.get_ydata()).any()]
    assert arrows[0].get_ydata()[0] == result.layer_forward_horizon_at_least.sel(quantile=0.9).item()
    plt.close(ax.figure)


def test_the_share_curve_counts_channels_and_ends_where_censoring_begins() -> None:
    import matplotlib.pyplot as plt

    delta = np.broadcast_to(np.array([0.5, 0.1, 1e-6]), (1, 1, 64, 3))
    result = memory_horizon.measure(make_trace(delta, -np.ones((1, 3, 1))))
    ax = memory_horizon.plot(result, kind="share")
    executed = next(line for line in ax.get_lines() if line.get_label() == "executed")
    x, y = executed.get_data()
    least = result.forward_horizon_at_least.sel(quantile=0.5).isel(channel=2).item()
    assert 0.97 * least < x.max() < least
    assert y[x < 1.9] == pytest.approx(1.0)
    assert y[(x > 2.1) & (x < 9.9)] == pytest.approx(2 / 3)
    assert y[x > 10.2] == pytest.approx(1 / 3)
    plt.close(ax.figure)


def test_importing_the_analysis_loads_no_matplotlib() -> None:
    code = "import sys, mamba_probe.analyses.memory_horizon; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
