"""Runs beside one another: any analysis of them by `mp.compare`, and `mamba-probe compare`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.analyses import comparison, memory_horizon, recall_circuit, state_dynamics
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.cli import app
from mamba_probe.report import differences, labelled
from mamba_probe.run import Run, record_given
from mamba_probe.trace.store import open_dataset

TASK = mp.tasks.mqar(batch=6, length=32, n_pairs=4, vocab=256, seed=1)
NAMES = ("mamba1", "mamba2")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        record_given(mp.load(f"zoo:trained-mqar-{name}"), TASK).save(root / name)
    return root


@pytest.fixture(scope="module")
def runs(folders):
    return {name: Run.open(folders / name).with_model() for name in NAMES}


@pytest.mark.parametrize(
    "name",
    [
        "state_dynamics",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("memory_horizon", "hidden_attention", "sinks")),
    ],
)
def test_runs_are_compared_as_their_reports_measure_them(runs, name):
    variable = {
        "memory_horizon": "layer_forward_restricted_mean", "hidden_attention": "layer_entropy",
        "state_dynamics": "layer_held_share", "sinks": "effect_loss",
    }[name]  # fmt: skip
    select = (lambda found: found.sel({"class": ["role: value"]})) if name == "sinks" else None
    found = mp.compare(name, runs, variable=variable, n_bootstrap=20, select=select)
    of_run = analyses()[name].of_run
    for label, run in runs.items():
        rows = [of_run(run.isel(batch=[i]), 0) for i in range(6)]
        rows = rows if select is None else [select(row) for row in rows]
        mean = np.mean([row[variable].values for row in rows], axis=0)
        np.testing.assert_allclose(found[variable].sel(trace=label), mean, rtol=1e-12)
    gap = found[variable].sel(trace="mamba2") - found[variable].sel(trace="mamba1")
    np.testing.assert_allclose(found[f"{variable}_difference"].sel(other="mamba2"), gap, rtol=1e-9)
    assert found.attrs["paired_by"] == "token_id"


@pytest.mark.long
def test_a_circuit_is_pooled_over_rows_that_are_drawn(runs):
    traces = {label: {"trace": run.trace.compute(), "weights": run.weights} for label, run in runs.items()}
    pooled = mp.compare(recall_circuit, traces, variable="value", select=s3, resample="refit", n_bootstrap=8)
    for label in traces:
        whole = s3(recall_circuit.measure(**traces[label]))["value"]
        np.testing.assert_allclose(pooled["value"].sel(trace=label), whole)
    assert np.isfinite(pooled["value_difference"]).all()
    assert (pooled["value_difference_low"] <= pooled["value_difference"]).all()
    assert (pooled["value_difference"] <= pooled["value_difference_high"]).all()


def s3(result):
    return result.sel(signature=["S1", "S3"])[["value"]]


@pytest.mark.long
def test_traces_in_a_store_are_read_as_those_in_memory(runs):
    lazy = {label: run.trace for label, run in runs.items()}
    assert all(trace["delta"].chunks for trace in lazy.values())
    held = {label: trace.compute() for label, trace in lazy.items()}
    options = {"variable": "layer_forward_restricted_mean", "n_bootstrap": 20}
    one, other = (mp.compare(memory_horizon, of, **options) for of in (lazy, held))
    xr.testing.assert_identical(one, other)


def test_what_belongs_to_a_trace_is_taken_by_row_with_it(runs):
    """A baseline in a tuple with its weights, and by itself: row i of it goes with row i."""
    seen = []

    def measure(trace, baseline):
        twin, weights = baseline
        seen.append((trace["token_id"].values.tolist(), twin["token_id"].values.tolist(), "A" in weights))
        return xr.Dataset({"layer_gap": trace["delta"].mean() - twin["delta"].mean()})

    of = {label: {"trace": run.trace, "baseline": run.twin} for label, run in runs.items()}
    found = mp.compare(measure, of, n_bootstrap=20)
    assert all(own == twin and whole for own, twin, whole in seen)
    assert {len(own) for own, _, _ in seen} == {1}
    by_hand = [float(run.trace["delta"].mean() - run.twin[0]["delta"].mean()) for run in runs.values()]
    np.testing.assert_allclose(found["layer_gap"], by_hand, rtol=1e-5)
    beside = {label: {"trace": run.trace, "baseline": run.twin[0]} for label, run in runs.items()}
    assert "layer_ess_entropy" in mp.compare(state_dynamics, beside, variable="layer_ess_entropy", n_bootstrap=20)


def test_hidden_states_are_paired_by_prompt():
    states = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    traces = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        with mp.attach(mp.blocks.MambaBlock(16)) as probe:
            traces[str(seed)] = probe.record(states)
    found = mp.compare(memory_horizon, traces, variable="layer_forward_restricted_mean", n_bootstrap=20)
    assert found.attrs["paired_by"].startswith("prompt_id and valid")


@pytest.mark.parametrize(
    ("name", "change", "options", "match"),
    [
        ("memory_horizon", {}, {"level": 0.5}, "level: a run is measured as its report does"),
        ("lti_limits", {}, {}, "unknown analysis of a run 'lti_limits'"),
        ("memory_horizon", {"mamba2": None}, {}, "runs or to traces, not to both; 'mamba2' maps to Dataset"),
    ],
)
def test_what_runs_cannot_be_asked(runs, name, change, options, match):
    of = {label: run.trace if label in change else run for label, run in runs.items()}
    with pytest.raises(ValueError, match=match):
        mp.compare(name, of, **options)


def uneven(trace):
    """Means that all rows have, and one over as many lags as the row has pairs of tokens."""
    row = trace["row"].item()
    return xr.Dataset({"layer_mean": float(row), "layer_by_lag": ("lag", np.full(5 + row // 2, 1.0 + row))})


def test_what_is_unlike_in_some_rows_is_left_out_and_named_unless_it_was_asked_for():
    of = {name: xr.Dataset({"row": ("batch", range(4))}, {"prompt_id": ("batch", range(4))}) for name in NAMES}
    found = mp.compare(uneven, of, n_bootstrap=20)
    alone = mp.compare(uneven, of, variable="layer_mean", n_bootstrap=20)
    assert found.attrs["left_out"] == "layer_by_lag ('mamba1', row 2: 6 of `lag`, not 5)"
    assert alone.attrs["left_out"] == ""
    xr.testing.assert_equal(found, alone)
    assert found.attrs["n_comparisons"] == "1", "what is left out is not tested"
    with pytest.raises(comparison.Unlike, match=r"row 2.*layer_by_lag .6 of `lag`, not 5.; alike are layer_mean"):
        mp.compare(uneven, of, variable=["layer_by_lag", "layer_mean"], n_bootstrap=20)


def test_the_command_names_what_it_leaves_out(folders, tmp_path, monkeypatch):
    def of_run(run, seed):
        row = int((run.trace["token_id"].values == TASK.input_ids).all(1).argmax())
        return uneven(xr.Dataset({"row": row}))

    uneven_one = replace(analyses()["memory_horizon"], of_run=of_run)
    monkeypatch.setattr("mamba_probe.analyses.comparison.asking.analyses", lambda: {"memory_horizon": uneven_one})
    asked = ("compare", "memory_horizon", folders / "mamba1", folders / "mamba2", "-o", tmp_path)
    done = call(*asked)
    assert done.exit_code == 0, done.output
    assert "left out, unlike in the runs: layer_by_lag ('mamba1', row 2: 6 of `lag`, not 5)" in done.stdout
    assert "layer_by_lag" not in open_dataset(tmp_path / "memory_horizon.nc")
    refused = call(*asked, "--overwrite", "--variable", "layer_by_lag")
    assert refused.exit_code == 2
    assert "alike are none. Name others, --variable NAME" in refused.stderr
    assert "select=" not in refused.stderr


def test_a_run_that_lacks_something_is_named(runs):
    lone = Run(runs["mamba1"].trace.drop_vars("prediction"), runs["mamba1"].weights, xr.Dataset())
    with pytest.raises(ValueError, match=r"ablation needs token ids, and predictions.*, which 'without' has not"):
        mp.compare("ablation", {"with": runs["mamba1"], "without": lone})


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_draws_and_stores_what_differs(folders, tmp_path):
    asked = ("compare", "memory_horizon", folders / "mamba1", f"second={folders / 'mamba2'}")
    done = call(*asked, "--variable", "layer_forward_restricted_mean", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    stored = open_dataset(tmp_path / "memory_horizon.nc").load()
    assert stored["trace"].values.tolist() == ["mamba1", "second"]
    (row,) = differences(stored)
    assert row[:2] == ("layer_forward_restricted_mean layer 0", "second")
    assert all(cell in done.stdout for cell in row[1:5])
    assert "…" not in done.stdout, "cut"
    assert (tmp_path / "memory_horizon-layer_forward_restricted_mean.svg").exists()
    again = call(*asked, "-o", tmp_path)
    assert again.exit_code == 2
    assert "exists" in again.output


@pytest.mark.long
def test_too_many_differences_for_so_few_rows_are_said(folders, tmp_path):
    done = call("compare", "memory_horizon", folders / "mamba1", folders / "mamba2", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    stored = open_dataset(tmp_path / "memory_horizon.nc")
    floor = min(1.0, int(stored.attrs["n_comparisons"]) * 2 / 2**6)
    assert f"No adjusted p can be below {floor:.2g} here: name the variables that you mean" in said


def test_labels_that_are_numbers_are_in_order_and_the_first_given_is_the_reference(folders, tmp_path):
    given = (f"500={folders / 'mamba2'}", f"20={folders / 'mamba1'}")
    assert list(labelled(given)) == [500, 20]
    done = call("compare", "hidden_attention", *given, "--variable", "layer_entropy", "-o", tmp_path)
    assert done.exit_code == 0, done.output
    stored = open_dataset(tmp_path / "hidden_attention.nc")
    assert (stored["trace"].values.tolist(), stored.attrs["reference"]) == ([20, 500], "500")
    assert differences(stored)[0][1] == "20"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("compare", "memory_horizn", "{one}", "{two}"), "did you mean 'memory_horizon'"),
        (("compare", "memory_horizon", "{one}", "{one}"), "two runs have the label 'mamba1'"),
        (("compare", "memory_horizon", "{one}"), "two traces or more"),
        (("compare", "memory_horizon", "{one}", "absent"), "holds no run"),
        (("compare", "memory_horizon", "{one}", "{two}", "--resample", "often"), "unknown resample 'often'"),
    ],
)
def test_wrong_requests_end_with_2_and_one_message(folders, tmp_path, arguments, match):
    filled = [text.format(one=folders / "mamba1", two=folders / "mamba2") for text in arguments]
    done = call(*filled, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert match in done.output
    assert not (tmp_path / "out").exists()


def test_marks_say_of_which_reference(runs):
    found = mp.compare("memory_horizon", runs, variable="layer_forward_restricted_mean", n_bootstrap=20)
    texts = [text.get_text() for text in comparison.plot(found).get_legend().get_texts()]
    assert "not the reference's, mamba1 (Holm p < 0.05)" in texts
