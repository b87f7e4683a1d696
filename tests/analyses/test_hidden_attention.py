"""Hidden attention: against loops, derivatives of the scan and the models' own outputs; every mutation is caught."""

from collections import Counter

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention
from mamba_probe.analyses.hidden_attention import stream
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.kernels.scan import selective_scan

BLOCKS = {
    "mamba": lambda: MambaBlock(16, d_inner=24, d_state=4, dt_rank=2),
    "mamba2": lambda: Mamba2Block(16, n_heads=6, d_inner=24, d_state=4, n_groups=2),
    "s4d": lambda: S4DBlock(16, d_inner=24, d_state=4),
}
VARIABLES = ("delta", "A", "B", "C", "x", "y")
TOKENS, QUERIES = 23, (0, 7, 17)


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def recorded(request):
    """Trace and weights of two layers, perturbed; row 0 is padded on the left, row 1 on the right."""
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
        return probe.record(ids, attention_mask=mask, variables=VARIABLES), probe.weights()


def spread(trace, name, layer, row):
    """A variable of one row's valid tokens, float64, S4D's constants at every token."""
    array = trace[name].isel(layer=layer)
    if "token" in array.dims:
        return array.isel(batch=row).values[trace["valid"].values[row]].astype(np.promote_types(array.dtype, float))
    n_tokens = int(trace["valid"].values[row].sum())
    values = np.broadcast_to(array.values, (n_tokens, *array.shape))
    return values.astype(np.promote_types(values.dtype, float))


def by_loops(trace, layer, row, head, query):
    """Weights of each source: its write, decayed step by step with products, read by the query."""
    delta, B, C = (spread(trace, name, layer, row) for name in ("delta", "B", "C"))
    A = trace["A"].values[layer, head].astype(np.promote_types(trace["A"].dtype, float))
    group = head if trace.attrs["family"] == "s4d" else head // (delta.shape[1] // B.shape[1])
    weights = []
    for s in range(query + 1):
        step = delta[s, head]
        write = np.expm1(step * A) / A if trace.attrs["discretization"] == "zoh" else step
        state = write * B[s, group]
        for r in range(s + 1, query + 1):
            state = np.exp(delta[r, head] * A) * state
        read = np.sum(C[query, group] * state)
        weights.append(2 * read.real if np.iscomplexobj(A) else read)
    return np.array(weights)


def by_autograd(trace, layer, row, query):
    """(source, head): derivative of the scan's output at the query by its input, selection held fixed."""
    delta, B, C, x = (torch.tensor(spread(trace, name, layer, row))[None] for name in ("delta", "B", "C", "x"))
    A = torch.tensor(trace["A"].values[layer])
    A = A.to(torch.complex128 if A.is_complex() else torch.float64)
    x = (x[..., None] if x.ndim == 3 else x).clone().requires_grad_()
    rule = trace.attrs["discretization"]
    y = selective_scan(x, delta, A, B, C, discretization=rule, backend="naive").y
    return torch.autograd.grad(y[0, query, :, 0].sum(), x)[0][0, : query + 1, :, 0].numpy()


def rows_of(trace, result, layer, row, query):
    """The measured row (head, source) of valid tokens up to the query."""
    one = result["alpha"].isel(layer=layer, batch=row).sel(query_token=query).values
    return one[:, trace["valid"].values[row]][:, : query + 1]


def worst(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_rows_are_loops_and_derivatives_of_the_scan(recorded):
    trace, weights = recorded
    result = hidden_attention.measure(trace, query_tokens=QUERIES, aggregate="none", weights=weights)
    for layer, row, query in np.ndindex(2, 3, len(QUERIES)):
        found = rows_of(trace, result, layer, row, QUERIES[query])
        assert worst(found, by_autograd(trace, layer, row, QUERIES[query]).T) < 1e-6
        for head in (0, len(found) - 1):
            assert worst(found[head], by_loops(trace, layer, row, head, QUERIES[query])) < 1e-6
    padding = ~np.broadcast_to(trace["valid"].values[None, :, None, None], result["alpha"].shape)
    assert np.isnan(result["alpha"].values[padding]).all()
    later = (result["position"] > result["query_position"]) & result["valid"]
    assert (result["alpha"].where(later, 0.0) == 0).all()
    assert result["identity_error"].max() < 2e-6


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_either_write_rule_of_mamba_agrees_with_loops(rule):
    trace = synthetic(seed=4).assign_attrs(discretization=rule)
    result = hidden_attention.measure(trace, query_tokens=[30], aggregate="none")
    for layer, row, head in np.ndindex(2, 2, 6):
        assert worst(rows_of(trace, result, layer, row, 30)[head], by_loops(trace, layer, row, head, 30)) < 1e-6


def synthetic(n_rows=2, n_tokens=37, heads=6, seed=0, layers=2):
    rng = np.random.default_rng(seed)
    step = ("layer", "batch", "token")
    shape = (layers, n_rows, n_tokens)
    B, C = rng.standard_normal((2, *shape, 1, 4)).astype("float32")
    return xr.Dataset(
        {
            "delta": ((*step, "channel"), np.exp(rng.normal(-2, 1, (*shape, heads))).astype("float32")),
            "A": (("layer", "channel", "state"), -np.exp(rng.normal(-1, 1, (layers, heads, 4))).astype("float32")),
            "B": ((*step, "group", "state"), B),
            "C": ((*step, "group", "state"), C),
        },
        {
            "layer": np.arange(layers) * 3,
            "valid": (("batch", "token"), np.ones((n_rows, n_tokens), bool)),
            "position": (("batch", "token"), np.tile(np.arange(n_tokens), (n_rows, 1))),
        },
        {"schema_version": 1, "family": "mamba", "discretization": "euler", "model": "synthetic"},
    )


def swapped(trace):
    return trace.assign(B=trace["C"], C=trace["B"])


def shifted(trace):
    """x one token late."""
    return trace.assign(x=trace["x"].copy(data=np.roll(trace["x"].fillna(0.0).values, 1, axis=2)))


def unmasked(trace):
    """The left padding of row 0 taken for tokens, with what ordinary tokens hold."""
    trace = trace.isel(batch=[0])
    ones = xr.ones_like(trace["valid"])
    position = trace["position"].copy(data=np.tile(np.arange(trace.sizes["token"]), (trace.sizes["batch"], 1)))
    floats = {
        name: trace[name].fillna(trace[name].mean("token"))
        for name in trace.data_vars
        if "token" in trace[name].dims and trace[name].dtype.kind == "f"
    }
    return trace.assign(floats).assign_coords(valid=ones, position=position)


def other_rule(trace):
    return trace.assign_attrs(discretization={"euler": "zoh", "zoh": "euler"}[trace.attrs["discretization"]])


def from_narrow_decay(trace):
    """delta recovered from a decay of one step that was kept in bf16."""
    A = trace["A"].isel(state=0) if "state" in trace["A"].dims else trace["A"]
    A = A.real if np.iscomplexobj(A) else A
    decay = np.exp(trace["delta"] * A).transpose(*trace["delta"].dims)
    narrow = torch.tensor(decay.values).bfloat16().float().clamp(min=1e-30)
    return trace.assign(delta=(decay.copy(data=np.log(narrow.numpy())) / A).transpose(*trace["delta"].dims))


@pytest.mark.parametrize("mutate", [swapped, shifted, unmasked, other_rule, from_narrow_decay])
def test_the_identity_catches(recorded, mutate):
    trace, weights = recorded
    hidden_attention.measure(trace, query_tokens=[12, 17], weights=weights)
    if mutate is swapped and trace.attrs["family"] == "s4d":  # both constant: C exp(..) B does not tell them apart
        both = (hidden_attention.measure(one, query_tokens=[17])["alpha"] for one in (trace, swapped(trace)))
        np.testing.assert_allclose(*both)
        return
    with pytest.raises(ValueError, match=r"alpha . x \+ D x is not y: error .* in layer \d, row \d, at valid token"):
        hidden_attention.measure(mutate(trace), query_tokens=[12, 17], weights=weights)


def test_the_identity_says_why_it_was_not_measured(recorded):
    trace, weights = recorded
    for given, why in (
        ({"trace": trace.drop_vars("y"), "weights": weights}, "y not recorded"),
        ({"trace": trace.drop_vars(["x", "y"])}, "x and y not recorded"),
        ({"trace": trace}, r"D unknown: pass weights=probe.weights()"),
    ):
        result = hidden_attention.measure(**given)
        assert result["identity_error"].isnull().all()
        assert why in result.attrs["identity"]
    wrong = weights.assign(D=weights["D"] + 0.1)
    with pytest.raises(ValueError, match=r"tolerance 0\.0001"):
        hidden_attention.measure(trace, weights=wrong)
    with pytest.raises(ValueError, match="weights are of another model"):
        hidden_attention.measure(trace, weights=weights.assign_attrs(model_hash="0"))
    with pytest.raises(ValueError, match="weights lack D"):
        hidden_attention.measure(trace, weights=weights.drop_vars("D"))
    with pytest.raises(ValueError, match=r"weights lack layer \[1\]"):
        hidden_attention.measure(trace, weights=weights.sel(layer=[0]))
    with pytest.raises(ValueError, match="tolerance must be above 0; got 0"):
        hidden_attention.measure(trace, tolerance=0.0)


def test_small_blocks_chosen_heads_and_a_lazy_store_change_nothing(recorded, monkeypatch, tmp_path):
    trace, weights = recorded
    whole = hidden_attention.measure(trace, query_tokens=QUERIES, aggregate="none", weights=weights)
    mean = hidden_attention.measure(trace, query_tokens=QUERIES, weights=weights, normalise="absolute_share")
    dim = whole.attrs["head_dim"]
    some = hidden_attention.measure(trace, query_tokens=QUERIES, aggregate="none", weights=weights, heads=[5, 1])
    np.testing.assert_allclose(some["alpha"], whole["alpha"].sel({dim: [5, 1]}), rtol=1e-12)
    trace.probe.save(tmp_path / "run.zarr")
    lazy = mp.open_trace(tmp_path / "run.zarr")
    assert lazy["delta"].chunks is not None
    monkeypatch.setattr(stream, "BLOCK_BYTES", 8 * TOKENS * 8)
    other = hidden_attention.measure(lazy, query_tokens=QUERIES, weights=weights, normalise="absolute_share")
    xr.testing.assert_allclose(mean.drop_attrs(), other.drop_attrs(), rtol=1e-9)
    absolute = np.abs(whole["alpha"]).sum("token")
    shares = (whole["alpha"] / absolute).mean(dim, skipna=False)
    np.testing.assert_allclose(shares, mean["alpha"], atol=1e-12)


def test_a_time_invariant_layer_is_its_own_null(recorded):
    trace, _ = recorded
    result = hidden_attention.measure(trace, query_tokens=QUERIES)
    same = trace.attrs["family"] == "s4d"
    for null in ("null_lti_alpha", "null_shuffle_alpha"):
        assert bool(np.allclose(result["alpha"], result[null], rtol=1e-9, equal_nan=True)) == same
        if not same:
            gap = np.abs(result["alpha"] - result[null]).max("token") / np.abs(result["alpha"]).max("token")
            assert (gap.sel(query_token=[7, 17]) > 1e-3).all()


def test_the_frozen_null_is_the_layer_recorded_with_its_means(recorded):
    trace, _ = recorded
    means = {
        name: trace[name].mean("token").broadcast_like(trace[name]).where(trace["valid"]).transpose(*trace[name].dims)
        for name in ("delta", "B", "C")
        if "token" in trace[name].dims
    }
    result = hidden_attention.measure(trace, query_tokens=QUERIES, aggregate="none")
    frozen = hidden_attention.measure(trace.assign(means), query_tokens=QUERIES, aggregate="none")
    np.testing.assert_allclose(result["null_lti_alpha"], frozen["alpha"], rtol=2e-4, atol=1e-6)


def test_aggregates_and_signs():
    trace = synthetic()
    each = hidden_attention.measure(trace, query_tokens=[20], aggregate="none")["alpha"]
    for rule, wanted in {
        "signed_mean": each.mean("channel"),
        "mean_absolute": np.abs(each).mean("channel"),
        "l2": np.sqrt((each**2).sum("channel")),
    }.items():
        result = hidden_attention.measure(trace, query_tokens=[20], aggregate=rule)
        np.testing.assert_allclose(result["alpha"], wanted, rtol=1e-10, atol=1e-14)
        negative = result["aggregate_negative_share"]
        assert (negative > 0.2).all() if rule == "signed_mean" else (negative == 0).all()
        assert result.attrs["aggregate"] == rule
        assert (result["negative_share"] > 0).any(), "signs of heads stay visible under every aggregate"


def test_streams_hold_no_more_than_a_block(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 8 * 37 * 7)
    view = stream.Canonical(synthetic(heads=50), "delta", "A", "B", "C")
    sizes = [block.row.delta.nbytes for block in stream.blocks(view, 0, 0, [0], 0)]
    assert len(sizes) == 8
    assert max(sizes) == 8 * 37 * 7


@pytest.mark.parametrize(("most", "times"), [(100, {1}), (7, {1}), (4, {1, 2})])
def test_chunks_of_a_store_are_read_once_if_they_fit(most, times, monkeypatch):
    """Chunks of 6 heads, at most so many heads read at once, blocks of 4 worked on."""
    trace, read = synthetic(heads=20), Counter()
    delta = trace["delta"].values

    def chunk(block_id):
        read[block_id] += 1
        return delta[block_id[0], block_id[1], None, None, :, 6 * block_id[3] : 6 * block_id[3] + 6]

    chunks = ((1, 1), (1, 1), (37,), (6, 6, 6, 2))
    lazy = da.map_blocks(chunk, chunks=chunks, dtype="float32", meta=np.empty((0, 0, 0, 0), "float32"))
    monkeypatch.setattr(stream, "READ_BYTES", 8 * 37 * most)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 8 * 37 * 4)
    result = hidden_attention.measure(trace.assign(delta=(trace["delta"].dims, lazy)), query_tokens=[9, 30])
    assert len(read) == 16
    assert set(read.values()) == times
    monkeypatch.undo()
    xr.testing.assert_allclose(result, hidden_attention.measure(trace, query_tokens=[9, 30]), rtol=1e-12)
