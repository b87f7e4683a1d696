"""State dynamics against what a scan does: impulses through it, states it held, and numbers known in closed form."""

from functools import partial

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon, state_dynamics
from mamba_probe.analyses.state_dynamics import core, stream
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.kernels.scan import selective_scan

BLOCKS = {
    "mamba": lambda: MambaBlock(16, d_inner=24, d_state=4, dt_rank=2),
    "mamba2": lambda: Mamba2Block(16, n_heads=6, d_inner=24, d_state=4, n_groups=2),
    "s4d": lambda: S4DBlock(16, d_inner=24, d_state=4),
}
TOKENS = 23
measure = partial(state_dynamics.measure, n_bootstrap=2)


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def recorded(request):
    """A trace with x and h of two layers, perturbed; row 0 is padded on the left, row 1 on the right."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = LanguageModel([BLOCKS[request.param](), BLOCKS[request.param]()], vocab_size=61).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * (0.1 if "log" in name else 0.3)
    ids = torch.randint(1, 61, (3, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, -5:] = 0, 0
    with mp.attach(model) as probe:
        return probe.record(ids, attention_mask=mask, variables=("delta", "A", "B", "C", "x", "h"))


def planted(delta, A, B, C, x=None):
    """A Mamba-1 trace of one layer: delta, x (batch, token, channel), A (channel, state), B, C (batch, .., state)."""
    place = ("layer", "batch", "token")
    variables = {
        "delta": ((*place, "channel"), np.asarray(delta, float)[None]),
        "A": (("layer", "channel", "state"), np.asarray(A, float)[None]),
        "B": ((*place, "group", "state"), np.asarray(B, float)[None, ..., None, :]),
        "C": ((*place, "group", "state"), np.asarray(C, float)[None, ..., None, :]),
    }
    if x is not None:
        variables["x"] = ((*place, "channel"), np.asarray(x, float)[None])
    shape = np.shape(delta)[:2]
    coords = {
        "layer": [0],
        "valid": (("batch", "token"), np.ones(shape, bool)),
        "position": (("batch", "token"), np.broadcast_to(np.arange(shape[1]), shape)),
    }
    return xr.Dataset(variables, coords, {"schema_version": 1, "family": "mamba", "discretization": "euler"})


def even(n_rows, n_tokens, n_channels=1, delta=1.0, decay=-1e-12, x=None):
    """One state a channel, delta constant, B = C = 1."""
    one = np.ones((n_rows, n_tokens, 1))
    return planted(np.full((n_rows, n_tokens, n_channels), delta), np.full((n_channels, 1), decay), one, one, x)


def spread(trace, name, layer, row):
    """A variable of a row's valid tokens as tensors, a batch of one; float64; S4D's constants at every token."""
    array = trace[name].isel(layer=layer)
    n_tokens = int(trace["valid"].values[row].sum())
    if "token" in array.dims:
        values = array.isel(batch=row).values[trace["valid"].values[row]]
    else:
        values = np.broadcast_to(array.values, (n_tokens, *array.shape))
    return torch.tensor(values.astype(np.promote_types(values.dtype, float)))[None]


def mixing(trace, layer, row):
    """T (head, query, source): what the scan answers to an impulse at each source."""
    delta, B, C = (spread(trace, name, layer, row) for name in ("delta", "B", "C"))
    A = torch.tensor(trace["A"].values[layer])
    A = A.to(torch.complex128 if A.is_complex() else torch.float64)
    n_tokens, n_heads = delta.shape[1:]
    x = torch.zeros(n_tokens, n_tokens, n_heads, 1, dtype=torch.float64)
    x[range(n_tokens), range(n_tokens)] = 1
    delta, B, C = (values.expand(n_tokens, *values.shape[1:]).contiguous() for values in (delta, B, C))
    made = selective_scan(x, delta, A, B, C, discretization=trace.attrs["discretization"], backend="naive")
    return made.y[..., 0].permute(2, 1, 0).numpy()


def entropy_size(values):
    p = values / values.sum()
    return np.exp(-np.sum(p[p > 0] * np.log(p[p > 0])))


def test_the_effective_size_is_that_of_the_mixing_matrix(recorded):
    """Every split of every row, against the singular values of the whole block of impulse responses."""
    heads = [0, 1, 5]
    splits = [[1, 2, 9, 16], [3, 1, 11, 17], [1, 7, 12, 22]]
    found = measure(recorded, every=5, at=splits, heads=heads, tolerance=1e-4)
    for layer, row in np.ndindex(2, 3):
        T = mixing(recorded, layer, row)
        B, C = (np.abs(spread(recorded, n, layer, row).numpy()[0]) for n in "BC")
        groups = np.arange(T.shape[0]) if B.shape[1] == T.shape[0] else np.arange(T.shape[0]) * B.shape[1] // T.shape[0]
        delta = spread(recorded, "delta", layer, row).numpy()[0]
        pair = 2 if recorded.attrs["family"] == "s4d" else 1
        for query, at in enumerate(splits[row]):
            for i, head in enumerate(heads):
                values = np.linalg.svd(T[head, at:, :at], compute_uv=False)
                reads, writes = (np.sqrt((of[:, groups[head]] ** 2).sum(-1)) for of in (C[at:], B[:at]))
                floor = 1e-4 * pair * reads.max() * (writes * delta[:at, head]).max()
                here = found.isel(dict(zip(found["ess_rank"].dims, (layer, row, query, i), strict=True)))
                np.testing.assert_allclose(here["ess_entropy"].item(), entropy_size(values), rtol=1e-6)
                assert here["ess_rank"].item() == (values > floor).sum()
                assert here["ess_entropy"].item() <= int(found.attrs["n_states"]) * (1 + 1e-12)


def test_the_null_is_the_layer_with_its_means(recorded):
    """Measured as executed on a trace whose delta, B and C are replaced by their means over each row's valid tokens."""
    frozen = recorded.copy()
    for name in ("delta", "B", "C"):
        if "token" in recorded[name].dims:
            known = recorded[name].astype(float).where(recorded["valid"])
            frozen[name] = known.mean("token").broadcast_like(known).transpose(*known.dims)
    null, executed = measure(recorded, every=5), measure(frozen, every=5)
    for name in ("ess_entropy", "ess_rank"):
        np.testing.assert_allclose(null[f"null_lti_{name}"], executed[name], rtol=1e-9)
        np.testing.assert_allclose(executed[f"null_shuffle_{name}"], executed[name], rtol=1e-9)
    for name in ("closed", "held", "erased"):
        np.testing.assert_allclose(null[f"null_lti_{name}_share"], executed[f"{name}_share"])
    if recorded.attrs["family"] != "s4d":
        assert (abs(null["null_shuffle_ess_entropy"] - null["ess_entropy"]) > 1e-3).any()


def test_a_complex_state_counts_for_two():
    generator = np.random.default_rng(0)
    trace = planted(np.full((1, 40, 2), 0.1), np.zeros((2, 1)), np.ones((1, 40, 1)), np.ones((1, 40, 1)))
    A = (-0.3 + 1j * generator.uniform(5, 9, (1, 2, 1))).astype(complex)
    constant = (("layer", "channel", "state"), np.ones((1, 2, 1), complex))
    trace = trace.drop_vars(["delta", "A", "B", "C"]).assign(
        delta=(("layer", "channel"), np.full((1, 2), 0.1)), A=(("layer", "channel", "state"), A), B=constant, C=constant
    )
    found = measure(trace.assign_attrs(family="s4d", discretization="zoh"), at=[20], every=8)
    assert found.attrs["n_states"] == "2"
    assert (found["ess_rank"] == 2).all()
    assert ((found["ess_entropy"] > 1.5) & (found["ess_entropy"] <= 2)).all()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_tiles_and_blocks_change_nothing(family, monkeypatch):
    torch.manual_seed(0)
    with mp.attach(BLOCKS[family]()) as probe:
        trace = probe.record(torch.randn(2, 100, 16), variables=("delta", "A", "B", "C", "x"))
    whole = measure(trace, every=30, at=[3, 50, 97])
    monkeypatch.setattr(stream, "TILE", 64)
    monkeypatch.setattr(stream, "READ_BYTES", 2**14)
    cut = measure(trace.chunk(token=60), every=30, at=[3, 50, 97])
    for name in whole.data_vars:
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-9, atol=1e-12, err_msg=str(name))


def test_long_rows_neither_overflow_nor_lose_what_is_left(monkeypatch):
    """Fast states die within a tile, a slow one lasts; sources that are gone are not formed, and nothing changes."""
    generator = np.random.default_rng(0)
    n_tokens, A = 1200, np.array([[-40.0, -3.0, -1e-3]])
    B, C = generator.standard_normal((2, 1, n_tokens, 3))
    trace = planted(np.exp(generator.normal(-1, 1, (1, n_tokens, 1))), A, B, C)
    T = mixing(trace, 0, 0)[0]
    values = np.linalg.svd(T[600:, :600], compute_uv=False)
    formed = []
    exact = core.written
    monkeypatch.setattr(stream, "TILE", 3 * 60)
    monkeypatch.setattr(core, "written", lambda *given: formed.append(len(given[0])) or exact(*given))
    found = measure(trace, at=[600])
    np.testing.assert_allclose(found["ess_entropy"].item(), entropy_size(values), rtol=1e-6)
    formed.clear()
    fast = trace.assign(A=trace["A"] * 1e4)
    measure(fast, at=[600])
    assert sum(formed) < 3 * 600, "three kinds, each short of the whole row"


def test_singular_values_known_in_closed_form():
    """Token s writes state s, token 4 + s reads it: the block is diagonal, its values 3, 1, 1 and 0."""
    write = np.zeros((1, 8, 4))
    write[0, range(4), range(4)] = [3, 1, 1, 0]
    read = np.zeros((1, 8, 4))
    read[0, range(4, 8), range(4)] = 1
    trace = planted(np.ones((1, 8, 1)), np.full((1, 4), -1e-12), write, read)
    found = measure(trace, every=4, at=[4, 2, 6])
    p = np.array([3, 1, 1]) / 5
    expected = [np.exp(-np.sum(p * np.log(p))), 4 / 3**0.75, 1.0]
    np.testing.assert_allclose(found["ess_entropy"].values.ravel(), expected, rtol=1e-9)
    assert found["ess_rank"].values.ravel().tolist() == [3, 2, 1]


def test_of_a_block_that_nothing_passes_both_sizes_are_0():
    trace = planted(np.ones((1, 8, 1)), -np.ones((1, 2)), np.zeros((1, 8, 2)), np.ones((1, 8, 2)))
    found = measure(trace, every=4)
    assert found["ess_entropy"].item() == found["ess_rank"].item() == 0


def test_the_states_are_those_that_the_scan_held(recorded):
    """Recomputed from delta, A, B and x, against the states as recorded; and moments against a loop over samples."""
    as_recorded = measure(recorded, every=4)
    computed = measure(recorded.drop_vars("h"), every=4)
    assert as_recorded.attrs["states"] == "as recorded"
    assert computed.attrs["states"].startswith("computed")
    for name in ("state_mean", "state_variance", "state_rms", "layer_rms"):
        largest = np.abs(as_recorded[name]).max().item()
        np.testing.assert_allclose(computed[name], as_recorded[name], atol=1e-6 * largest, rtol=0, err_msg=name)
    h, valid = recorded["h"], recorded["valid"].values
    for layer, sample in np.ndindex(2, as_recorded.sizes["sample_token"]):
        at = as_recorded["sample_token"].values[sample]
        rows = [h.isel(layer=layer, batch=b).values[valid[b]] for b in range(3) if valid[b].sum() > at]
        held = [row[at].reshape(row.shape[1], -1) for row in rows]
        pairs = [np.concatenate([one, one.conj()], axis=1) for one in held]  # a real state twice: nothing changes
        for name, of in (
            ("state_mean", lambda one: one.mean(1).real),
            ("state_variance", lambda one: one.var(1)),
            ("state_rms", lambda one: np.sqrt((np.abs(one) ** 2).mean(1))),
        ):
            wanted = np.mean([of(one) for one in pairs], axis=0)
            np.testing.assert_allclose(as_recorded[name].values[layer, sample], wanted, rtol=1e-5, atol=1e-9)


def test_the_null_reads_the_same_tokens_in_another_order(recorded):
    """Each token's delta, B and x move together: what a layer that forgets nothing ends with is the same."""
    still = recorded.drop_vars("h").assign(A=recorded["A"] * 1e-12)
    found = measure(still, every=1)
    last = found.sizes["sample_token"] - 1
    wanted = np.sqrt((found["state_rms"].isel(sample_token=last) ** 2).mean(str(found["state_rms"].dims[-1])))
    np.testing.assert_allclose(found["layer_null_order_rms"].isel(sample_token=last), wanted, rtol=1e-9)
    early = found[["layer_rms", "layer_null_order_rms"]].isel(sample_token=3)
    assert (abs(early["layer_rms"] / early["layer_null_order_rms"] - 1) > 1e-3).any()


def test_growth_is_that_of_what_is_read():
    generator = np.random.default_rng(0)
    shape = (2, 2048, 200)
    steady = np.ones((2, 2048, 1))
    noise = generator.standard_normal(shape)
    ramp = np.broadcast_to(np.arange(1.0, 2049)[None, :, None], steady.shape)
    like = measure(even(2, 2048, x=steady))
    np.testing.assert_allclose(like["growth"], 1, atol=1e-6)  # every write the same, none forgotten
    np.testing.assert_allclose(like["null_order_growth"], 1, atol=1e-6)
    unlike = measure(even(2, 2048, 200, x=noise))
    np.testing.assert_allclose(unlike["growth"].mean(), 0.5, atol=0.15)  # unrelated writes, none forgotten
    forgets = measure(even(2, 2048, decay=-0.1, x=steady))
    np.testing.assert_allclose(forgets["growth"], 0, atol=1e-6)  # forgetting balances writing
    drifts = measure(even(2, 2048, decay=-0.1, x=ramp))
    np.testing.assert_allclose(drifts["growth"], 1, atol=0.02)  # the inputs themselves grow ..
    assert abs(drifts["null_order_growth"]).max() < 0.35  # .. and in another order they do not
    np.testing.assert_allclose(forgets["layer_rms"].isel(sample_token=-1), 1 / (1 - np.exp(-0.1)), rtol=1e-9)


def test_the_lyapunov_exponent_is_the_decay_of_a_long_product(recorded):
    found = measure(recorded, every=5)
    horizon = memory_horizon.measure(recorded, n_bootstrap=2)
    np.testing.assert_allclose(found["lyapunov"].values.reshape(horizon["lyapunov"].shape), horizon["lyapunov"])
    np.testing.assert_allclose(found["half_life"].values.reshape(horizon["half_life"].shape), horizon["half_life"])
    total, tokens = np.zeros(1), 0
    for row in range(3):
        delta = spread(recorded, "delta", 0, row).numpy()[0]
        step = np.exp(delta[..., None] * recorded["A"].values[0].reshape(delta.shape[1], -1).astype(complex))
        total, tokens = total + np.log(np.abs(np.prod(step, axis=0))), tokens + len(delta)
    np.testing.assert_allclose(found["lyapunov"].values[0].reshape(total.shape), total / tokens, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_at_the_default_init_the_first_state_halves_in_7_to_693_tokens(seed):
    """A = -1 there, and delta, before a token is selected, between 1e-3 and 1e-1."""
    torch.manual_seed(seed)
    block = MambaBlock(64, d_inner=512)
    with torch.no_grad():
        block.x_proj.weight.zero_()
    with mp.attach(block) as probe:
        trace = probe.record(torch.randn(2, 16, 64))
    first = measure(trace, every=4)["half_life"].isel(layer=0, state=0)
    assert first.min() > np.log(2) / 1e-1 * (1 - 1e-5)
    assert first.max() < np.log(2) / 1e-3 * (1 + 1e-5)
    assert first.min() < 8
    assert first.max() > 600, "both ends are come near to"


def test_steps_are_counted_as_saturated():
    """Closed where the slope of softplus, by autograd, is below eps; held and erased by exp(A delta) of every state."""
    raw = torch.linspace(-14, 12, 400, dtype=torch.float64, requires_grad=True)
    delta = torch.nn.functional.softplus(raw)
    (slope,) = torch.autograd.grad(delta.sum(), raw)
    delta = delta.detach().numpy()
    A, one = np.array([[-1e-3, -0.5], [-1.0, -8.0]]), np.ones((1, 400, 2))
    found = measure(planted(np.stack([delta, delta], 1)[None], A, one, one), saturation=1e-2)
    kept = np.exp(delta[:, None, None] * A)
    np.testing.assert_allclose(found["closed_share"].values[0], (slope.numpy() < 1e-2).mean())
    np.testing.assert_allclose(found["held_share"].values[0], (kept > 0.99).all(-1).mean(0))
    np.testing.assert_allclose(found["erased_share"].values[0], (kept < 0.01).all(-1).mean(0))
    assert found["erased_share"].values[0, 0] == 0 < found["erased_share"].values[0, 1]
    assert (found["null_lti_closed_share"] == 0).all()


def test_a_loss_that_rises_has_its_slope():
    trace = even(3, 1024, x=np.ones((3, 1024, 1)))
    loss = np.broadcast_to(2 + 0.25 * np.log2(np.arange(1, 1025)), (3, 1024)).copy()
    loss[:, -1] = np.nan  # the last token has no next one
    given = xr.Dataset({"loss": (("batch", "token"), loss)})
    found = state_dynamics.measure(trace, every=16, loss=given)
    np.testing.assert_allclose(found["loss_trend"], 0.25, atol=2e-3)
    assert abs(found["null_shuffle_loss_trend"].item()) < 0.2
    wanted = [np.nanmean(loss[:, k : k + 16]) for k in range(0, 1024, 16)]
    np.testing.assert_allclose(found["loss_by_position"], wanted)
    assert found["loss_trend_low"].item() <= found["loss_trend"].item() <= found["loss_trend_high"].item()


def unequal(lengths, levels, rise=0.0):
    """A trace whose rows end at their lengths, and their losses: each row's own level, a rise per doubling."""
    longest = max(lengths)
    trace = even(len(lengths), longest)
    trace["valid"] = ("batch", "token"), np.arange(longest) < np.array(lengths)[:, None]
    loss = np.array(levels)[:, None] + rise * np.log2(np.arange(1, longest + 1))
    return trace, xr.Dataset({"loss": (("batch", "token"), np.where(trace["valid"], loss, np.nan))})


def test_rows_of_unequal_length_and_flat_loss_have_no_trend():
    """Short rows of loss 1 end among long ones of loss 2: the mean rises where they end, no row does."""
    trace, loss = unequal([100] * 4 + [128] * 4, [1.0] * 4 + [2.0] * 4)
    found = state_dynamics.measure(trace, loss=loss)
    for name in ("loss_trend", "loss_trend_low", "loss_trend_high", "null_shuffle_loss_trend"):
        assert found[name].item() == 0, name
    late = found["loss_by_position"].values
    assert late[-1] > late[0], "the mean by position, of the rows that reach there, does rise"
    trace, loss = unequal([100] * 4 + [128] * 4, [1.0] * 4 + [2.0] * 4, rise=0.25)
    assert state_dynamics.measure(trace, loss=loss)["loss_trend"].item() == pytest.approx(0.25, rel=1e-9)


def test_a_trend_needs_three_losses_in_the_later_half_of_a_row():
    trace, loss = unequal([64, 64], [1.0, 3.0], rise=0.5)
    few = loss.where(np.isin(np.arange(64), [3, 40, 50]))
    assert np.isnan(state_dynamics.measure(trace, loss=few)["loss_trend"].item())
    more = loss.where(np.isin(np.arange(64), [3, 40, 50, 60]))
    assert state_dynamics.measure(trace, loss=more)["loss_trend"].item() == pytest.approx(0.5, rel=1e-9)


def test_heads_pool_tokens_and_layers_average_rows_and_both_are_said():
    """A closed step in each of 10 tokens of one row, none of the other's 90: 1/10 pooled, 1/2 by rows."""
    trace, _ = unequal([10, 90], [0.0, 0.0])
    trace["delta"][0, 0] = 1e-9
    found = state_dynamics.measure(trace, every=1, n_bootstrap=2)
    assert found["closed_share"].item() == pytest.approx(0.1)
    assert found["layer_closed_share"].item() == pytest.approx(0.5)
    assert "*_share by head: tokens of all rows pooled, a longer row" in found.attrs["reduces_over"]
    assert "other layer_*, shares too: mean over rows, each row alike" in found.attrs["reduces_over"]


def test_a_store_gives_the_same_as_memory(recorded):
    lazy = recorded.chunk({"token": 7, recorded["x"].dims[3]: 5})
    assert isinstance(lazy["x"].data, da.Array)
    xr.testing.assert_identical(measure(lazy, every=5), measure(recorded, every=5))


def test_a_layer_is_its_heads_and_an_interval_its_rows(recorded):
    found = state_dynamics.measure(recorded, every=5)
    for layer in range(2):
        for which in ("lyapunov", "half_life"):
            wanted = np.quantile(found[which].values[layer], (0.1, 0.5, 0.9), method="inverted_cdf")
            np.testing.assert_allclose(found[f"layer_{which}"].values[:, layer], wanted, rtol=1e-12)
        wanted = np.quantile(found["growth"].values[layer], (0.1, 0.5, 0.9), method="inverted_cdf")
        np.testing.assert_allclose(found["layer_growth"].values[:, layer], wanted)
    pooled = np.concatenate(
        [spread(recorded, "delta", 0, row).numpy()[0] for row in range(3)]
    )  # rows of unequal length
    middle = float(1 - np.exp(-np.median(pooled)))
    closed = state_dynamics.measure(recorded, every=5, saturation=min(middle, 0.49))["closed_share"]
    np.testing.assert_allclose(closed.values[0], (-np.expm1(-pooled) < min(middle, 0.49)).mean(0))
    assert 0.1 < closed.mean() < 0.9
    by_row = found["ess_entropy"].mean(found["ess_entropy"].dims[2:])
    np.testing.assert_allclose(found["layer_ess_entropy"], by_row.mean("batch"))
    states = {"mamba": 4, "mamba2": 4, "s4d": 8}[recorded.attrs["family"]]
    np.testing.assert_allclose(found["layer_ess_share"] * states, found["layer_ess_entropy"])
    two = state_dynamics.measure(recorded.isel(batch=[0, 2]), every=5)  # one draw in four takes a row twice
    rows = two["ess_entropy"].mean(two["ess_entropy"].dims[2:])
    np.testing.assert_allclose(two["layer_ess_entropy_low"], rows.min("batch"))
    np.testing.assert_allclose(two["layer_ess_entropy_high"], rows.max("batch"))


def test_every_number_says_what_it_is(recorded):
    loss = xr.Dataset({"loss": (("batch", "token"), np.ones(recorded["valid"].shape))})
    found = state_dynamics.measure(recorded, every=2, loss=loss, baseline=recorded)
    for name, values in found.data_vars.items():
        assert values.attrs["long_name"], name
        assert values.attrs["units"], name
    assert {"estimator", "null", "interval", "reduces_over", "n_rows", "model"} <= set(found.attrs)
    for name in ("ess_entropy", "half_life", "closed_share", "growth", "rms"):
        low, high = (found[f"layer_{name}_{end}"].values for end in ("low", "high"))
        assert (np.isnan(low) | (low <= high)).all()
        assert np.isfinite(low).any(), name
        np.testing.assert_array_equal(found[f"baseline_layer_{name}"], found[f"layer_{name}"])
    one = state_dynamics.measure(recorded.isel(batch=[0]), every=5)
    assert np.isnan(one["layer_ess_entropy_low"]).all()
    assert one.attrs["interval"].startswith("NaN: one row")
