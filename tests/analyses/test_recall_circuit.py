"""The recall circuit recovered from a closed-form MQAR block in float64 numpy, and absent where it is not."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import recall_circuit
from mamba_probe.analyses.recall_circuit.signatures import IDS

PAIRS, LENGTH, VOCAB, ROWS = 8, 48, 64, 6
KEYS = VOCAB // 2
CODE = np.array([[(mask >> bit) & 1 for bit in range(8)] for mask in range(256) if mask.bit_count() == 4], float)[:KEYS]
DATA = ("delta", "A", "B", "C", "x", "z")


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def task(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Pairs, then filler among which every key is asked once, at an even distance."""
    rng = np.random.default_rng(seed)
    ids, source = np.zeros((rows, LENGTH), int), np.full((rows, LENGTH), -1)
    role, target = np.full((rows, LENGTH), "filler", dtype=object), np.full((rows, LENGTH), -1)
    for row in range(rows):
        keys, values = 1 + rng.permutation(KEYS - 1)[:PAIRS], KEYS + rng.permutation(KEYS)[:PAIRS]
        at = 2 * PAIRS + 2 * rng.permutation((LENGTH - 2 * PAIRS) // 2)[:PAIRS]
        ids[row, 0 : 2 * PAIRS : 2], ids[row, 1 : 2 * PAIRS : 2], ids[row, at] = keys, values, keys
        role[row, 0 : 2 * PAIRS : 2], role[row, 1 : 2 * PAIRS : 2], role[row, at] = "key", "value", "query"
        target[row, at], source[row, at] = values, np.arange(1, 2 * PAIRS, 2)
    return {"token_id": ids, "role": role, "target": target, "source_token": source}


def planted(offset: int = 0) -> dict[str, np.ndarray]:
    """One-hot keys in 32 states, values as 4-of-8 codes; the pair is written `offset` tokens after its value."""
    n, d = KEYS, CODE.shape[1]
    key, value = np.eye(n, n + d), np.eye(d, n + d, k=n)
    conv = np.zeros((2 * n + d, 4))
    conv[:n, 1 + offset], conv[n : 2 * n, 0], conv[2 * n :, offset] = 1.0, 1.0, 1.0
    gate = np.vstack([np.zeros((2 * n, n + d)), 4.0 * np.ones((d, n)) @ key])
    scale = 1 / (silu(1.0) ** 3 * silu(4.0))
    embedding = np.zeros((VOCAB, n + d))
    embedding[1:KEYS, :n], embedding[KEYS:, n:] = np.eye(n)[1:], CODE
    return {
        "in_proj_x": np.vstack([key, key, value]), "in_proj_z": gate, "conv": conv, "conv_bias": np.zeros(2 * n + d),
        "x_proj_dt": np.zeros((1, 2 * n + d)), "x_proj_B": np.eye(n, 2 * n + d), "x_proj_C": np.eye(n, 2 * n + d, k=n),
        "dt_proj": np.zeros((2 * n + d, 1)), "dt_bias": np.full(2 * n + d, np.log(np.e - 1)),
        "A": np.full((2 * n + d, n), -np.exp(-40.0)), "D": np.zeros(2 * n + d),
        "out_proj": np.hstack([np.zeros((n + d, 2 * n)), scale * value.T]),
        "embedding": embedding, "unembedding": np.where(np.arange(VOCAB)[:, None] < KEYS, 0.0, embedding),
        "norm_f": np.ones(n + d),
    }  # fmt: skip


def random(seed: int, model: int = 64, state: int = 16) -> dict[str, np.ndarray]:
    """Mamba's standard initialisation, embeddings as after an RMS norm."""
    rng, inner, rank = np.random.default_rng(seed), 2 * model, model // 16

    def uniform(*shape: int, fan: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape) / np.sqrt(fan)

    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), inner))
    embedding = rng.normal(size=(VOCAB, model))
    return {
        "in_proj_x": uniform(inner, model, fan=model), "in_proj_z": uniform(inner, model, fan=model),
        "conv": uniform(inner, 4, fan=4), "conv_bias": uniform(inner, fan=4),
        "x_proj_dt": uniform(rank, inner, fan=inner), "x_proj_B": uniform(state, inner, fan=inner),
        "x_proj_C": uniform(state, inner, fan=inner), "dt_proj": uniform(inner, rank, fan=rank),
        "dt_bias": np.log(np.expm1(step)), "A": -np.tile(np.arange(1.0, state + 1), (inner, 1)), "D": np.ones(inner),
        "out_proj": uniform(model, inner, fan=inner), "embedding": embedding, "unembedding": embedding,
        "norm_f": np.ones(model),
    }  # fmt: skip


def run(weights: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """The whole block by its recurrence, in float64."""
    u = weights["embedding"][ids]
    x, z = u @ weights["in_proj_x"].T, u @ weights["in_proj_z"].T
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    taps = [weights["conv"][:, lag] * padded[:, 3 - lag : padded.shape[1] - lag] for lag in range(4)]
    x = silu(sum(taps) + weights["conv_bias"])
    B, C = x @ weights["x_proj_B"].T, x @ weights["x_proj_C"].T
    delta = np.logaddexp(0, x @ weights["x_proj_dt"].T @ weights["dt_proj"].T + weights["dt_bias"])
    h, y = np.zeros((len(ids), *weights["A"].shape)), np.zeros_like(x)
    for t in range(ids.shape[1]):
        step = delta[:, t, :, None]
        h = np.exp(step * weights["A"]) * h + step * x[:, t, :, None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + weights["D"] * x[:, t]
    out = (y * silu(z)) @ weights["out_proj"].T
    return {"delta": delta, "B": B[..., None, :], "C": C[..., None, :], "x": x, "z": z, "out": out}


DIMS = {"B": ("group", "state"), "C": ("group", "state"), "out": ("model",)}


def record(layers: list[dict[str, np.ndarray]], asked: dict[str, np.ndarray], left: int = 0) -> xr.Dataset:
    """A trace of independent blocks as layers, the last of which speaks; `left` tokens of padding."""
    runs = [run(weights, asked["token_id"]) for weights in layers]
    pad, shift = ((0, 0), (left, 0)), np.where(asked["source_token"] >= 0, left, 0)
    coords = {name: np.pad(array, pad, constant_values=-1) for name, array in asked.items() if name != "role"}
    coords |= {"source_token": np.pad(asked["source_token"] + shift, pad, constant_values=-1)}
    coords |= {"role": np.pad(asked["role"], pad, constant_values="")}
    coords |= {"prediction": np.pad((runs[-1]["out"] @ layers[-1]["unembedding"].T).argmax(-1), pad)}
    coords |= {"position": np.pad(np.tile(np.arange(LENGTH), (len(shift), 1)), pad, constant_values=-1)}
    coords |= {"valid": coords["position"] >= 0}
    data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "A": (("layer", "channel", "state"), np.stack([weights["A"] for weights in layers]))
    }
    for name in runs[0]:
        stacked = np.stack([values[name] for values in runs])
        wide = ((0, 0), (0, 0), (left, 0), *((0, 0),) * (stacked.ndim - 3))
        dims = ("layer", "batch", "token", *DIMS.get(name, ("channel",)))
        data[name] = (dims, np.pad(stacked, wide, constant_values=np.nan))
    indexed = {name: (("batch", "token"), array) for name, array in coords.items()}
    return xr.Dataset(
        data, {"layer": 3 + 2 * np.arange(len(layers)), **indexed}, {"schema_version": 1, "family": "mamba"}
    )


NAMES = {
    "conv": ("channel", "lag"), "x_proj_B": ("state", "channel"), "x_proj_C": ("state", "channel"), "D": ("channel",),
    "out_proj": ("model", "channel"),
}  # fmt: skip


def weigh(layers: list[dict[str, np.ndarray]]) -> xr.Dataset:
    data = {name: (("layer", *dims), np.stack([one[name] for one in layers])) for name, dims in NAMES.items()}
    data |= {
        "unembedding": (("vocab", "model"), layers[-1]["unembedding"]),
        "norm_f": (("model",), np.ones(len(layers[-1]["norm_f"]))),
    }
    return xr.Dataset(data, {"layer": 3 + 2 * np.arange(len(layers))})


@pytest.fixture(scope="module")
def trace() -> xr.Dataset:
    return record([planted()], task())


@pytest.fixture(scope="module")
def weights() -> xr.Dataset:
    return weigh([planted()])


@pytest.fixture(scope="module")
def result(trace: xr.Dataset, weights: xr.Dataset) -> xr.Dataset:
    return recall_circuit.measure(trace, weights=weights)


def at(result: xr.Dataset, name: str, variable: str = "value", layer: int = 0) -> float:
    return float(result[variable].sel(signature=name).isel(layer=layer))


DIAGNOSTIC = ("S1", "S2", "S2_sum", "S3", "S4", "S5", "S6", "S7", "S9", "S10_rel", "S10_C0")


def test_the_planted_circuit_is_recovered_exactly(result: xr.Dataset):
    assert bool(result.solved)
    assert float(result.accuracy) == 1.0
    assert int(result.n_scored) == ROWS * PAIRS
    for name in DIAGNOSTIC:
        assert at(result, name) == pytest.approx(1.0, abs=1e-12), name
    assert result.offset.values.tolist() == [0]
    assert at(result, "S8") == pytest.approx(0.0, abs=1e-12)
    assert result.verdict.startswith("recall circuit in layer 3, written at the value")
    assert float(result.identity_error[0]) < 1e-12


def test_nulls_are_chance_and_lie_far_below(result: xr.Dataset):
    expected = {"S1": 1 / PAIRS, "S3": 1 / float(result.n_values), "S6": 1 / PAIRS, "S7": PAIRS / LENGTH,
                "S9": 2 * PAIRS / LENGTH, "S10_rel": 3 / 16, "S10_C0": 1 / 4,
                "S5": 1 / PAIRS - (PAIRS - 1) / PAIRS}  # fmt: skip
    for name, null in expected.items():
        assert at(result, name, "null") == pytest.approx(null, abs=1e-12), name


def test_intervals_hold_the_value_and_static_signatures_have_none(result: xr.Dataset):
    assert at(result, "S1", "low") == at(result, "S1", "high") == 1.0
    assert np.isnan(at(result, "S10_rel", "low"))
    assert "bootstrap over prompts" in result.interval


@pytest.mark.parametrize("offset", [1, 2])
def test_a_late_write_is_found_at_its_offset(offset: int):
    weights = planted(offset)
    found = recall_circuit.measure(record([weights], task()), weights=weigh([weights]))
    assert found.offset.values.tolist() == [offset]
    exact = [name for name in DIAGNOSTIC if name != "S2_sum" or offset < 2]  # two tokens on is the next pair's value
    assert [at(found, name) for name in exact] == pytest.approx([1.0] * len(exact), abs=1e-12)
    missed = recall_circuit.measure(record([weights], task()), weights=weigh([weights]), offsets=(0,))
    assert at(missed, "S1") == at(missed, "S3") == 0.0
    assert "no layer shows" in missed.verdict


def test_the_layer_that_recalls_is_flagged():
    quiet = {name: array * (0.0 if name == "out_proj" else 1.0) for name, array in planted().items()}
    layers = [quiet, planted()]
    found = recall_circuit.measure(record(layers, task()), weights=weigh(layers))
    assert found.strongest.values.tolist() == [False, True]
    assert "layer 5" in found.verdict
    assert at(found, "S1", layer=0) == 0.0
    assert at(found, "S1", layer=1) == 1.0


def test_a_random_twin_is_near_the_null(trace: xr.Dataset, weights: xr.Dataset):
    found = []
    for seed in range(5):
        twin = [random(seed)]
        other = record(twin, task(seed))
        refused = recall_circuit.measure(other, weights=weigh(twin))
        assert not bool(refused.solved)
        found.append(recall_circuit.measure(trace, weights=weights, baseline=(other, weigh(twin))).baseline)
    mean = xr.concat(found, "seed").mean("seed").isel(layer=0)
    assert float(mean.sel(signature="S1")) <= 0.3
    assert float(mean.sel(signature="S3")) <= 0.12
    assert float(mean.sel(signature="S9")) == pytest.approx(2 * PAIRS / LENGTH, abs=0.12)
    assert float(mean.sel(signature="S10_rel")) == pytest.approx(0.19, abs=0.05)


def test_wrong_answers_are_no_circuit(trace: xr.Dataset, weights: xr.Dataset):
    wrong = trace.assign_coords(
        prediction=xr.where(trace.batch < 4, trace.prediction * 0, trace.prediction).T.transpose("batch", "token")
    )
    refused = recall_circuit.measure(wrong, weights=weights)
    assert not bool(refused.solved)
    assert np.isnan(refused.value).all()
    assert not refused.strongest.any()
    assert refused.verdict.startswith("no circuit: accuracy 0.33, lower bound 0.22 <= .5")


@pytest.mark.parametrize(("n_correct", "solved"), [(30, False), (31, True)])
def test_the_gate_is_the_lower_bound_and_not_the_accuracy(
    trace: xr.Dataset, weights: xr.Dataset, n_correct: int, solved: bool
):
    """Of 48 queries 30 right are .625 of them, with a lower bound of .484; with 31 it is .504."""
    prediction = np.where(trace.target >= 0, trace.target, 0)
    asked = np.argwhere(trace.target.values >= 0)
    prediction[tuple(asked[n_correct:].T)] = 0
    found = recall_circuit.measure(
        trace.assign_coords(prediction=(("batch", "token"), prediction)), weights=weights, interventions=edits()
    )
    assert int(found.n_correct) == n_correct
    assert bool(found.solved) == (float(found.accuracy_low) > 0.5) == solved
    assert float(found.accuracy) > 0.6
    assert np.isfinite(found.causal_share).all() == solved
    assert np.isfinite(at(found, "S1")) == solved


def test_right_answers_without_the_circuit_are_said_to_be_that():
    other = record([random(0)], task())
    lucky = other.assign_coords(prediction=other.target.where(other.target >= 0, 0))
    found = recall_circuit.measure(lucky, weights=weigh([random(0)]))
    assert bool(found.solved)
    assert found.verdict.startswith("the task is solved, but no layer shows the key-value circuit; the nearest is")


def test_only_right_answers_are_scored(trace: xr.Dataset, weights: xr.Dataset):
    prediction = trace.prediction.values.copy()
    prediction[0] = -7
    swapped = trace.assign_coords(
        prediction=(("batch", "token"), np.where(prediction == -7, 0, prediction)),
        source_token=trace.source_token.where(
            trace.source_token < 0, xr.where(np.arange(ROWS)[:, None] == 0, 1, trace.source_token)
        ),
    )
    found = recall_circuit.measure(swapped, weights=weights)
    assert int(found.n_correct) == int(found.n_scored) == (ROWS - 1) * PAIRS
    assert at(found, "S1") == 1.0


def test_a_trace_without_a_task_says_so(trace: xr.Dataset):
    text = trace[["delta", "A", "B", "C"]].drop_vars(["role", "target", "source_token"])
    refused = recall_circuit.measure(text)
    assert not bool(refused.solved)
    assert refused.verdict.startswith("no task: the trace has no task roles")
    assert refused.value.shape == (len(IDS), 1)
    assert np.isnan(refused.value).all()
    assert np.isnan(float(refused.accuracy))


def test_left_pads_change_nothing(result: xr.Dataset, weights: xr.Dataset):
    padded = recall_circuit.measure(record([planted()], task(), left=5), weights=weights)
    xr.testing.assert_allclose(padded, result, rtol=1e-12)


def test_pads_of_a_random_layer_change_nothing(trace: xr.Dataset, weights: xr.Dataset):
    twin = [random(1)]
    plain, padded = (
        recall_circuit.measure(trace, weights=weights, baseline=(record(twin, task(), left=left), weigh(twin)))
        for left in (0, 7)
    )
    xr.testing.assert_allclose(padded, plain, rtol=1e-12)


def test_dask_gives_the_same(trace: xr.Dataset, weights: xr.Dataset, result: xr.Dataset):
    lazy = recall_circuit.measure(trace.chunk({"batch": 1, "layer": 1}), weights=weights.chunk())
    xr.testing.assert_identical(lazy, result)


def test_equal_seeds_give_equal_intervals(trace: xr.Dataset):
    noisy = planted()
    noisy["x_proj_C"] = noisy["x_proj_C"] + np.random.default_rng(0).normal(size=noisy["x_proj_C"].shape) * 0.15
    other = record([noisy], task()).assign_coords(prediction=trace.prediction)
    first, second = (recall_circuit.measure(other, weights=weigh([noisy]), seed=4) for _ in range(2))
    xr.testing.assert_identical(first, second)
    assert at(first, "S5", "low") < at(first, "S5") < at(first, "S5", "high")


def test_one_prompt_has_no_interval_and_says_so(trace: xr.Dataset, weights: xr.Dataset):
    one = recall_circuit.measure(trace.isel(batch=[0]), weights=weights)
    assert np.isnan(one.low).all()
    assert one.interval.startswith("none: fewer than two")
    assert "recall circuit" in one.verdict


def edits() -> xr.Dataset:
    along = ("intervention",)
    return xr.Dataset(
        {"n_correct": (along, [48, 2, 48]), "n_query": (along, [48, 48, 48])},
        {"intervention": ["none", "ablate(conv)", "ablate(gate)"]},
    )


def test_causal_share_of_each_edit(trace: xr.Dataset, weights: xr.Dataset, result: xr.Dataset):
    found = recall_circuit.measure(trace, weights=weights, interventions=edits())
    chance = float(found.chance)
    assert found.intervention.values.tolist() == ["ablate(conv)", "ablate(gate)"]
    assert found.causal_share.values == pytest.approx([(1 - 2 / 48) / (1 - chance), 0.0])
    assert (found.causal_low <= found.causal_share).all()
    assert (found.causal_share <= found.causal_high).all()
    assert "causal_share" not in result
    assert result.causal_estimator.startswith("none: interventions=")


def test_values_set_the_chance(trace: xr.Dataset, weights: xr.Dataset):
    found = recall_circuit.measure(trace, weights=weights, values=range(KEYS, VOCAB))
    assert float(found.chance) == at(found, "S3", "null") == 1 / KEYS
    assert at(found, "S3") == 1.0


@pytest.fixture
def drawn(trace: xr.Dataset, weights: xr.Dataset):
    matplotlib.use("Agg")
    baseline = (record([random(0)], task()), weigh([random(0)]))
    shown = recall_circuit.measure(trace, weights=weights, interventions=edits(), baseline=baseline)
    figure, ax = plt.subplots()
    yield shown, recall_circuit.plot(shown, ax), ax
    plt.close(figure)


def test_plot_draws_what_was_measured_on_the_axes_given(drawn):
    shown, axes, given = drawn
    assert axes is given
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "pair accuracy  S1"
    assert labels[-2:] == ["ablate(conv)", "ablate(gate)"]
    assert not [label for label in labels if "S8" in label]
    lines = {line.get_label(): line.get_xdata() for line in axes.get_lines()}
    kept = shown.sel(signature=list(DIAGNOSTIC)).isel(layer=0)
    assert lines["measured, 95 % interval"].tolist() == kept.value.values.tolist()
    assert lines["chance"].tolist() == kept.null.values.tolist()
    assert lines["randomised twin"].tolist() == kept.baseline.values.tolist()
    assert lines["causal share, 95 % interval"].tolist() == shown.causal_share.values.tolist()


def test_plot_of_no_circuit_says_why_and_an_unknown_layer_is_answered(drawn, trace: xr.Dataset):
    shown, _, ax = drawn
    with pytest.raises(ValueError, match=r"layer 9 is not in the result; it holds \[3\]"):
        recall_circuit.plot(shown, ax, layer=9)
    ax.clear()
    recall_circuit.plot(recall_circuit.measure(trace.drop_vars("role")), ax)
    assert [ax.texts[0].get_text(), "no task roles" in ax.texts[1].get_text().replace("\n", " ")] == ["No task", True]
    assert not ax.lines
