"""The ideal signatures that recall and induction models state, against what is measured on them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit
from mamba_probe.analyses.recall_circuit.core import Prompt, contribution, tap_mass
from mamba_probe.analyses.recall_circuit.signatures import IDS
from mamba_probe.constructions import induction, mqar, mqar_gated

TASK = mp.tasks.mqar(4, 48, 6, 64, seed=3)
HEAD_TASK = mp.tasks.induction(batch=12, length=48, vocab=8, occurrences=3)
MAMBA = ("mamba1", "mamba2")
CASES = {
    **{f"{m}, {code}": (mqar(m, 32, 32, code), TASK) for m in MAMBA for code in ("one-hot", "constant-weight")},
    **{f"{m}, random": (mqar(m, 32, 32, "random", bits=(32, 32), seed=0), TASK) for m in MAMBA},
    **{f"{m}, last": (mqar(m, 32, 32, writes="last"), TASK) for m in MAMBA},
    "mamba1, overwrite": (mqar(n_keys=32, n_values=32, writes="overwrite"), TASK),
    **{f"{m}, special": (induction("special", m, 8), HEAD_TASK) for m in MAMBA},
}  # fmt: skip
S4D = {code: mqar("s4d", 32, 32, code) for code in ("one-hot", "constant-weight")}
S4D["random"] = mqar("s4d", 32, 32, "random", bits=(16, 12), seed=0)
S4D_MODELS = [*S4D.values(), induction("special", "s4d", 8), induction("every", "s4d", 8)]


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    construction, task = CASES[request.param]
    with mp.attach(construction.model) as probe:
        return construction, task, probe.record(task, variables=("delta", "A", "B", "C", "x", "z")), probe.weights()


def test_the_analysis_measures_every_ideal(recorded):
    construction, _, trace, weights = recorded
    value = recall_circuit.measure(trace, weights=weights, offsets=(0,))["value"].isel(layer=0)
    stated = [name for name in construction.signatures if name in IDS]
    assert {"S3", "S7", "S9"} <= set(stated)
    assert "S8" not in stated
    for name in stated:
        assert value.sel(signature=name).item() == pytest.approx(construction.signatures[name], abs=1e-3), name


def prompt_of(trace, row):
    """The arrays of one row of the first layer, in the analysis's shapes."""
    get = {str(name): array.isel(layer=0).values for name, array in trace.data_vars.items()}
    row = {name: (array if name == "A" else array[row]).astype(float) for name, array in get.items()}
    if trace.attrs["family"] == "mamba":
        row |= {name: row[name][..., None] for name in "xz"}
    else:
        row["A"] = row["A"][:, None]
    order = ("delta", "A", "B", "C", "x", "z")
    return Prompt(**{name: row[name] for name in order}, cumulative=np.cumsum(row["delta"], axis=0))


def test_share_and_retention_of_what_a_query_reads(recorded):
    """S2 and S4, computed here apart from the analysis."""
    construction, task, trace, weights = recorded
    out = weights["out_proj"].isel(layer=0).values.reshape(weights.sizes["model"], -1)
    values = np.array(task.answers)
    found = {"S2": [], "S4": []}
    for row, t in zip(*np.nonzero(task.target >= 0), strict=True):
        prompt, source, t = prompt_of(trace, row), task.source_token[row, t], int(t)
        given = contribution(prompt, t, np.arange(t + 1)).reshape(t + 1, -1) @ out.T
        kept = contribution(replace(prompt, A=0 * prompt.A), t, np.array([source])).reshape(1, -1) @ out.T
        logits = [each @ weights["unembedding"].values[values].astype(float).T for each in (given, kept)]
        logits = [each - each.mean(1, keepdims=True) for each in logits]
        answer = np.abs(logits[0][:, task.target[row, t] - values[0]])
        found["S2"].append(answer[source] / answer.sum())
        found["S4"].append(np.linalg.norm(logits[0][source]) / np.linalg.norm(logits[1]))
    for name, each in found.items():
        if name in construction.signatures:
            assert each == pytest.approx(np.full(len(each), construction.signatures[name]), abs=1e-3), name
        else:
            assert np.mean(each) < 0.999, f"{name} has an ideal after all"


class Block:
    """What an S4D language model computes inside, from its weights and token ids, in float64."""

    def __init__(self, construction):
        of = {name: np.asarray(weight, float) for name, weight in construction.model.state_dict().items()}
        w = {name.removeprefix("backbone.layers.0.mixer."): weight for name, weight in of.items()}
        self.embedding, self.head = w["backbone.embeddings.weight"], w["lm_head.weight"]
        self.conv, self.bias = w["conv1d.weight"][:, 0, ::-1], w["conv1d.bias"]
        self.in_x, self.in_z = np.split(w["in_proj.weight"], 2)
        a, step = -np.exp(w["kernel.log_A_real"]), np.exp(w["kernel.log_dt"])[:, None]
        self.gain = (2 * w["kernel.C"][..., 0] * np.expm1(step * a) / a)[:, 0]  # of a write; nothing decays
        self.decay, self.out = (step * a)[:, 0], w["out_proj.weight"]

    def hidden(self, ids):
        taken = self.embedding[ids]
        return taken / np.sqrt((taken**2).mean(-1, keepdims=True) + 1e-5)

    def x(self, hidden):
        padded = np.concatenate([np.zeros_like(hidden[:3]), hidden]) @ self.in_x.T
        a = sum(self.conv[:, lag] * padded[3 - lag : len(padded) - lag] for lag in range(4)) + self.bias
        return a * expit(a)

    def gate(self, hidden):
        z = hidden @ self.in_z.T
        return z * expit(z)


def keys_and_values(construction):
    vocab = len(construction.model.backbone.embeddings.weight)
    if construction.name == "mqar":
        return range(1, vocab // 2), range(vocab // 2, vocab)
    return range(vocab if len(construction.channels) > vocab else 1), range(vocab)


def measured(construction, task):
    """S1, S2, S3, S4, S7 and S9 of every query."""
    block, found = Block(construction), []
    values = np.array(task.answers)
    for row, t in zip(*np.nonzero(task.target >= 0), strict=True):
        ids, v, source = task.input_ids[row], task.target[row, t] - values[0], task.source_token[row, t]
        x, gate = block.x(block.hidden(ids)), block.gate(block.hidden(ids))
        lag = t - np.arange(t + 1)[:, None]
        given = gate[t] * x[: t + 1] * block.gain * np.exp(block.decay * lag)
        logits = given @ block.out.T @ block.head[values].T
        logits -= logits.mean(1, keepdims=True)
        unfaded = (gate[t] * x[source] * block.gain) @ block.out.T @ block.head[values].T
        writes = np.flatnonzero(task.role[row] == "value")
        weight = (block.out**2).sum(0)
        energy, opened = (x**2 * weight).sum(1), (gate**2 * weight).sum(1)
        key = np.isin(task.role[row], ("key", "query"))
        answer = logits[:, v]
        found.append({
            "S1": writes[answer[writes].argmax()] == source,
            "S2": abs(answer[source]) / np.abs(answer).sum(),
            "S3": logits[source].argmax() == v,
            "S4": np.linalg.norm(logits[source]) / np.linalg.norm(unfaded - unfaded.mean()),
            "S7": energy[writes].sum() / energy.sum(),
            "S9": opened[key].sum() / opened.sum(),
        })  # fmt: skip
    return {name: np.mean([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize(("name", "task"), [*((code, TASK) for code in S4D), ("special", HEAD_TASK)])
def test_s4d_reads_and_writes_as_it_says(name, task):
    construction = S4D_MODELS[[*S4D, "special"].index(name)]
    asked = task if name != "special" else mp.tasks.induction(batch=12, length=48, vocab=8, occurrences=1)
    found = measured(construction, asked)
    for signature in set(found) & set(construction.signatures):
        assert found[signature] == pytest.approx(construction.signatures[signature], abs=1e-3), signature
    assert {"S3", "S4", "S7", "S9"} <= set(construction.signatures)


@pytest.mark.parametrize("construction", S4D_MODELS, ids=[*S4D, "special", "every"])
def test_s4d_takes_the_difference_of_two_lags(construction):
    """S10 from the taps; S11: no other lag's input changes x at a write."""
    block = Block(construction)
    taps = tap_mass(block.conv, (block.out**2).sum(0))
    ideal = construction.signatures
    assert taps[:2] == pytest.approx([ideal["S10_x0"], ideal["S10_x1"]], abs=1e-3)
    keys, values = keys_and_values(construction)
    pairs = [np.random.default_rng(seed).choice(tokens, 100) for seed, tokens in enumerate((keys, values))]
    hidden = block.hidden(np.stack(pairs, axis=1).ravel())
    x, other, change = block.x(hidden), hidden[::-1], np.zeros(4)
    for t in range(11, 190, 2):
        for lag in range(4):
            swapped = hidden[t - 3 : t + 1].copy()
            swapped[3 - lag] = other[t - lag]
            change[lag] += ((block.x(swapped)[-1] - x[t]) ** 2).sum()
    assert change[:2].sum() / change.sum() == pytest.approx(ideal["S11"], abs=1e-3)
    assert min(change[:2]) > 0.2 * change.sum()


@pytest.mark.parametrize("construction", S4D_MODELS, ids=[*S4D, "special", "every"])
def test_a_channel_is_the_and_of_a_key_and_a_value(construction):
    """S12 and S13 of every channel, at its best key and value, each of them there or not (no input)."""
    block, (keys, values) = Block(construction), keys_and_values(construction)
    hidden, nothing = block.hidden(np.arange(len(block.embedding))), np.zeros((1, block.embedding.shape[1]))
    x = np.array([[block.x(hidden[[key, value]])[-1] for value in values] for key in keys])
    key_alone = np.array([block.x(np.concatenate([hidden[[key]], nothing]))[-1] for key in keys])
    value_alone = np.array([block.x(np.concatenate([nothing, hidden[[value]]]))[-1] for value in values])
    neither, gate = block.x(np.repeat(nothing, 2, axis=0))[-1], block.gate(hidden[list(keys)])
    used = x.max((0, 1)) > 1
    assert used.sum() >= len(used) - 7, "the filler is a key of its own, of 7 value bits, that is never there"
    for channel in np.flatnonzero(used):
        key, value = np.unravel_index(x[..., channel].argmax(), x.shape[:2])
        both, none = x[key, value, channel], neither[channel]
        alone = np.array([key_alone[key, channel], value_alone[value, channel]])
        index = (both - alone.sum() + none) / (abs(both - none) + np.abs(alone - none).sum())
        assert index == pytest.approx(construction.signatures["S12"], abs=1e-3)
        if "S13" in construction.signatures and gate[:, channel].std():
            found = np.corrcoef(x[:, value, channel], gate[:, channel])[0, 1]
            assert found == pytest.approx(construction.signatures["S13"], abs=1e-3)


@pytest.mark.parametrize("code", ["one-hot", "constant-weight"])
def test_constant_weight_margin_is_at_least_one_over_w(code):
    """S5 has no ideal there but a floor."""
    construction = mqar("mamba1", 32, 32, code)
    with mp.attach(construction.model) as probe:
        trace, weights = probe.record(TASK, variables=("delta", "A", "B", "C", "x", "z")), probe.weights()
    margin = recall_circuit.measure(trace, weights=weights)["value"].sel(signature="S5").item()
    assert ("S5" in construction.signatures) == (code == "one-hot")
    assert margin >= (1 / 3 if code == "constant-weight" else 1) - 1e-6


def test_gated_recall_states_no_gate_energy():
    """Keys in the random filler open the gate as well."""
    construction = mqar_gated(8, 8, 2, 16)
    assert construction.states == [f"key {key}" for key in range(8)]
    assert construction.signatures == {name: 1.0 for name in mqar(n_keys=8, n_values=8).signatures if name != "S9"}


@pytest.mark.parametrize(("construction", "first"), [
    (mqar(n_keys=8, n_values=8), "key 0"),
    (mqar("mamba2", 8, 8, "constant-weight"), "key bit 0"),
    (mqar(n_keys=8, n_values=8, writes="overwrite"), "newest value"),
    (mqar("mamba2", 8, 8, "random", bits=(6, 5), seed=0), "key bit 0"),
    (induction(n_tokens=5), "newest token"),
    (induction("special", "mamba2", 5), "tokens, the older the fainter"),
], ids=str)  # fmt: skip
def test_a_label_for_each_state(construction, first):
    assert construction.states[0] == first
    assert len(construction.states) == construction.sizes["state"]
    assert construction.randomised(0).signatures == {}


def test_two_layers_label_the_state_of_each():
    assert induction("every", "mamba2", 5).states == ["unused", "newest token"]
