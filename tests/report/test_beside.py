"""A reference beside a model: named by its card, on the same rows where it can be, its values in their own column."""

import json
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe import blocks, zoo
from mamba_probe.analyses.common.words import Row
from mamba_probe.cli import app
from mamba_probe.report import load_beside, named
from mamba_probe.report.figures import _align
from mamba_probe.report.findings import _paired
from mamba_probe.run import Run, vocabulary
from mamba_probe.trace import open_dataset
from mamba_probe.training import RECIPES

SIZES = ("--task", "mqar", "--rows", 4, "--length", 16, "--n-pairs", 2)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def cells(page, quantity):
    """The texts of the row of a table whose first cell begins so."""
    row = re.search(rf'<tr><th scope="row">{quantity}.*?</tr>', page, re.S)
    return re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row.group(0), re.S)


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a trained checkpoint's folder is: a model that solves the task, and a card that names its closed form."""
    folder = tmp_path_factory.mktemp("zoo") / "solved"
    mp.constructions.mqar("mamba1", 8, 8).save(folder)
    (folder / "card.json").write_text(json.dumps({"beside": "construction:mamba2"}))
    return folder


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report"
    done = call("report", trained, *SIZES, "-o", out)
    assert done.exit_code == 0, done.output
    return out, done


def test_the_card_names_the_reference_which_runs_on_the_same_rows(report):
    out, done = report
    run = Run.open(out)
    assert run.beside is not None
    assert (run.beside.trace.attrs["model"], run.beside.trace.attrs["family"]) == ("construction:mamba2", "mamba2")
    assert np.array_equal(run.trace.token_id, run.beside.trace.token_id)
    assert "beside it, construction:mamba2: Recall circuit in layer 0" in done.stdout
    page = words((out / "report.html").read_text())
    assert "Beside it: construction:mamba2, measured by the same estimators on the same rows." in page
    assert "A one-layer Mamba-2 language model that solves the task." in page


def test_the_column_has_the_values_that_the_construction_states(report):
    page = (report[0] / "report.html").read_text()
    ideal = mp.constructions.mqar("mamba2", 8, 8).signatures
    for name in ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S9"):
        assert float(cells(page, f"{name}:")[4]) == pytest.approx(ideal[name], abs=1e-3), name
    assert cells(page, "task accuracy")[4] == "1 (8/8)"
    stored = open_dataset(report[0] / "beside/results/wavelet_alignment.nc").load()
    assert float(cells(page, r"layer 0: \|cos\|")[4]) == pytest.approx(stored["layer_best_cosine"].item(), abs=1e-3)
    assert stored.attrs["trace_model_hash"] in page


@pytest.mark.long
def test_pictures_stand_side_by_side(report, trained, tmp_path):
    alone = tmp_path / "alone"
    assert call("report", trained, *SIZES, "--beside", "none", "-o", alone).exit_code == 0
    page = (alone / "report.html").read_text()
    assert "eside" not in re.sub(r"base64,[^\"]*", "", page)
    for name in ("recall_circuit", "memory_horizon", "wavelet_alignment"):
        one, two = (imread(folder / f"figures/{name}.png") for folder in (alone, report[0]))
        assert two.shape[1] > 1.5 * one.shape[1]
    svg = (report[0] / "figures/recall_circuit.svg").read_text()
    assert svg.count("the query finds its pair") == 2
    assert "construction:mamba2, layer 0" in svg


@pytest.mark.long
def test_analyze_goes_on_from_both_and_none_removes_the_earlier_one(report, trained, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(report[0], again)
    done = call("analyze", "hidden_attention", again, "-o", tmp_path / "results")
    assert done.exit_code == 0, done.output
    assert "beside it, construction:mamba2: Weighted by |alpha|" in done.stdout
    assert open_dataset(tmp_path / "results/beside/hidden_attention.nc").attrs["model"] == "construction:mamba2"
    assert (tmp_path / "results/hidden_attention.png").exists()
    assert (tmp_path / "results/beside/hidden_attention.png").exists()
    assert call("record", trained, *SIZES, "--beside", "none", "-o", again, "--overwrite").exit_code == 0
    assert not (again / "beside").exists()


@pytest.mark.long
def test_another_vocabulary_has_rows_of_its_own_and_says_so(trained, tmp_path):
    mp.constructions.mqar("mamba1", 16, 16).save(tmp_path / "wider")
    assert call("report", trained, *SIZES, "--beside", tmp_path / "wider", "-o", tmp_path / "out").exit_code == 0
    page = words((tmp_path / "out/report.html").read_text())
    assert (
        "on other rows, drawn alike from its own vocabulary: task mqar (length 16, n_pairs 2, vocab 32, seed 0" in page
    )
    assert "in the column beside it and" in page, "nothing says that this one is a closed form"
    assert Run.open(tmp_path / "out").beside.interventions["n_correct"].sel(intervention="none").item() == 8


@pytest.mark.long
def test_a_model_that_fails_has_no_circuit_to_compare_and_the_page_says_so(tmp_path):
    torch.manual_seed(0)
    model = blocks.LanguageModel([blocks.MambaBlock(16, d_state=4) for _ in range(2)], 16)
    card = dict.fromkeys(zoo.CARD, "") | {"name": "failing", "beside": "construction:mamba1"}
    zoo.save(model, card, tmp_path / "failing")
    assert call("report", tmp_path / "failing", *SIZES, "-o", tmp_path / "out").exit_code == 0
    page = (tmp_path / "out/report.html").read_text()
    said = words(page)
    assert "No circuit: accuracy" in said
    assert f"There is no circuit of {tmp_path / 'failing'} to put beside it." in said
    assert cells(page, "task accuracy")[4] == "1 (8/8)"
    assert "S1: pair accuracy" not in page
    assert page.count("data:image/png;base64,") == 2


def test_a_layer_stands_beside_the_only_one_or_that_of_its_number():
    rows = [Row("gain", "1", layer=0), Row("gain", "2", layer=1), Row("other", "3", layer=1)]
    only = _paired(rows, [Row("gain", "9", layer=7)])
    assert [row.beside for row in only] == ["9", "9", "not measured"]
    each = _paired(rows, [Row("gain", "8", layer=1), Row("gain", "7", layer=2)])
    assert [row.beside for row in each] == ["not measured", "8", "not measured"]


@pytest.mark.parametrize("inverted", [False, True])
def test_axes_side_by_side_get_the_same_limits(inverted):
    figure, axes = plt.subplots(1, 2)
    for ax, ends in zip(axes, ((0, 1), (-2, 0.5)), strict=True):
        ax.set_ylim(*(ends[::-1] if inverted else ends))
    _align(axes, "y")
    assert {ax.get_ylim() for ax in axes} == {(1, -2) if inverted else (-2, 1)}
    plt.close(figure)


def test_recipes_of_recall_name_a_closed_form_of_their_mixer_at_their_vocabulary():
    families = {"mamba1": "mamba", "mamba2": "mamba2", "s4d": "s4d"}
    for recipe in RECIPES.values():
        if recipe.config.task["name"] != "mqar":
            assert recipe.beside is None
            continue
        model = load_beside(recipe.beside, recipe.config.vocab)
        assert vocabulary(model) == recipe.config.vocab
        with mp.attach(model) as probe:
            assert probe.record(np.zeros((1, 16), np.int64)).attrs["family"] == families[recipe.config.mixer["kind"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SIZES, "--beside", "construction:mamba3"), "unknown construction 'mamba3': did you mean 'mamba2'"),
        ((*SIZES, "--beside", "zoo:mqar"), "no checkpoint is named 'mqar'"),
        (("--text", __file__, "--beside", "construction:mamba1"), "--beside construction:mamba1 goes with --task"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(trained, arguments, message, tmp_path):
    done = call("report", trained, *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert re.search(message, re.sub(r"\s+", " ", done.stderr))
    assert not (tmp_path / "out").exists()


def test_a_closed_form_too_large_is_refused_and_no_card_names_none(tmp_path):
    with pytest.raises(ValueError, match=r"construction:s4d is built for at most 512 token ids; the model has 50280"):
        load_beside("construction:s4d", 50280)
    assert named(str(tmp_path)) is None
