"""Brute force, in loops and float64: what a token's input does to B, C and x; layers that add up; mutations caught."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import recall_circuit
from mamba_probe.analyses.recall_circuit.core import Questions
from mamba_probe.analyses.recall_circuit.static import layer_weights
from mamba_probe.analyses.recall_circuit.swaps import N_SWAPS, lag_swap

VARIABLES = ("delta", "A", "B", "C", "x", "z", "u", "out")
TASK = mp.tasks.mqar(batch=3, length=24, n_pairs=4, vocab=60, seed=1)
MIXERS = {
    "mamba": lambda: blocks.MambaBlock(12, d_inner=18, d_state=5),
    "mamba2": lambda: blocks.Mamba2Block(12, d_inner=18, n_heads=6, n_groups=2, d_state=5),
    "s4d": lambda: blocks.S4DBlock(12, d_inner=18, d_state=5),
}


def model_of(families, seed=0):
    """A float64 language model, every weight off its default."""
    torch.manual_seed(seed)
    model = blocks.LanguageModel([MIXERS[family]() for family in families], 60).double()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape).double() * (0.1 if "log" in name else 0.3)
    return model.eval()


def recorded(model, task=TASK):
    """Trace, every answer taken for right, and weights."""
    with mp.attach(model) as probe:
        trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
    return trace.assign_coords(prediction=trace.target.where(trace.target >= 0, 0)), weights


def silu(a):
    return a / (1 + np.exp(-a))


def looped_path(window, weights, name):
    """What one window of inputs, lag 0 first, makes of B, C or x, one feature and lag at a time."""
    in_proj, conv, bias, read = weights
    found = np.zeros(len(conv))
    for feature in range(len(conv)):
        total = bias[feature]
        for lag in range(conv.shape[1]):
            total += conv[feature, lag] * float(in_proj[feature] @ window[lag])
        found[feature] = silu(total)
    return found * read if read.ndim == 1 else read @ found


def by_name(weights, family):
    """in_proj, conv, bias and reader of B, C and x, named as the weights are."""
    get = {name: array.values[0].astype(float) for name, array in weights.items() if "layer" in array.dims and
           not np.iscomplexobj(array)}  # fmt: skip
    if family == "mamba2":
        out = (get["out_proj"] * get["norm"]).reshape(12, -1)
        flat = {
            n: get[n].reshape(-1, get[n].shape[-1])
            for n in get
            if n.startswith(("in_proj_", "conv_")) and get[n].ndim > 1
        }
        ones = np.ones(len(flat["conv_B"]))
        return {
            n: (flat[f"in_proj_{n}"], flat[f"conv_{n}"], get[f"conv_bias_{n}"].ravel(),
                np.sqrt((out**2).sum(0)) if n == "x" else ones) for n in "BCx"
        }  # fmt: skip
    read = {"x": np.sqrt((get["out_proj"] ** 2).sum(0))}
    read |= {"B": get["x_proj_B"], "C": get["x_proj_C"]} if family == "mamba" else {}
    return {name: (get["in_proj_x"], get["conv"], get["conv_bias"], rows) for name, rows in read.items()}


@pytest.mark.parametrize("family", MIXERS)
def test_lag_swaps_agree_with_loops(family):
    """S11: each lag's input in turn becomes another token's, and B, C and x are computed again from the start."""
    trace, weights = recorded(model_of([family]))
    u, n, width = trace.u.values[0, 0].astype(float), 24, 4
    role, asked_at = trace.role.values[0], np.flatnonzero(trace.role.values[0] == "query")
    pairs = np.flatnonzero(role == "value")
    asked = Questions(asked_at, trace.source_token.values[0, asked_at], 0 * asked_at, pairs, np.ones(n, bool))
    paths = layer_weights(weights, 0, family).paths
    found = lag_swap(lambda tokens: u[tokens], len(u), paths, asked, (0, 1), seed=3)
    distances = np.random.default_rng(3).permutation(np.arange(1, n))[:N_SWAPS]
    for offset in (0, 1):
        made_for = {"B": [offset + 1], "C": [0], "x": [offset] + [offset + 1] * (family == "s4d")}
        for j, (name, lags) in enumerate(made_for.items()):
            if name not in paths:
                assert np.isnan(found[offset, :, j]).all()
                continue
            given, change = by_name(weights, family)[name], np.zeros(width)
            for t in asked_at if name == "C" else pairs + offset:
                if t < width - 1:
                    continue
                window = [u[t - lag] for lag in range(width)]
                before = looped_path(window, given, name)
                for lag in range(width):
                    for distance in distances:
                        other = list(window)
                        other[lag] = u[(t - lag + distance) % n]
                        change[lag] += ((looped_path(other, given, name) - before) ** 2).sum()
            expected = [[change[lags].sum(), change.sum()], [len(lags) / width, 1.0]]
            np.testing.assert_allclose(found[offset, :, j], expected, rtol=1e-6)


def test_and_index_and_gate_correlation_agree_with_loops():
    """S12 and S13 over every key and value of the task, channel by channel."""
    trace, weights = recorded(model_of(["s4d"]))
    found = recall_circuit.measure(trace, weights=weights, offsets=(1,)).value.isel(layer=0).to_series()
    given, role, token = by_name(weights, "s4d")["x"], trace.role.values, trace.token_id.values
    nothing, unit = np.zeros(12), np.ones(18)
    embedded = {int(i): trace.u.values[0][token == i][0].astype(float) for i in np.unique(token)}
    keys, values, asked = (sorted(set(token[role == name].tolist())) for name in ("key", "value", "query"))

    def x(value, key):
        return looped_path([nothing, value, key, nothing], (*given[:3], unit), "x")

    index, correlation, weight = [], [], []
    gates = {i: silu(trace.z.values[0][(token == i) & (role == "query")].astype(float)).mean(0) for i in asked}
    grid = np.array([[x(embedded[v], embedded[k]) for v in values] for k in keys])
    for c in range(18):
        k, v = max(((k, v) for k in range(len(keys)) for v in range(len(values))), key=lambda at: preactivation(*at, c, given, keys, values, embedded))  # fmt: skip  # noqa: E501
        both, key, value, none = grid[k, v, c], x(nothing, embedded[keys[k]])[c], x(embedded[values[v]], nothing)[c], x(nothing, nothing)[c]  # fmt: skip  # noqa: E501
        index.append((both - key - value + none) / (abs(both - none) + abs(key - none) + abs(value - none)))
        weight.append(given[3][c] ** 2 * both**2)
        written = [grid[keys.index(i), v, c] for i in asked]
        correlation.append(np.corrcoef(written, [gates[i][c] for i in asked])[0, 1])
    assert found["S12"] == pytest.approx(np.average(index, weights=weight), abs=1e-6)
    assert found["S13"] == pytest.approx(np.average(correlation, weights=weight), abs=1e-6)


def preactivation(k, v, channel, given, keys, values, embedded):
    in_proj, conv = given[0][channel], given[1][channel]
    return conv[2] * (in_proj @ embedded[keys[k]]) + conv[1] * (in_proj @ embedded[values[v]])


@pytest.mark.parametrize("families", [["mamba", "mamba"], ["mamba2", "mamba2"], ["s4d", "s4d"]])
def test_the_layers_direct_attributions_add_up_to_the_logits(families):
    """Direct attribution: embedding + each layer's output, through the last norm at its frozen scale."""
    model = model_of(families)
    trace, weights = recorded(model)
    with torch.no_grad():
        logits = model(torch.tensor(TASK.input_ids)).logits.numpy()
        start = model.backbone.embeddings(torch.tensor(TASK.input_ids)).numpy()
    total = start + trace.out.values.astype(float).sum(0)
    direct = (total * weights.norm_f.values) @ weights.unembedding.values.T.astype(float)
    scale = np.sqrt((total**2).mean(-1, keepdims=True) + blocks.EPSILON)
    np.testing.assert_allclose(direct / scale, logits, atol=1e-4 * np.abs(logits).max())
    found = recall_circuit.measure(trace, weights=weights)
    assert found.identity_error.shape == (2,)
    assert found.identity_error.max().item() < 1e-6
    assert found.attrs["path"].startswith("direct attribution of each layer alone")
    assert found.verdict.endswith("; direct attribution of one of 2 layers")


@pytest.fixture(scope="module")
def planted():
    model = mp.constructions.mqar("mamba1", 30, 30).model
    return recorded(model)


def swapped(trace):
    return trace.assign(B=trace.C, C=trace.B)


def a_token_late(trace):
    return trace.assign(x=trace.x.roll(token=1))


def zoh_for_euler(trace):
    return trace.assign_attrs(discretization="zoh")


@pytest.mark.parametrize("mutate", [swapped, a_token_late])
def test_mutations_of_a_planted_circuit_are_caught(planted, mutate):
    trace, weights = planted
    whole = recall_circuit.measure(trace, weights=weights)
    broken = recall_circuit.measure(mutate(trace).drop_vars("u"), weights=weights, offsets=(0,))
    assert "recall circuit in layer 0" in whole.verdict
    assert "no layer shows" in broken.verdict
    assert broken.identity_error.item() > 0.1 > 1e-5 > whole.identity_error.item()


@pytest.mark.parametrize("mutate", [swapped, a_token_late, zoh_for_euler])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_mutations_of_any_model_are_caught_by_the_identity(family, mutate):
    trace, weights = recorded(model_of([family]))
    errors = [
        recall_circuit.measure(one.drop_vars("u"), weights=weights).identity_error.item()
        for one in (trace, mutate(trace))
    ]
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3


def test_an_input_that_does_not_give_x_is_refused(planted):
    trace, weights = planted
    with pytest.raises(ValueError, match=r"`u` of layer 0 and the weights give an x that is .* recorded under an edit"):
        recall_circuit.measure(trace.assign(u=trace.u.roll(token=1)), weights=weights)
    with pytest.raises(ValueError, match="has the mixer's input `u`, and weights lack in_proj_x"):
        recall_circuit.measure(trace, weights=weights.drop_vars("in_proj_x"))


@pytest.mark.parametrize("family", MIXERS)
def test_padding_on_the_left_changes_nothing_unless_its_mask_is_dropped(family):
    model, pad = model_of([family]), 5
    ids = np.pad(TASK.input_ids, ((0, 0), (pad, 0)), constant_values=3)
    mask = np.pad(np.ones_like(TASK.input_ids), ((0, 0), (pad, 0)))
    moved = {"role": np.pad(TASK.role, ((0, 0), (pad, 0)), constant_values="filler")}
    for name in ("target", "source_token"):
        array = getattr(TASK, name)
        moved[name] = np.pad(np.where((array >= 0) & (name == "source_token"), array + pad, array), ((0, 0), (pad, 0)), constant_values=-1)  # fmt: skip  # noqa: E501
    with mp.attach(model) as probe:
        weights = probe.weights()
        padded, unmasked = (probe.record(ids, one, variables=VARIABLES) for one in (mask, None))
    moved["prediction"] = np.maximum(moved["target"], 0)
    coords = {name: (("batch", "token"), array) for name, array in moved.items()}
    plain = recall_circuit.measure(recorded(model)[0], weights=weights, values=range(30, 60))
    with_mask, without = (
        recall_circuit.measure(one.assign_coords(coords), weights=weights, values=range(30, 60))
        for one in (padded, unmasked)
    )
    apart = [np.abs(one.value - plain.value).max().item() for one in (with_mask, without)]
    assert apart[0] < 1e-6
    assert apart[1] > 1e-3
