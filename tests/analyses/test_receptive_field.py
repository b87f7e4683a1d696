"""Receptive fields against brute force that shares no code, closed forms, and what must not be taken."""

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import receptive_field
from mamba_probe.analyses.receptive_field import core
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.remembrance import remembrance

VOCAB, LENGTH, TRAINED = 24, 32, 16
BLOCKS = {
    "mamba": lambda: MambaBlock(8, d_state=3),
    "mamba2": lambda: Mamba2Block(8, n_heads=4, d_state=3, n_groups=2),
    "s4d": lambda: S4DBlock(8, d_state=3),
}


def perturbed(module, scale=0.2):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module.eval()


def language_model(kind, n_layers=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(LanguageModel([BLOCKS[kind]() for _ in range(n_layers)], vocab_size=VOCAB).double())


def ids(n_rows=3, length=LENGTH, seed=2):
    return torch.randint(0, VOCAB, (n_rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def recorded(request):
    model = language_model(request.param)
    with mp.attach(model) as probe:
        trace = probe.record(ids(), variables=("delta", "A", "B", "C", "x", "y", "u", "out"))
        return model, trace, probe.weights()


def by_impulses(trace, weights, row):
    """alpha (query, source, head) from the recurrence itself, in complex float64: an impulse at each source in turn."""
    family = trace.attrs["family"]
    A = trace["A"].values[0].reshape(weights.sizes[trace["delta"].dims[-1]], -1)
    n_heads, n_tokens = len(A), trace.sizes["token"]
    if family == "s4d":
        delta = np.tile(trace["delta"].values[0], (n_tokens, 1))
        B, C = (np.tile(trace[name].values[0], (n_tokens, 1, 1)) for name in "BC")
    else:
        delta = trace["delta"].values[0, row].astype(float)
        B, C = (trace[name].values[0, row].repeat(n_heads // trace.sizes["group"], axis=1) for name in "BC")
    found = np.zeros((n_tokens, n_tokens, n_heads))
    for source in range(n_tokens):
        h = np.zeros((n_heads, B.shape[-1]), complex)
        for t in range(n_tokens):
            step = delta[t, :, None]
            write = (np.exp(A * step) - 1) / A if family == "s4d" else step
            h = np.exp(A * step) * h + (t == source) * write * B[t]
            y = (C[t] * h).sum(axis=-1)
            found[t, source] = 2 * y.real if family == "s4d" else y.real
    return found


def test_distances_and_profiles_are_those_of_the_explicit_matrix(recorded):
    _, trace, weights = recorded
    result = receptive_field.measure(trace, train_length=TRAINED, n_bootstrap=2)
    size = np.abs(np.stack([by_impulses(trace, weights, row) for row in range(3)]))
    lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    distance = np.einsum("ts,rtsh->rth", lag, size) / size.sum(axis=2)
    shown = result["query_token"].values
    assert shown.tolist() == [3, 7, 11, 15, 19, 23, 27, 31]
    np.testing.assert_allclose(result["head_mean_distance"].values[0], distance.mean(0)[shown], rtol=1e-6)
    np.testing.assert_allclose(result["layer_mean_distance"].values[0], distance.mean((0, 2))[shown], rtol=1e-6)
    whole = distance.mean((0, 2))[[3, 7, 15, 31]]
    np.testing.assert_allclose(result["layer_train_mean_distance"].values[0, :4], whole, rtol=1e-6)
    ratio = whole / whole[2] / (np.array([3, 7, 15, 31]) / 15)
    np.testing.assert_allclose(result["layer_collapse_ratio"].values[0], [*ratio, np.nan], rtol=1e-6)
    assert result.attrs["beyond"] == "rows of 32 tokens end before 4 of train_length"
    joined = np.sqrt((size[:, -1] ** 2).sum(-1))
    shares = joined / joined.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result["layer_mixer_profile"].values[0], shares.mean(0)[::-1], rtol=1e-6)
    pairs = [np.abs(shares[i] - shares[(i + 1) % 3]).sum() / 2 for i in range(3)]
    np.testing.assert_allclose(result["layer_mixer_spread"].values[0], np.mean(pairs), rtol=1e-6, atol=1e-12)
    slopes = [np.polyfit(np.arange(4, LENGTH), np.log(row[::-1][4:]), 1)[0] for row in joined]
    np.testing.assert_allclose(result["layer_mixer_slope"].values[0], np.mean(slopes), rtol=1e-6)
    assert result["layer_mixer_slope_used"].item() == 1


def test_global_heads_are_those_of_clamped_steps(recorded):
    _, trace, _ = recorded
    result = receptive_field.measure(trace, train_length=TRAINED, n_bootstrap=2, theta=0.4, top=0.2)
    found = []
    for row in range(3):
        delta = trace["delta"].values[0]
        delta = np.tile(delta, (TRAINED, 1)) if delta.ndim == 1 else delta[row, :TRAINED].astype(float)
        A = trace["A"].values[0].reshape(delta.shape[1], -1).real
        cut = np.sort(delta, axis=0)[-3]  # int(16 * .2) = 3 largest
        product = np.prod(np.exp(A * np.minimum(delta, cut)[..., None]), axis=0)
        found.append(product.mean(axis=1))
    retained = np.mean(found, axis=0)
    np.testing.assert_allclose(result["head_train_retention"].values[0], retained, rtol=1e-6)
    assert result["layer_global_share"].item() == pytest.approx(np.mean(retained > 0.4))
    assert 0 <= result["layer_null_lti_global_share"].item() <= result["layer_global_share"].item()


def test_token_distance_is_that_of_every_pair(recorded):
    _, trace, _ = recorded
    result = receptive_field.measure(trace, n_bootstrap=2)
    for name in ("u", "out"):
        expected = []
        for values in trace[name].values[0].astype(float):
            square = ((values[:, None] - values[None]) ** 2).sum(-1)
            expected.append(square.sum() / (LENGTH * (LENGTH - 1)) / (2 * (values**2).sum() / LENGTH))
        assert result[f"layer_token_distance_{name}"].item() == pytest.approx(np.mean(expected), rel=1e-6)


def by_differences(mixer, hidden, query, step=1e-6):
    """J (row, source, out, in) of one query, by central differences."""
    rows, length, width = hidden.shape
    found = np.zeros((rows, length, width, width))
    with torch.no_grad():
        for s in range(length):
            for i in range(width):
                moved = torch.zeros_like(hidden)
                moved[:, s, i] = step
                found[:, s, :, i] = ((mixer(hidden + moved) - mixer(hidden - moved))[:, query] / (2 * step)).numpy()
    return found


def test_block_numbers_are_those_of_finite_differences(recorded):
    model, trace, _ = recorded
    mixer = model.backbone.layers[0].mixer
    exact = by_differences(mixer, torch.from_numpy(trace["u"].values[0]).double(), LENGTH - 1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (3, 8))
    with mp.attach(model) as probe:
        jacobian = probe.jacobian(ids(), layer=0, query_tokens=[LENGTH - 1], read_out=signs)
        full = probe.jacobian(ids(), layer=0, query_tokens=[LENGTH - 1])
    for given, read in ((jacobian, signs), (full, np.eye(8))):
        result = receptive_field.measure(trace, jacobian=given, n_bootstrap=2)
        size = np.sqrt((np.einsum("km,rsmi->rski", read, exact) ** 2).sum((2, 3)))
        shares = size / size.sum(axis=1, keepdims=True)
        assert np.abs(result["layer_block_profile"].values[0] - shares.mean(0)[::-1]).max() < 1e-6
        pairs = [np.abs(shares[i] - shares[(i + 1) % 3]).sum() / 2 for i in range(3)]
        assert result["layer_block_spread"].item() == pytest.approx(np.mean(pairs), abs=1e-6)
        slopes = [np.polyfit(np.arange(4, LENGTH), np.log(row[::-1][4:]), 1)[0] for row in size]
        assert result["layer_block_slope"].item() == pytest.approx(np.mean(slopes), rel=1e-4)
    assert "3 read-out(s)" in receptive_field.measure(trace, jacobian=jacobian).attrs["jacobian"]


def test_random_signs_estimate_the_whole_norm(recorded):
    """Root mean square over many sign vectors is the Frobenius norm; each one alone is not."""
    model, trace, _ = recorded
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (400, 8))
    with mp.attach(model) as probe:
        query = {"layer": 0, "query_tokens": [LENGTH - 1]}
        found = [probe.jacobian(ids(1), **query, read_out=read) for read in (signs, signs[:1], None)]
    many, one, exact = (
        receptive_field.measure(trace, jacobian=each, n_bootstrap=2)["layer_block_profile"].values for each in found
    )
    assert np.abs(many / exact - 1).max() < 0.15
    assert np.abs(one / exact - 1).max() > 0.15


def test_an_unrolled_product_of_matrices_is_the_profile_of_a_selective_block():
    """A Mamba-1 block by hand: every step's derivative as a matrix over (channel, state), their product down to s."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = perturbed(LanguageModel([MambaBlock(4, d_state=2, d_conv=1)], vocab_size=VOCAB).double())
    given, query = ids(2, 10), 9
    with mp.attach(model) as probe:
        trace = probe.record(given, variables=("delta", "A", "B", "C", "x", "z", "h", "u", "out", "y"))
        jacobian = probe.jacobian(given, layer=0, query_tokens=[query])
        w = probe.weights().isel(layer=0)
    result = receptive_field.measure(trace, jacobian=jacobian, lags=(0, None), n_bootstrap=2)
    shares = np.stack([_profile_by_products(trace.isel(layer=0, batch=row), w, query) for row in range(2)])
    assert np.abs(result["layer_block_profile"].values[0] - shares.mean(0)[::-1]).max() < 1e-6


def _sigmoid(v):
    return 1 / (1 + np.exp(-v))


def _profile_by_products(one, w, query):
    """|d out_query / d u_s| as shares, from W_out G C P_(query..s+1) [d h_s / d x_s] d x_s / d u_s, and the query's."""
    A, D, out = (w[name].values.astype(float) for name in ("A", "D", "out_proj"))
    dt = w["dt_proj"].values @ w["x_proj_dt"].values
    x, z, u = (one[name].values.astype(float) for name in "xzu")
    delta, h = one["delta"].values.astype(float), one["h"].values.astype(float)
    B, C = (one[name].values[:, 0].astype(float) for name in "BC")
    n_channels, n_states = A.shape
    before = u @ w["in_proj_x"].values.T * w["conv"].values[:, 0] + w["conv_bias"].values
    np.testing.assert_allclose(before * _sigmoid(before), x, rtol=1e-5, atol=1e-7)
    bent = _sigmoid(before) * (1 + before * (1 - _sigmoid(before)))  # silu'
    dx = bent[..., None] * (w["conv"].values[:, :1] * w["in_proj_x"].values)  # (token, channel, model)
    gate, dgate = z * _sigmoid(z), _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))
    eye, found = np.eye(n_channels), np.zeros((query + 1, len(out)))
    for s in range(query + 1):
        decay = np.exp(A * delta[s][:, None])
        past = h[s - 1] if s else np.zeros_like(A)
        slope = (1 - np.exp(-delta[s]))[:, None] * dt  # d delta / d x, from softplus' = 1 - exp(-softplus)
        through = np.einsum("cn,cj->cnj", A * decay * past + x[s][:, None] * B[s], slope)
        through += np.einsum("c,n,cj->cnj", delta[s], B[s], eye)
        through += np.einsum("c,nj->cnj", delta[s] * x[s], w["x_proj_B"].values)
        step = through.reshape(n_channels * n_states, n_channels)
        for t in range(s + 1, query + 1):
            step = np.diag(np.exp(A * delta[t][:, None]).ravel()) @ step
        dy = np.einsum("n,cnj->cj", C[query], step.reshape(n_channels, n_states, n_channels))
        if s == query:
            dy = dy + np.diag(D) + np.einsum("cn,nj->cj", h[query], w["x_proj_C"].values)
        moved = gate[query][:, None] * (dy @ dx[s])
        if s == query:
            y = (h[query] * C[query]).sum(-1) + D * x[query]
            moved = moved + (y * dgate[query])[:, None] * w["in_proj_z"].values
        found[s] = np.linalg.norm(out @ moved, axis=1)
    size = np.linalg.norm(found, axis=1)
    return size / size.sum()


def test_the_next_row_stands_for_another_input():
    shares = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    assert core.spread(shares).tolist() == [0.5, 1.0, 0.5]
    assert np.isnan(core.spread(shares[:1])).all()


def test_sizes_far_below_a_square_keep_their_slope():
    size = np.exp(-2.0 * np.arange(300))
    assert core.slope(core.norm(np.stack([size, size])), np.arange(300), 4, None)[0] == pytest.approx(-2.0, rel=1e-9)


def test_wrong_requests_are_refused():
    model = language_model("mamba")
    with mp.attach(model) as probe:
        trace = probe.record(ids())
        found = probe.jacobian(ids(), layer=0, query_tokens=[9])
        remembered = remembrance(probe, ids(), starts=[0, 4])
    cases = [
        ({"train_length": 4}, "train_length is the tokens of a row of training, at least 8; got 4"),
        ({"query_tokens": [32]}, r"query_tokens must lie in 0 \.\. 31, the shortest row's positions; got \[32\]"),
        ({"query_tokens": np.array([[3], [4]])}, "distinct positions .* the same in every row"),
        ({"lags": (5, 5)}, r"lags must run from a shorter to a longer one; got \(5, 5\)"),
        ({"lags": (-1, None)}, r"lags is \(first, last\), tokens between"),
        ({"theta": 1.0}, r"theta is a share above 0 and below 1; got 1\.0"),
        ({"top": 0.0}, "top is a share above 0"),
        ({"weights": 1}, "receptive_field.measure does not use weights"),
        ({"jacobian": trace}, "jacobian needs what probe.jacobian returned; got a Dataset of "),
        ({"jacobian": []}, "jacobian is an empty list"),
        ({"jacobian": found.assign_attrs(layer=7)}, r"jacobian is of layers \[7\]; the trace holds \[0\]"),
        ({"jacobian": found.assign_attrs(model_hash="x")}, "jacobian is of another model: model_hash x"),
        ({"jacobian": found.drop_vars("position")}, r"and the coordinate `position`"),
        ({"jacobian": [found, found]}, r"jacobian is of layers \[0, 0\]; the trace holds \[0\], each once"),
        ({"jacobian": found.drop_attrs()}, "jacobian does not say its layer"),
        ({"remembrance": found}, "remembrance needs what probe.remembrance returned, over .batch, start.; got a Data"),
        ({"remembrance": remembered.assign_attrs(model_hash="x")}, "remembrance is of another model"),
        ({"baseline": trace.isel(batch=[0])}, r"baseline needs the trace's layers \[0\] and its rows and tokens"),
    ]
    for given, text in cases:
        with pytest.raises(ValueError, match=text):
            receptive_field.measure(trace, **given)
    gaps = trace.isel(token=[0, 2, 3])
    with pytest.raises(ValueError, match="not contiguous"):
        receptive_field.measure(gaps)


def test_layers_of_different_requests_are_not_joined():
    with mp.attach(language_model("mamba", 2)) as probe:
        trace = probe.record(ids())
        both = [probe.jacobian(ids(), layer=layer, query_tokens=[at]) for layer, at in ((0, 9), (1, 8))]
        one = probe.jacobian(ids(), layer=1, query_tokens=[9])
    with pytest.raises(ValueError, match="its layers differ in their rows or in the tokens asked for"):
        receptive_field.measure(trace, jacobian=both)
    result = receptive_field.measure(trace, jacobian=one, n_bootstrap=2)
    assert np.isnan(result["layer_block_slope"].values).tolist() == [True, False]
    assert result.attrs["jacobian"].endswith("not of layer(s) [0]")


def test_what_was_not_given_is_named(recorded):
    _, trace, _ = recorded
    result = receptive_field.measure(trace.drop_vars("u"), n_bootstrap=2)
    left = result.attrs["left_out"].split("; ")
    assert [part.split(":")[0] for part in left] == [
        "train_mean_distance and collapse_ratio", "global_share and train_retention", "token_distance_u",
        "block_profile, block_spread and block_slope", "remembrance", "baseline",
    ]  # fmt: skip
    short = receptive_field.measure(trace, train_length=64, n_bootstrap=2)
    assert "global_share and train_retention: rows of 32 tokens" in short.attrs["left_out"]
    assert np.isnan(short["layer_train_mean_distance"].values[0]).tolist() == [False, False, True, True, True]
    for name, values in result.data_vars.items():
        assert values.attrs["long_name"], name
        assert values.attrs["units"], name
    for name in ("analysis", "estimator", "null", "interval", "reduces_over", "n_rows", "model"):
        assert result.attrs[name], name


def test_a_twin_is_measured_alike(recorded):
    _, trace, _ = recorded
    result = receptive_field.measure(trace, train_length=TRAINED, baseline=trace, n_bootstrap=20)
    names = [name for name in result if str(name).startswith("baseline_layer_")]
    assert len(names) == 3 * 8
    for name in names:
        np.testing.assert_array_equal(result[name], result[str(name).removeprefix("baseline_")])
    assert result.attrs["baseline"] == trace.attrs["model"]


def asked_at(trace, positions):
    """The trace of a task that asks each row at its own positions."""
    role = np.full(trace["valid"].shape, "filler", dtype=object)
    for row, at in enumerate(positions):
        role[row, at] = "query"
    return trace.assign_coords(role=(("batch", "token"), role.astype(str)))


def test_prefixes_of_a_task_end_where_it_asks(recorded):
    """Each row at its own token and with its own length, rows that have both ends only: against the explicit matrix."""
    _, trace, weights = recorded
    size = np.abs(np.stack([by_impulses(trace, weights, row) for row in range(3)]))
    lag = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    distance = (np.einsum("ts,rtsh->rth", lag, size) / size.sum(axis=2)).mean(axis=2)
    given = asked_at(trace, [[12, 14, 19, 30], [20, 25], [7, 13]])
    result = receptive_field.measure(given, train_length=TRAINED, n_bootstrap=2, baseline=trace)
    assert result["prefix_role"].values.tolist() == ["", "query", "query", "query", ""]
    np.testing.assert_allclose(result["prefix_length"], [np.nan, 8, (15 + 21 + 14) / 3, (31 + 26) / 2, np.nan])
    pairs = {0.5: ([(2, 7)], [(2, 13)]), 2.0: ([(0, 30), (1, 25)], [(0, 14), (1, 20)])}
    for fraction, (ends, trained) in pairs.items():
        far, near = (np.mean([distance[of] for of in asked]) for asked in (ends, trained))
        alike = np.mean([at for _, at in ends]) / np.mean([at for _, at in trained])
        one = result.sel(fraction=fraction)
        np.testing.assert_allclose(one["layer_collapse_ratio"], far / near / alike, rtol=1e-6)
        np.testing.assert_allclose(one["layer_train_mean_distance"], far, rtol=1e-6)
        assert one["n_rows_collapse_ratio"].item() == len(ends)
    np.testing.assert_array_equal(result["baseline_layer_collapse_ratio"], result["layer_collapse_ratio"])
    assert result["n_rows_train_mean_distance"].values[0].tolist() == [0, 1, 3, 2, 0]
    assert result.attrs["beyond"] == "no row is asked near 0.25, 4 of train_length"
    assert result.attrs["prefixes"].startswith("end at the asked token nearest to each length, within a factor of sqr")
    assert result.attrs["prefixes"].endswith("rows 0.25: 0, 0.5: 1, 1: 3, 2: 2, 4: 0")


def test_a_task_that_asks_once_is_read_at_positions_whose_roles_are_named(recorded):
    _, trace, _ = recorded
    plain = receptive_field.measure(trace, train_length=TRAINED, n_bootstrap=2)
    result = receptive_field.measure(asked_at(trace, [[31], [31], [30]]), train_length=TRAINED, n_bootstrap=2)
    np.testing.assert_array_equal(result["layer_collapse_ratio"], plain["layer_collapse_ratio"])
    assert plain.attrs["prefixes"] == "end at the same position in every row"
    roles = "0.25: filler; 0.5: filler; 1: filler; 2: filler, query"
    assert result.attrs["prefixes"] == f"end at the same position in every row; roles there: {roles}"
    assert result.attrs["beyond"] == plain.attrs["beyond"] == "rows of 32 tokens end before 4 of train_length"


def test_two_rows_have_a_spread_and_no_interval_of_it(recorded):
    """Both rows' values are the one distance between them, so that a bootstrap would give it as both ends."""
    _, trace, _ = recorded
    for n_rows, known in ((2, False), (3, True)):
        result = receptive_field.measure(trace.isel(batch=slice(n_rows)), n_bootstrap=50)
        ends = [result[f"layer_mixer_spread{end}"].item() for end in ("_low", "_high")]
        assert np.isfinite(result["layer_mixer_spread"].item())
        assert np.isfinite(ends).all() == known
        assert np.isfinite(result["layer_mixer_slope_low"].item())
        assert result["n_rows_mixer_spread"].item() == n_rows
    silent = trace["C"].copy()
    if "batch" in silent.dims:
        silent.values[:, 0] = 0
        result = receptive_field.measure(trace.assign(C=silent), n_bootstrap=50)
        assert result["n_rows_mixer_spread"].item() == 2, "a row that reads nothing has no profile"
        assert np.isnan(result["layer_mixer_spread_low"].item())
    assert "it covers .54 with 2 rows, .67 with 3, .79 with 4" in result.attrs["interval"]


def test_what_is_read_without_the_skip_says_so(recorded):
    _, trace, _ = recorded
    result = receptive_field.measure(trace, n_bootstrap=2)
    for name in ("layer_mixer_profile", "layer_mixer_spread", "layer_null_lti_mixer_spread"):
        assert "without the skip D" in result[name].attrs["long_name"], name
    assert "without the skip D" in result.attrs["reduces_over"]


def test_padding_changes_nothing():
    """Rows of unequal length, padded left: what is measured of the shared positions is that of each row alone."""
    model = language_model("mamba2")
    given, mask = ids(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :10] = 0
    with mp.attach(model) as probe:
        padded = probe.record(given, mask, variables=("delta", "A", "B", "C", "u", "out"))
        alone = [
            probe.record(one, variables=("delta", "A", "B", "C", "u", "out")) for one in (given[:1], given[1:, 10:])
        ]
    asked = {"query_tokens": [7, 15, 21], "train_length": 8, "n_bootstrap": 2}
    result = receptive_field.measure(padded, **asked)
    parts = [receptive_field.measure(one, **asked) for one in alone]
    for name in ("layer_mean_distance", "layer_token_distance_u", "layer_mixer_slope", "layer_mixer_profile"):
        mean = np.mean([part[name].values for part in parts], axis=0)
        np.testing.assert_allclose(result[name].values, mean, rtol=1e-6, err_msg=name)
    retained = sum(part["head_train_retention"] for part in parts) / 2
    xr.testing.assert_allclose(result["head_train_retention"], retained)
