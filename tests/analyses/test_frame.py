"""Results as tidy tables: every number once, beside its interval and its nulls."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import sinks, state_dynamics
from mamba_probe.analyses.common.frame import _grouped


@pytest.fixture(scope="module")
def trace():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=4, state_size=3, num_hidden_layers=2)).eval()
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    with mp.attach(model) as probe:
        return probe.record(ids, variables=["delta", "A", "B", "C", "x"], channels=[0, 1])


def entries(result):
    """Every entry of every variable: its name, its labels, its value."""
    for name, array in result.data_vars.items():
        for index in np.ndindex(array.shape):
            one = array[index]
            labels = {dim: array[dim].values[i] for dim, i in zip(array.dims, index, strict=True)}
            yield str(name), labels, one.item()


def columns_by_name(result):
    return {each: (base, column) for base, columns in _grouped(result).items() for column, each in columns.items()}


@pytest.mark.parametrize("analysis", [state_dynamics, sinks], ids=lambda a: a.__name__.split(".")[-1])
def test_every_number_is_there_once(trace, analysis):
    options = {"baseline": trace, "n_bootstrap": 2} if analysis is state_dynamics else {}
    result = analysis.measure(trace, **options)
    result = result.drop_vars([name for name in result.data_vars if result[name].size > 300])
    found = mp.to_dataframe(result)
    where = columns_by_name(result)
    assert set(where) == set(result.data_vars)
    seen = 0
    for name, labels, value in entries(result):
        base, column = where[name]
        rows = found[found["variable"] == base]
        for dim, label in labels.items():
            rows = rows[rows[dim] == label]
        assert len(rows) == result[base].size // result[name].size
        held = rows["text" if isinstance(value, str) else column]
        assert (held == value).all() or (held.isna().all() and np.isnan(value)), name
        seen += 1
    assert seen > 40
    assert len(found) == sum(result[base].size for base in dict.fromkeys(base for base, _ in where.values()))


def test_which_number_an_interval_and_a_null_belong_to():
    over = ("layer", np.arange(2.0))
    names = [
        "layer_gain", "layer_gain_low", "layer_gain_high", "layer_gain_p", "layer_null_gain", "layer_null_lti_gain_low",
        "baseline_layer_gain", "baseline_layer_null_shuffle_gain_high", "layer_gain_null_low", "layer_null_other",
        "value", "low", "null", "layer_gain_at_least", "low_pass",
    ]  # fmt: skip
    result = xr.Dataset(dict.fromkeys(names, over))
    assert columns_by_name(result) == {
        "layer_gain": ("layer_gain", "value"), "layer_gain_low": ("layer_gain", "low"),
        "layer_gain_high": ("layer_gain", "high"), "layer_gain_p": ("layer_gain", "p"),
        "layer_null_gain": ("layer_gain", "null"), "layer_null_lti_gain_low": ("layer_gain", "null_lti_low"),
        "baseline_layer_gain": ("layer_gain", "baseline"),
        "baseline_layer_null_shuffle_gain_high": ("layer_gain", "baseline_null_shuffle_high"),
        "layer_gain_null_low": ("layer_gain", "null_low"), "layer_null_other": ("layer_null_other", "value"),
        "value": ("value", "value"), "low": ("value", "low"), "null": ("value", "null"),
        "layer_gain_at_least": ("layer_gain_at_least", "value"), "low_pass": ("low_pass", "value"),
    }  # fmt: skip


def test_a_null_over_fewer_dimensions_stands_beside_each_and_one_over_more_by_itself():
    result = xr.Dataset(
        {
            "error": (("kernel", "fit"), [[1.0, 2.0], [3.0, 4.0]], {"units": "1"}),
            "null_error": ("kernel", [7.0, 8.0]),
            "error_high": (("kernel", "fit", "row"), np.ones((2, 2, 3))), "verdict": ("fit", ["good", "bad"]),
        },
        {"fit": ["a", "b"], "terms": ("fit", [1, 2])},
    )  # fmt: skip
    found = mp.to_dataframe(result)
    rows = found[found["variable"] == "error"]
    assert rows["null"].tolist() == [7.0, 7.0, 8.0, 8.0]
    assert rows["terms"].tolist() == [1, 2, 1, 2]
    assert (found["variable"] == "error_high").sum() == 12
    assert found[found["variable"] == "verdict"]["text"].tolist() == ["good", "bad"]
    assert found["units"].tolist()[:4] == ["1"] * 4
    assert found["terms"].dtype == "Int64"


def test_variables_by_name():
    result = xr.Dataset({"a": ("layer", [1.0]), "a_low": ("layer", [0.0]), "b": ((), 2)}, {"layer": [4]})
    found = mp.to_dataframe(result, "a")
    expected = pd.DataFrame({"variable": ["a"], "layer": [4], "value": [1.0], "low": [0.0], "units": [""]})
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert mp.to_dataframe(result, ["b", "a"])["variable"].tolist() == ["b", "a"]
    with pytest.raises(ValueError, match="unknown variable 'a_low': known are: a, b"):
        mp.to_dataframe(result, "a_low")


def test_a_comparison_is_a_result_too(trace):
    def measure(trace):
        return xr.Dataset({"layer_delta": trace["delta"].mean(("batch", "token", "channel"))})

    found = mp.compare(measure, {"one": trace, "other": trace}, n_bootstrap=8)
    table = mp.to_dataframe(found, "layer_delta")
    assert table["trace"].tolist() == ["one", "one", "other", "other"]
    assert table["layer"].tolist() == [0, 1, 0, 1]
    assert {"value", "low", "high"} <= set(table.columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda trace: trace, r"this is a trace, not a result: pass trace.probe.to_dataframe"),
        (lambda _: xr.Dataset({"h": ("state", [1j])}), "`h` holds complex numbers"),
    ],
    ids=["trace", "complex"],
)
def test_what_is_no_result_is_refused(trace, given, message):
    with pytest.raises(ValueError, match=message):
        mp.to_dataframe(given(trace))


def test_a_result_larger_than_memory_is_refused_with_its_size():
    result = xr.Dataset({"alpha": (("query", "key"), np.ones((30, 40)))})
    with pytest.raises(ValueError, match=r"1,200 rows weighs 57\.6 kB, .* max_memory is 60 kB"):
        mp.to_dataframe(result, max_memory="60kB")
    assert len(mp.to_dataframe(result)) == 1200
