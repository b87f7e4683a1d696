"""Censored horizons: Kaplan-Meier against a plain loop, bounds that hold, levels by name, blocks of one row."""

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.memory_horizon import survival

TOKENS = 48


def make_trace(seed: int = 0, n_rows: int = 2, n_tokens: int = TOKENS, n_heads: int = 2) -> xr.Dataset:
    """Two channels of three states, slow enough that many horizons are censored."""
    generator = np.random.default_rng(seed)
    delta = np.exp(generator.normal(-2.5, 1.0, (1, n_rows, n_tokens, n_heads))).astype("float32")
    A = -np.exp(generator.normal(0, 1, (1, n_heads, 3))).astype("float32")
    return xr.Dataset(
        {"delta": (("layer", "batch", "token", "channel"), delta), "A": (("layer", "channel", "state"), A)},
        {
            "layer": [0],
            "valid": (("batch", "token"), np.ones((n_rows, n_tokens), bool)),
            "position": (("batch", "token"), np.tile(np.arange(n_tokens), (n_rows, 1))),
        },
        {"schema_version": 1, "family": "mamba"},
    )


def by_token(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Horizons (channel, state, token of any row), and the least of each."""
    both = (result[f"token_forward_horizon{end}"] for end in ("", "_at_least"))
    flat = (of.isel(layer=0).transpose("channel", "state", "batch", "query_token").values for of in both)
    horizon, least = (of.reshape(*of.shape[:2], -1) for of in flat)
    return horizon, least


def kaplan_meier(horizon: np.ndarray, least: np.ndarray, longest: int) -> list[float]:
    """The product limit, one horizon and one step at a time."""
    curve, left = [], 1.0
    for k in range(longest + 1):
        watched = ended = 0
        for h, c in zip(horizon, least, strict=True):
            followed = h if np.isfinite(h) else c - 1  # at least c: seen to survive c - 1 steps
            watched += followed >= k
            ended += h == k
        left *= 1 - ended / watched if watched else 1
        curve.append(left if watched or left == 0 else np.nan)
    return curve


@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_curve_its_quantiles_and_its_mean_agree_with_a_loop(n_rows: int) -> None:
    result = memory_horizon.measure(make_trace(n_rows=n_rows), tokens=range(TOKENS), n_bootstrap=2)
    horizon, least = by_token(result)
    assert 0.1 < np.isinf(horizon).mean() < 0.9
    within = int(result.attrs["restricted_to"])
    assert within == TOKENS // 2
    for channel, state in np.ndindex(2, 3):
        curve = np.array(kaplan_meier(horizon[channel, state], least[channel, state], TOKENS))
        for q in (0.1, 0.5, 0.9):
            below = np.flatnonzero(curve <= 1 - q + 1e-9)
            found = result["forward_km_horizon"].isel(layer=0, channel=channel, state=state).sel(quantile=q).item()
            assert found == (below[0] if len(below) else np.inf)
        found = result["forward_restricted_mean"].values[0, channel, state]
        assert found == pytest.approx(curve[:within].sum(), abs=1e-12)
    pooled = np.array(kaplan_meier(horizon.ravel(), least.ravel(), TOKENS))
    np.testing.assert_allclose(result["layer_forward_survival"].values[0], pooled[result["lag"].values], atol=1e-12)


def test_bounds_enclose_the_estimate_and_every_value_the_censored_could_take() -> None:
    result = memory_horizon.measure(make_trace(), tokens=range(TOKENS))
    horizon, least = by_token(result)
    drawn = np.random.default_rng(1).geometric(0.05, horizon.shape)
    completed = np.where(np.isinf(horizon), least + drawn - 1, horizon).ravel()
    within = int(result.attrs["restricted_to"])
    for name, truth in (("restricted_mean", np.minimum(completed, within).mean()),):
        low, high = (result[f"layer_forward_{name}_{end}"].item() for end in ("at_least", "at_most"))
        assert low <= truth <= high
        assert low <= result[f"layer_forward_{name}"].item() <= high
        assert low < high
    low, high = (result[f"layer_forward_survival_{end}"].values[0] for end in ("at_least", "at_most"))
    truth = (completed[:, None] > result["lag"].values).mean(0)
    assert (low <= truth + 1e-12).all()
    assert (truth <= high + 1e-12).all()
    for q in (0.1, 0.5, 0.9):
        at = result.sel(quantile=q)
        ends = [at[f"layer_forward_horizon{end}"].item() for end in ("_at_least", "")]
        assert ends[0] <= at["layer_forward_km_horizon"].item() <= ends[1]


def test_without_censoring_the_curve_is_the_plain_share_and_the_quantiles_agree() -> None:
    trace = make_trace()
    trace["delta"][:] = 20.0
    trace["A"][:] = -1.0
    result = memory_horizon.measure(trace.isel(token=slice(0, 30)))
    np.testing.assert_array_equal(result["forward_km_horizon"], 1)
    assert result["layer_forward_survival"].sel(lag=[0, 1]).values.tolist() == [[1.0, 0.0]]


def test_independent_censoring_is_undone() -> None:
    """Geometric horizons with p = 0.1, censored by position: the loop's truth is known, and the naive mean is short."""
    generator = np.random.default_rng(0)
    truth = generator.geometric(0.1, 20000)
    ends = generator.integers(1, 30, 20000)
    censored = truth >= ends
    seen = np.where(censored, ends, truth)
    size = 40
    least = np.bincount(seen, minlength=size)
    exact = np.bincount(np.where(censored, size - 1, seen), minlength=size)
    curve = survival.curve(exact, least)
    np.testing.assert_allclose(curve[:25], 0.9 ** np.arange(25), atol=0.02)
    assert survival.curve_quantiles(curve, (0.5,)).item() == 7
    assert survival.restricted_mean(curve, 20).item() == pytest.approx(np.minimum(truth, 20).mean(), abs=0.15)
    assert np.minimum(seen, 20).mean() < np.minimum(truth, 20).mean() - 1


def test_several_levels_stand_side_by_side() -> None:
    trace = make_trace()
    both = memory_horizon.measure(trace, level=["1/e", "1/2", 0.1], tokens=[3], event_tokens=20, n_bootstrap=9)
    assert both["level"].values.tolist() == ["1/e", "1/2", "0.1"]
    np.testing.assert_array_equal(both["retention"], [np.exp(-1), 0.5, 0.1])
    assert "level" not in both["mean_decay"].dims + both["layer_gamma_low"].dims + both["half_life"].dims
    for name, level in {"1/e": float(np.exp(-1)), "1/2": 0.5, "0.1": 0.1}.items():
        one = memory_horizon.measure(trace, level=level, tokens=[3], event_tokens=20, n_bootstrap=9)
        xr.testing.assert_equal(both.sel(level=name).drop_vars(["level", "retention"]), one)
    assert (both["lti_horizon"].sel(level="1/2") == both["half_life"]).all()


def test_default_level_is_one_over_e() -> None:
    one, named = (memory_horizon.measure(make_trace(), **given) for given in ({}, {"level": "1/e"}))
    assert one.identical(named)
    assert "level" not in one.dims


def test_one_row_is_resampled_over_blocks_of_its_tokens() -> None:
    result = memory_horizon.measure(make_trace(n_rows=1), token_blocks=6)
    plain = memory_horizon.measure(make_trace(n_rows=1))
    assert "6 blocks of one row's tokens" in result.attrs["interval"]
    for name in plain.data_vars:
        if not str(name).endswith(("_low", "_high")):
            xr.testing.assert_allclose(result[name], plain[name], rtol=1e-12)
    low, high = (result[f"layer_forward_restricted_mean_{end}"].item() for end in ("low", "high"))
    assert low < result["layer_forward_restricted_mean"].item() < high
    assert np.isnan(plain["layer_forward_restricted_mean_low"].item())


def test_lyapunov_exponent_and_half_life_belong_together() -> None:
    result = memory_horizon.measure(make_trace())
    np.testing.assert_allclose(result["half_life"], -np.log(2) / result["lyapunov"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["survival", "horizon"])
def test_pictures_name_model_layer_level_and_null(kind: str) -> None:
    import matplotlib.pyplot as plt

    result = memory_horizon.measure(make_trace().assign_attrs(model="some/where/tiny"), level=["1/2", "1/e"])
    ax = memory_horizon.plot(result, kind=kind, level="1/2")
    assert ax.get_xlabel().endswith("tiny; layer 0; frozen path, level 1/2" if kind == "survival" else "level 1/2")
    labels = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert "executed" in labels
    assert labels.count("null") == 2
    if kind == "survival":
        assert "Kaplan-Meier" in labels
        assert "95 % interval" in labels
        curve = next(line for line in ax.get_lines() if line.get_label() == "executed (Kaplan-Meier)")
        np.testing.assert_array_equal(curve.get_ydata(), result["layer_forward_survival"].sel(level="1/2")[0, 1:])
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"level": "1/3"}, r"level is a number in \(0, 1\) or one of \['1/e', '1/2'\]; got '1/3'"),
        ({"level": []}, "at least one retention, each once"),
        ({"level": [0.5, 0.5]}, "each once"),
        ({"level": [0.5, 1.5]}, "below 1; got 1.5"),
        ({"token_blocks": 4}, "token_blocks is for a trace of one row; with 2, rows are drawn"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        memory_horizon.measure(make_trace(), **arguments)


@pytest.mark.parametrize("blocks", [1, TOKENS + 1])
def test_blocks_without_tokens_are_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 blocks .* got {blocks} for {TOKENS} tokens"):
        memory_horizon.measure(make_trace(n_rows=1), token_blocks=blocks)


def test_a_plot_of_several_levels_or_layers_needs_one_named() -> None:
    trace = make_trace()
    two = xr.concat([trace, trace.assign_coords(layer=[1])], dim="layer", data_vars="minimal", coords="minimal",
                    compat="equals", join="exact")  # fmt: skip
    result = memory_horizon.measure(two, level=["1/e", "1/2"], n_bootstrap=2)
    with pytest.raises(ValueError, match=r"the result holds levels \['1/e', '1/2'\]: name one, level=..."):
        memory_horizon.plot(result)
    with pytest.raises(ValueError, match=r"the result holds layers \[0, 1\]: name one"):
        memory_horizon.plot(result, kind="survival", level="1/2")
    with pytest.raises(ValueError, match=r"draws token_forward_horizon, which .* gives with tokens"):
        memory_horizon.plot(result, kind="token", level="1/2", layer=1)
