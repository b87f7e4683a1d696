"""What the recall circuit cannot answer, it answers in words: what was needed, what came, what to do."""

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import recall_circuit

STEP = ("layer", "batch", "token")
EACH = ("batch", "token")


@pytest.fixture
def trace() -> xr.Dataset:
    """Two pairs and two queries, every answer right, in four channels of two states."""
    rng, size = np.random.default_rng(0), (1, 4, 6)
    data = {name: ((*STEP, "channel"), rng.uniform(0.1, 1, (*size, 4))) for name in ("delta", "x", "z")}
    data |= {name: ((*STEP, "group", "state"), rng.normal(size=(*size, 1, 2))) for name in ("B", "C")}
    data["A"] = (("layer", "channel", "state"), -np.ones((1, 4, 2)))
    target = np.tile([-1, -1, -1, -1, 7, 8], (4, 1))
    coords = {"role": np.tile(np.array(["key", "value", "key", "value", "query", "query"], dtype=object), (4, 1))}
    coords |= {"target": target, "prediction": target, "source_token": np.tile([-1, -1, -1, -1, 1, 3], (4, 1))}
    coords |= {"valid": target > -2, "position": np.tile(np.arange(6), (4, 1))}
    indexed = {name: (EACH, array) for name, array in coords.items()}
    return xr.Dataset(data, {"layer": [3], **indexed}, {"schema_version": 1, "family": "mamba"})


@pytest.fixture
def weights() -> xr.Dataset:
    rng, sizes = np.random.default_rng(1), {"channel": 4, "lag": 4, "state": 2, "model": 3, "vocab": 9}
    dims = {
        "conv": ("channel", "lag"), "x_proj_B": ("state", "channel"), "x_proj_C": ("state", "channel"),
        "D": ("channel",), "out_proj": ("model", "channel"),
    }  # fmt: skip
    data = {name: (("layer", *of), rng.normal(size=(1, *(sizes[dim] for dim in of)))) for name, of in dims.items()}
    data |= {"unembedding": (("vocab", "model"), rng.normal(size=(9, 3))), "norm_f": (("model",), np.ones(3))}
    return xr.Dataset(data, {"layer": [3]})


def edits() -> xr.Dataset:
    counts = {name: (("intervention",), [8, 8]) for name in ("n_correct", "n_query")}
    return xr.Dataset(counts, {"intervention": ["none", "ablate(conv)"]})


def test_what_fits_is_measured(trace: xr.Dataset, weights: xr.Dataset):
    found = recall_circuit.measure(trace, weights=weights, interventions=edits(), offsets=(0, 1))
    assert int(found.n_scored) == 8
    assert np.isfinite(found.value.isel(signature=(found.absent == "").values)).all()
    assert found.value.isel(signature=(found.absent != "").values).isnull().all()
    assert (found.absent != "").sum() == 7


BROKEN = {
    "no `prediction`.*Record the task with a language model": lambda trace: trace.drop_vars("prediction"),
    "lacks `x`.*Record again with variables=": lambda trace: trace.drop_vars("x"),
    "lacks `source_token`": lambda trace: trace.drop_vars("source_token"),
    "`target` must be given at every query; 8 of 8 lack it": lambda trace: trace.assign_coords(
        target=trace.target * 0 - 1
    ),
    "`prediction` must be given at every query": lambda trace: trace.assign_coords(prediction=trace.prediction * 0 - 1),
    "earlier token with the role value; query 4 of row 0 names 0": lambda trace: trace.assign_coords(
        source_token=trace.source_token * 0
    ),
    "row 0 has gaps": lambda trace: trace.isel(token=[0, 2, 4]),
    "sum over all 4 of `channel`; the trace holds 2": lambda trace: trace.isel(channel=slice(0, 2)),
    "at least two possible values; got .7.": lambda trace: trace.assign_coords(
        target=trace.target.where(trace.target < 0, 7)
    ),
    "`z` is NaN or infinite in layer 3, row 0": lambda trace: trace.assign(z=trace.z * np.nan),
    "needs dims": lambda trace: trace.rename(channel="head"),
    "schema_version": lambda trace: trace.drop_attrs(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_trace_that_does_not_fit(trace: xr.Dataset, weights: xr.Dataset, message: str):
    with pytest.raises(ValueError, match=message):
        recall_circuit.measure(BROKEN[message](trace), weights=weights)


OPTIONS = {
    "pass weights=probe.weights()": {"weights": None},
    "`offsets` must be distinct integers": {"offsets": (0, -1)},
    "and one at least": {"offsets": ()},
    "n_bootstrap must be at least 2; got 1": {"n_bootstrap": 1},
    "`values` must hold every target; it lacks .8.": {"values": [6, 7]},
    "below the 9 of `unembedding`; got 7 .. 19": {"values": range(7, 20)},
    "no query has two candidate writes before it at offset 200": {"offsets": (0, 200)},
    "baseline must be .trace, weights.": {"baseline": 3},
    'lack the intervention "none"': {"interventions": edits().isel(intervention=[1])},
    "interventions lack n_query": {"interventions": edits().drop_vars("n_query")},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_an_option_that_does_not_fit(trace: xr.Dataset, weights: xr.Dataset, message: str):
    with pytest.raises(ValueError, match=message):
        recall_circuit.measure(trace, **({"weights": weights, "offsets": (0, 1)} | OPTIONS[message]))


def test_weights_that_do_not_fit(trace: xr.Dataset, weights: xr.Dataset):
    with pytest.raises(ValueError, match=r"lack unembedding.*of a language model"):
        recall_circuit.measure(trace, weights=weights.drop_vars("unembedding"))
    with pytest.raises(ValueError, match=r"lack layer \[3\]"):
        recall_circuit.measure(trace, weights=weights.assign_coords(layer=[0]))
    with pytest.raises(ValueError, match="of another model: model_hash b"):
        recall_circuit.measure(trace.assign_attrs(model_hash="a"), weights=weights.assign_attrs(model_hash="b"))


def test_a_baseline_that_does_not_fit(trace: xr.Dataset, weights: xr.Dataset):
    options = {"weights": weights, "offsets": (0, 1)}
    with pytest.raises(ValueError, match="the baseline needs the same task: the trace has no task roles"):
        recall_circuit.measure(trace, **options, baseline=(trace.drop_vars("role"), weights))
    other = (trace.assign_coords(layer=[5]), weights.assign_coords(layer=[5]))
    with pytest.raises(ValueError, match=r"baseline has layers \[5\]; the trace has \[3\]"):
        recall_circuit.measure(trace, **options, baseline=other)


@pytest.mark.parametrize("name", ["in_proj_bias_x", "out_proj_bias"])
def test_projections_with_biases_are_refused_by_name(trace: xr.Dataset, weights: xr.Dataset, name: str):
    dim = "model" if name == "out_proj_bias" else "channel"
    weights[name] = (("layer", dim), np.zeros((1, weights.sizes[dim])))
    recall_circuit.measure(trace, weights=weights, interventions=edits())
    weights[name][0, 1] = 0.5
    with pytest.raises(ValueError, match=f"expected biases of zero, got {name}"):
        recall_circuit.measure(trace, weights=weights, interventions=edits())


def test_a_last_norm_that_subtracts_the_mean_is_refused(trace: xr.Dataset, weights: xr.Dataset):
    weights["norm_f_bias"] = (("model",), np.zeros(3))
    with pytest.raises(ValueError, match="expected `norm_f` alone, got `norm_f_bias`"):
        recall_circuit.measure(trace, weights=weights, interventions=edits())


def test_a_norm_before_the_gate_is_refused(trace: xr.Dataset, weights: xr.Dataset):
    weights["norm_before_gate"] = (("layer", "channel"), np.ones((1, weights.sizes["channel"])))
    with pytest.raises(ValueError, match="expected `norm` or none, got `norm_before_gate`"):
        recall_circuit.measure(trace, weights=weights, interventions=edits())
