"""Hidden attention: planted rows, closed forms of the statistics, intervals, maps, refusals and pictures."""

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention
from mamba_probe.analyses.hidden_attention import core

matplotlib.use("Agg")
VARIABLES = ("delta", "A", "B", "C", "x", "y")


@pytest.fixture(scope="module")
def drawn():
    """The module's figures are closed at its end."""
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def constant(n_tokens=40, n_rows=3, step=0.25, decay=0.5, sign=1.0, layers=1):
    """Time-invariant channels; alpha = sign step exp(-decay step lag), exactly, times 1 and 2 by channel."""
    place, shape = ("layer", "batch", "token"), (layers, n_rows, n_tokens)
    ones = np.ones((*shape, 1, 1))
    return xr.Dataset(
        {
            "delta": ((*place, "channel"), np.full((*shape, 2), step) * [1.0, 2.0]),
            "A": (("layer", "channel", "state"), np.full((layers, 2, 1), -decay)),
            "B": ((*place, "group", "state"), ones),
            "C": ((*place, "group", "state"), ones * sign),
        },
        {
            "layer": np.arange(layers) * 5,
            "valid": (("batch", "token"), np.ones((n_rows, n_tokens), bool)),
            "position": (("batch", "token"), np.tile(np.arange(n_tokens), (n_rows, 1))),
        },
        {"schema_version": 1, "family": "mamba", "discretization": "euler", "model": "constant"},
    )


def test_closed_form_rows_statistics_and_lags():
    result = hidden_attention.measure(constant(sign=-1.0), query_tokens=[30], aggregate="none").isel(layer=0)
    lag = np.arange(30, -1, -1.0)
    wanted = -np.stack([step * np.exp(-0.5 * step * lag) for step in (0.25, 0.5)])
    np.testing.assert_allclose(result["alpha"].values[0, 0, :, :31], wanted, rtol=1e-12)
    np.testing.assert_allclose(result["null_lti_alpha"], result["alpha"], rtol=1e-12)
    np.testing.assert_allclose(result["null_shuffle_alpha"], result["alpha"], rtol=1e-12)
    p = wanted / wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result["entropy"][0, 0], -(p * np.log(p)).sum(1), rtol=1e-10)
    np.testing.assert_allclose(result["mean_distance"][0, 0], p @ lag, rtol=1e-10)
    np.testing.assert_allclose(result["first_share"][0, 0], p[:, 0], rtol=1e-10)
    assert (result["negative_share"] == 1).all()
    assert (result["top_source"] == 30).all()
    size = np.abs(wanted[:, ::-1])
    by_lag = [size[:, a:b].mean() for a, b in zip([0, 1, 2, 4, 8, 16], [1, 2, 4, 8, 16, 31], strict=True)]
    np.testing.assert_allclose(result["layer_by_lag"], by_lag, rtol=1e-10)
    assert result["lag"].values.tolist() == [0, 1, 2, 4, 8, 16]
    np.testing.assert_allclose(result["layer_entropy"], result["entropy"].mean(), rtol=1e-10)
    np.testing.assert_allclose(result["head_entropy"], result["entropy"][0, 0], rtol=1e-10)


def test_a_head_that_reads_nothing_has_no_statistics():
    trace = constant()
    trace["delta"][..., 1] = 0.0
    result = hidden_attention.measure(trace, aggregate="mean_absolute", normalise="absolute_share")
    assert result["entropy"].isel(channel=1).isnull().all()
    assert result["entropy"].isel(channel=0).notnull().all()
    np.testing.assert_allclose(result["alpha"].sum("token"), 1.0)
    nothing = hidden_attention.measure(trace.isel(channel=[1]), normalise="absolute_share")
    assert nothing["layer_entropy"].isnull().all()
    assert nothing["aggregate_entropy"].isnull().all()
    assert hidden_attention.measure(trace.isel(channel=[1]))["aggregate_entropy"].isnull().all()


def test_tiny_weights_keep_their_shares():
    found = core.statistics(np.array([[1e-310], [-3e-310]]))
    assert found["negative_share"].item() == pytest.approx(0.75, rel=1e-3)


def test_intervals_are_over_rows_or_named_token_blocks_or_nothing():
    rng = np.random.default_rng(0)
    trace = constant()
    trace["delta"] = trace["delta"] * np.exp(rng.normal(0, 0.5, trace["delta"].shape))
    rows = hidden_attention.measure(trace, query_tokens=[20, 30])
    assert rows.attrs["interval"] == "95 % percentile bootstrap over rows"
    blocks = hidden_attention.measure(trace.isel(batch=[0]), query_tokens=range(8, 40))
    assert "8 token blocks: consecutive queries of the one row" in blocks.attrs["interval"]
    for result in (rows, blocks):
        low, value, high = (result[f"layer_mean_distance{end}"].item() for end in ("_low", "", "_high"))
        assert low < value < high
        assert result["layer_by_lag_low"].isel(lag=slice(0, 4)).notnull().all()
    nothing = hidden_attention.measure(trace.isel(batch=[0]), query_tokens=range(7))
    assert nothing.attrs["interval"].startswith("NaN: one row with fewer than 8 queries")
    assert nothing["layer_mean_distance_low"].isnull().all()
    assert nothing["layer_mean_distance"].notnull().all()


def asked_of(model):
    """What each query of a small recall task reads, and where its value stands."""
    task = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32, seed=0)
    with mp.attach(model) as probe:
        trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
    asked = np.stack([np.flatnonzero(role == "query") for role in trace["role"].values])
    result = hidden_attention.measure(trace, query_tokens=asked, weights=weights, aggregate="mean_absolute")
    source = np.take_along_axis(trace["source_token"].values, asked, axis=1)
    assert result["identity_error"].max().item() < 1e-6
    return result, float((result["aggregate_top_source"].values[0] == source).mean())


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "s4d"])
def test_recall_by_selection_reads_the_value_that_was_asked_for_and_nothing_else(mixer):
    construction = mp.constructions.mqar(mixer=mixer, n_keys=16, n_values=16)
    result, found = asked_of(construction.model)
    if mixer == "s4d":  # recalls with its convolution and gate: its scan sums whatever was written
        assert found == 0
        even = np.log(result["query_position"] + 1.0).broadcast_like(result["entropy"])
        np.testing.assert_allclose(result["entropy"].transpose(*even.dims), even, atol=1e-6)
    else:
        assert found == 1
        np.testing.assert_allclose(result["top_share"], 1.0, atol=1e-6)
        assert result["layer_null_lti_top_share"].item() < 0.1
    twin, chance = asked_of(construction.randomised(seed=3).model)
    assert chance < 0.2
    assert twin["layer_top_share"].item() < 0.35


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_induction_reads_what_followed_the_last_token_like_it(mixer):
    construction = mp.constructions.induction(mixer=mixer)
    ids = np.random.default_rng(0).integers(0, 16, (3, 40))
    with mp.attach(construction.model) as probe:
        trace, weights = probe.record(torch.tensor(ids), variables=VARIABLES), probe.weights()
    result = hidden_attention.measure(trace, query_tokens=[39], weights=weights).isel(layer=-1, query_token=0)
    top, share = result["top_source"].values, result["top_share"].values
    own = np.arange(top.shape[1]) // (16 if mixer == "mamba1" else 1)  # the token that each channel or head waits for
    for row, head in np.ndindex(3, np.count_nonzero(own < 16)):
        followed = np.flatnonzero(ids[row, :-1] == own[head]) + 1
        if len(followed):
            assert top[row, head] == followed[-1]
            assert share[row, head] == pytest.approx(1.0, abs=1e-6)


def test_keep_nth_reads_the_kept_token():
    layer = mp.constructions.keep_nth(n_tokens=16, length=64, n=20)
    with mp.attach(layer.model) as probe:
        trace = probe.record(layer.inputs(np.random.default_rng(0).integers(0, 16, (2, 64))), variables=VARIABLES)
        weights = probe.weights()
    result = hidden_attention.measure(trace, query_tokens=[20, 40, 63], weights=weights)
    assert (result["top_source"] == 20).all()
    np.testing.assert_allclose(result["top_share"], 1.0, atol=1e-6)
    np.testing.assert_allclose(result["mean_distance"].isel(channel=0, layer=0, batch=0), [0, 20, 43], atol=1e-4)
    assert (result["layer_null_lti_top_share"] > 0.99).all()
    assert result["layer_null_lti_mean_distance"].item() < 0.1, "time-invariant: only the query's own token"


def test_haar_rows_are_windows():
    layer = mp.constructions.haar(length=64, levels=2)
    with mp.attach(layer.model) as probe:
        trace = probe.record(layer.inputs(np.random.default_rng(0).standard_normal((2, 64))), variables=VARIABLES)
        weights = probe.weights()
    result = hidden_attention.measure(trace, aggregate="none", weights=weights)
    for window in range(4):
        channels = [i for i, text in enumerate(layer.channels) if "window" in text and f"[{16 * window}" in text]
        assert len(channels) == 2
        rows = result["alpha"].isel(layer=0, batch=0, query_token=0, channel=channels).values
        inside = np.arange(64) // 16 == window
        np.testing.assert_allclose(rows / np.abs(rows).max(), np.broadcast_to(inside, rows.shape), atol=1e-6)
        np.testing.assert_allclose(result["entropy"].isel(channel=channels), np.log(16), atol=1e-4)


def test_a_map_is_the_rows_of_its_window():
    rng = np.random.default_rng(0)
    trace = constant(layers=2)
    trace["delta"] = trace["delta"] * np.exp(rng.normal(0, 0.5, trace["delta"].shape))
    for rules in ({}, {"aggregate": "l2", "normalise": "absolute_share"}):
        found = hidden_attention.map(trace, layer=5, row=1, window=(10, 30), **rules)
        rows = hidden_attention.measure(trace, query_tokens=range(10, 30), **rules).sel(layer=5).isel(batch=1)
        for name in ("alpha", "null_lti_alpha", "null_shuffle_alpha"):
            np.testing.assert_allclose(found[name], rows[name].isel(token=slice(10, 30)), rtol=1e-10)
    one = hidden_attention.map(trace, layer=0, head=1)
    each = hidden_attention.measure(trace, query_tokens=range(40), aggregate="none", heads=[1])
    np.testing.assert_allclose(one["alpha"], each["alpha"].isel(layer=0, batch=0, channel=0), rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"aggregate": "mean"}, "unknown aggregate 'mean': did you mean 'signed_mean'"),
        ({"normalise": "softmax"}, "unknown normalise 'softmax'; known: raw, absolute_share"),
        ({"query_tokens": []}, "query_tokens is empty"),
        ({"query_tokens": np.array([0.5])}, "query_tokens needs integers"),
        ({"query_tokens": [[1], [2]]}, r"\(batch = 3, query_token\); got int64 of shape \(2, 1\)"),
        ({"query_tokens": [40]}, "must be distinct positions 0 to 39: row 0 has 40 valid tokens"),
        ({"query_tokens": [-1]}, "must be distinct positions"),
        ({"heads": [2]}, r"heads \[2\] are not in `channel` of this trace: 0 .. 1"),
        ({"heads": [0, 0]}, "heads needs distinct integers"),
        ({"baseline": 1}, "does not use baseline"),
        ({"n_bootstrap": 1}, "n_bootstrap must be at least 2"),
    ],
)
def test_refusals_of_measure(arguments, said):
    with pytest.raises(ValueError, match=said):
        hidden_attention.measure(constant(), **arguments)


def test_rows_with_gaps_or_without_their_beginning_are_refused():
    trace = constant()
    with pytest.raises(ValueError, match="row 0 are not contiguous: a query reads every token before it"):
        hidden_attention.measure(trace.isel(token=[0, 1, 5]))
    with pytest.raises(ValueError, match="row 0 begin at position 3"):
        hidden_attention.measure(trace.isel(token=slice(3, None)))
    with pytest.raises(ValueError, match=r"lacks .*C"):
        hidden_attention.measure(trace.drop_vars("C"))


def test_results_and_maps_too_large_are_refused_before_anything_is_computed():
    long = constant(n_tokens=2048, n_rows=1)
    with pytest.raises(ValueError, match=r"2048 x 2048 tokens is above the limit of 1024 x 1024: give a shorter"):
        hidden_attention.map(long)
    many = constant(n_tokens=40_000, n_rows=1)
    with pytest.raises(ValueError, match=r"2000 queries in 1 layers.*would take 1.8 GiB, above 1: ask for fewer"):
        hidden_attention.measure(many, query_tokens=range(2000))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, r"layer is needed: the trace holds \[0, 5\]"),
        ({"layer": 1}, r"layer 1 is not in the trace, which holds \[0, 5\]"),
        ({"layer": 0, "row": 3}, "row must be 0 to 2"),
        ({"layer": 0, "window": (3, 41)}, "0 <= first < end <= 40; got"),
        ({"layer": 0, "aggregate": "none"}, "a map is of one `head`, or of all heads by an aggregate"),
        ({"layer": 0, "head": 0, "aggregate": "l2"}, "a map is of one `head`"),
    ],
)
def test_refusals_of_map(arguments, said):
    with pytest.raises(ValueError, match=said):
        hidden_attention.map(constant(layers=2), **arguments)


def test_pictures_say_what_they_show(drawn):
    two = hidden_attention.measure(constant(layers=2), query_tokens=[10, 30])
    lag = hidden_attention.plot(two, layer=5)
    assert lag.get_title(loc="left") == "constant, layer 5, all 2 channels"
    assert [text.get_text() for text in lag.get_legend().get_texts()][:2] == ["executed", "time-invariant (null)"]
    assert "95 % interval" in lag.get_ylabel()
    lines = [line for line in hidden_attention.plot(two).get_lines() if line.get_marker() != "v"]
    assert len(lines) == 4 + 2  # two layers, each beside its null; two for the legend
    rows = hidden_attention.plot(two, kind="rows", layer=0, row=1)
    assert rows.get_title(loc="left") == "constant, layer 0, signed mean over channels"
    assert [tick.get_text() for tick in rows.get_yticklabels()] == ["10", "30"]
    each = hidden_attention.measure(constant(), aggregate="none")
    assert "channel 1" in hidden_attention.plot(each, kind="rows", head=1).get_title(loc="left")
    square = hidden_attention.map(constant(sign=-1.0))
    for series, label in (("executed", "executed"), ("null_lti", "time-invariant (null)")):
        drawing = hidden_attention.plot(square, kind="map", series=series)
        image = drawing.get_images()[0]
        assert image.norm.vmin == -image.norm.vmax == pytest.approx(-0.375)
        assert drawing.get_title(loc="left") == f"constant, layer 0, row 0\nsigned mean over channels: {label}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "row"}, "kind must be one of"),
        ({"series": "null"}, "series must be one of"),
        ({"kind": "map"}, "hidden_attention.map.plot draws what|got a result of hidden_attention"),
        ({"kind": "rows"}, r"layer is needed for kind 'rows': the result holds \[0, 5\]"),
        ({"layer": 1}, "layer 1 is not in the result"),
        ({"kind": "rows", "layer": 0, "row": 3}, "row must be 0 to 2"),
        ({"kind": "rows", "layer": 0, "head": 3}, "head 3 was aggregated"),
    ],
)
def test_refusals_of_plot(arguments, said):
    with pytest.raises(ValueError, match=said):
        hidden_attention.plot(hidden_attention.measure(constant(layers=2)), **arguments)
