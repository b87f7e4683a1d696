"""How the report finds analyses, what a run must have for each, and the model of a run that is opened again."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.analyses.common import analysis
from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, analyses
from mamba_probe.cli import app
from mamba_probe.report import MAIN, analyse, draw, finding, measurable
from mamba_probe.run import Run, Text, record_given, record_text

TASKS = {
    "mqar": lambda: mp.tasks.mqar(batch=2, length=16, n_pairs=2, vocab=32, seed=3),
    "induction": lambda: mp.tasks.induction(batch=2, length=16, vocab=32, seed=3),
    "keep_nth": lambda: mp.tasks.keep_nth(batch=2, length=16, n=4, n_tokens=16, seed=3),
}


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of two layers in a directory, which can be loaded by its path."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module", params=TASKS)
def stored(request, model, tmp_path_factory):
    task, folder = TASKS[request.param](), tmp_path_factory.mktemp("run")
    live = record_given(mp.load(model), task, train_length=12)
    live.save(folder)
    return task, live, Run.open(folder, load_models=True), folder


def test_every_folder_with_an_entry_is_an_analysis_and_says_what_it_is():
    known = analyses()
    assert set(MAIN) < set(known)
    assert list(known) == sorted(known)
    for name, each in known.items():
        assert each.title, name
        assert each.question.endswith("?"), name
        assert len(each.reading) > 80, name
        assert len(each.picture) > 80, name
    helped = " ".join(call("analyze", "--help").output.replace("│", " ").split())
    missing = [name for name in known if name not in helped]
    assert missing == [], "name them in the epilog of `analyze` in mamba_probe/cli.py"


def test_a_run_that_is_opened_again_has_its_task_and_its_model(stored):
    task, live, run, _ = stored
    assert run.task is not None
    for name in ("input_ids", "role", "target", "source_token"):
        np.testing.assert_array_equal(getattr(run.task, name), getattr(task, name))
    assert (run.task.name, run.task.vocab, run.task.params) == (task.name, task.vocab, task.params)
    assert run.task.answers == (task.answers or range(task.vocab))
    ids, mask = run.inputs()
    np.testing.assert_array_equal(ids, task.input_ids)
    assert mask.all()
    assert (run.model, run.trace.attrs["train_length"], run.lacks_model()) == (None, 12, "")
    for each in (live, run):
        with each.probe() as probe:
            np.testing.assert_array_equal(probe.record(task)["delta"].values, run.trace["delta"].values)


def test_some_rows_of_a_run_are_a_run(stored):
    task, live, run, _ = stored
    part = run.isel(batch=[1, 1])
    assert (part.sizes["batch"], part.interventions, part.beside) == (2, None, None)
    np.testing.assert_array_equal(part.task.input_ids, task.input_ids[[1, 1]])
    np.testing.assert_array_equal(part.twin[0]["delta"].values, run.twin[0]["delta"].values[:, [1, 1]])
    assert part.weights is run.weights
    held = run.with_model()
    assert held.model is not None
    with held.isel(batch=[0]).probe() as probe:
        assert probe.model is held.model
    with live.probe() as probe:
        assert probe.model is live.model


def test_a_text_has_no_task(model, tmp_path):
    letters = SimpleNamespace(convert_ids_to_tokens=lambda ids: [chr(97 + i) for i in ids])
    tokenizer = type("Letters", (), {"__call__": lambda _, text: {"input_ids": [ord(c) % 32 for c in text]}})()
    tokenizer.convert_ids_to_tokens = letters.convert_ids_to_tokens
    (tmp_path / "text").write_text("the cat sat on the mat and thought")
    run = record_text(mp.load(model), Text(tmp_path / "text", tokenizer, length=20, rows=2))
    assert run.task is None
    assert "train_length" not in run.trace.attrs
    _, mask = run.inputs()
    assert mask.sum(axis=1).tolist() == run.trace["valid"].sum("token").values.tolist()


def test_a_model_whose_weights_changed_is_refused(stored, model):
    run = stored[2]
    other = mp.load(model)
    with torch.no_grad():
        other.backbone.layers[0].mixer.A_log += 0.1
    with pytest.raises(ValueError, match="not those that were recorded"), replace(run, model=other).probe():
        pass


def test_a_model_that_was_brought_live_is_gone_with_its_process(model):
    from transformers import MambaForCausalLM

    run = record_given(MambaForCausalLM.from_pretrained(model).eval(), TASKS["mqar"]())
    assert run.lacks_model() == ""
    gone = replace(run, model=None, trace=run.trace.assign_attrs(loaded_from=""))
    assert "not loaded by name or path" in gone.lacks_model()
    with pytest.raises(ValueError, match="cannot be loaded again"), gone.probe():
        pass


def test_it_is_loaded_again_as_it_was_loaded(model):
    run = record_given(mp.load(model, dtype=torch.float64), TASKS["mqar"]())
    assert json.loads(run.trace.attrs["loaded_from"])["dtype"] == "float64"
    with replace(run, model=None, load_models=True).probe() as probe:
        assert next(probe.model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("length", [0, -4])
def test_a_training_length_is_positive(model, length):
    with pytest.raises(ValueError, match="train_length is at least 1 token"):
        record_given(mp.load(model), TASKS["mqar"](), train_length=length)


# -- analyses of a run ------------------------------------------------------------------------------------------


def toy(lacks="", fails=None):
    """An analysis that counts tokens."""

    def of_run(run, seed):
        if fails:
            raise fails
        return xr.Dataset({"tokens": int(run.trace["valid"].sum())}, attrs={"estimator": "a count", "seed": seed})

    def says(result):
        return f"{result['tokens'].item()} tokens.", [Row("tokens", str(result["tokens"].item()), "0")]

    def draw_bar(result, ax):
        ax.bar(["tokens"], [result["tokens"].item()])

    return Analysis(
        "Tokens", "How many?", "One number.", of_run, says, lambda _: [Panel(draw_bar, "y")], lacks=lambda _: lacks
    )


@pytest.fixture
def known(monkeypatch):
    """Set the analyses that there are."""

    def put(**entries):
        for module in ("mamba_probe.report.analysing", "mamba_probe.report.findings", "mamba_probe.report.figures"):
            monkeypatch.setattr(f"{module}.analyses", lambda: entries)
        monkeypatch.setattr("mamba_probe.analyses._names.names", lambda: list(entries))
        monkeypatch.setattr("mamba_probe.report.analysing.MAIN", tuple(entries)[:1])

    return put


def test_all_are_those_that_the_run_has_what_they_need_for(known, stored, tmp_path):
    known(first=toy(), other=toy(), text=toy(lacks="a text"))
    run, said = stored[2], []
    assert measurable(run, ("all",)) == (("first", "other"), {"text": "a text"})
    results = analyse(run, tmp_path, names=("all",), seed=5, say=said.append)
    assert list(results) == ["first", "other"]
    assert said == ["left out: text, which needs a text", "measuring first", "measuring other"]
    assert results["other"].attrs["seed"] == 5
    assert results["other"].attrs["trace_model_hash"] == run.trace.attrs["model_hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.nc", "other.nc"]


def test_what_is_named_is_refused_where_it_lacks_something(known, stored, tmp_path):
    known(first=toy(), text=toy(lacks="a text"))
    with pytest.raises(ValueError, match="text needs a text, which this run of"):
        analyse(stored[2], tmp_path, names=("text",))
    with pytest.raises(ValueError, match="did you mean 'first'"):
        measurable(stored[2], ("frst",))
    with pytest.raises(ValueError, match="distinct names"):
        measurable(stored[2], ("first", "first"))
    assert list(tmp_path.iterdir()) == []


def test_one_that_refuses_the_run_does_not_take_the_others_with_it(known, stored, tmp_path):
    known(bad=toy(fails=FAULTS[0]), good=toy())
    said = []
    assert list(analyse(stored[2], tmp_path, names=("all",), say=said.append)) == ["good"]
    assert "failed: bad: no such luck" in said
    with pytest.raises(ValueError, match="no such luck"):
        analyse(stored[2], tmp_path, names=("bad",))


FAULTS = [ValueError("no such luck"), FileNotFoundError("no model at ../run")]


@pytest.mark.parametrize("fault", FAULTS, ids=["wrong", "gone"])
def test_the_command_ends_with_1_where_an_analysis_failed_and_has_the_rest(fault, known, stored, tmp_path):
    known(bad=toy(fails=fault), good=toy(), other=toy())
    done = call("analyze", "all", stored[3], "-o", tmp_path)
    assert done.exit_code == 1, done.output
    assert "good: 32 tokens." in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>Tokens</h2>") == 2
    assert "For a paper: good.svg. The numbers: good.nc." in page
    assert (tmp_path / "good.svg").exists()
    named = call("analyze", "good, other", stored[3], "-o", tmp_path / "two")
    assert named.exit_code == 0, named.output
    assert (tmp_path / "two/other.nc").exists()


def test_an_entry_of_its_own_is_said_and_drawn(known, stored, tmp_path):
    known(first=toy())
    result = analyse(stored[2], tmp_path, names=("first",))["first"]
    found = finding("first", result, result)
    assert (found.title, found.sentence, found.rows[0].beside) == ("Tokens", "32 tokens.", "32")
    assert found.notes == (("estimator", "a count"),)
    assert [path.name for path in draw("first", result, tmp_path, beside=result)] == ["first.png", "first.svg"]


def test_a_folder_without_entry_is_no_analysis():
    assert "common" not in analyses()
    assert "lti_limits" not in analyses()
    assert analysis.analyses() is analyses(), "found once"
