"""Trained checkpoints: cards that must be reproduced, nulls that are the untrained model, and findings in words."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.reproduce import CLAIMS, recount, trained_analyses, trained_keep, trained_recall
from mamba_probe.reproduce.claim import run
from mamba_probe.reproduce.finding import BETWEEN, NO_CIRCUIT, OUTSIDE, lies, way
from mamba_probe.reproduce.table import FAILS, HOLDS, REPORT, REPORTED, Cell, Criterion, count, measured, sentence
from mamba_probe.reproduce.trained import Checkpoint, answers, checkpoints, fresh_task
from mamba_probe.reproduce.write import write
from mamba_probe.training import RECIPES, answered, held_out, initial, rows

MODULES = {"keep": trained_keep, "recall": trained_recall, "analyses": trained_analyses}


def named(directory, name):
    return next(each for each in checkpoints(directory) if each.name == name)


def verdicts(checkpoint, *hows):
    cells = [cell for cell in recount.accuracies([checkpoint]) if cell.how in (hows or ("unseen", "again"))]
    return [row.verdict for row in run(CLAIMS["trained-recall"], cells).rows]


@pytest.fixture
def copied(small_zoo, tmp_path):
    """The checkpoint that recalls, where it may be changed."""
    return Checkpoint(shutil.copytree(small_zoo / "trained-mqar-mamba2", tmp_path / "trained-mqar-mamba2"))


def test_cards_are_reproduced(small_zoo, copied):
    for checkpoint in checkpoints(small_zoo):
        assert verdicts(checkpoint) == [HOLDS, HOLDS]
    assert copied.solves
    assert verdicts(copied, "beyond") == [HOLDS]


def test_a_card_that_says_too_much_fails(copied):
    card = copied.card
    correct, total = card["accuracy"]["correct"] * 8 // 10, card["accuracy"]["total"]
    card["accuracy"] |= {"correct": correct, "value": correct / total}
    (copied.path / "card.json").write_text(json.dumps(card))
    assert verdicts(Checkpoint(copied.path)) == [FAILS, FAILS]


def test_weights_of_another_model_fail(copied):
    other = initial(copied.config)
    shutil.rmtree(copied.path)
    mp.zoo.save(other, copied.card, copied.path)
    assert verdicts(Checkpoint(copied.path)) == [FAILS, FAILS]


def test_unseen_rows_are_neither_the_cards_nor_those_of_training(copied):
    long = {"length": 64, "n_pairs": 8, "vocab": 256}  # rows long enough that none comes twice by chance
    config = replace(copied.config, task={**copied.config.task, **long})
    fresh = {tuple(row) for row in fresh_task(copied, 64, 0, **long).input_ids.tolist()}
    seen = [held_out(config, split, index).input_ids for split in ("validation", "test") for index in range(16)]
    seen += [rows(config, step)[0].numpy() for step in range(64)] + [fresh_task(copied, 64, 1, **long).input_ids]
    assert fresh.isdisjoint(tuple(row) for ids in seen for row in ids.tolist())
    assert fresh == {tuple(row) for row in fresh_task(copied, 64, 0, **long).input_ids.tolist()}


def test_answers_are_those_of_the_trainer(copied):
    config = copied.config
    counts = answers(copied.engine, [held_out(config, "test", index) for index in range(3)])
    assert tuple(counts.sum(0)) == answered(copied.model, config, "test", 3)
    assert counts.shape == (3 * config.batch, 2)


def test_standard_errors_are_one_on_average():
    """Two counts of one accuracy differ by a standard normal's size, also where the queries of a row go together."""
    rng = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(400):
        card = {"correct": (x := int(rng.binomial(2000, 0.7))), "total": 2000, "value": x / 2000}
        alone.append(recount.apart(card, np.stack([rng.binomial(8, 0.7, 250), np.full(250, 8)], 1)))
        both = [rng.random(250) < 0.7 for _ in range(2)]  # all eight queries of a row right, or none
        card = {"correct": (x := 8 * int(both[0].sum())), "total": 2000, "value": x / 2000}
        together.append(recount.apart(card, np.stack([8 * both[1], np.full(250, 8)], 1)))
    assert np.mean(np.square(alone)) == pytest.approx(1, abs=0.2)
    assert np.mean(np.square(together)) == pytest.approx(1, abs=0.2)


def test_the_null_is_the_model_before_its_first_step(small_zoo):
    for checkpoint in checkpoints(small_zoo):
        known = initial(checkpoint.config).state_dict()
        assert all(torch.equal(known[name], weight) for name, weight in checkpoint.twin.state_dict().items())
        with mp.attach(checkpoint.twin) as probe:
            probe.record(fresh_task(checkpoint, 2, 0), variables=("delta", "A", "x"))


def test_a_selective_model_in_the_place_of_s4d_fails(small_zoo):
    (cell,) = (cell for cell in trained_keep.cells(checkpoints(small_zoo)) if cell.how == "constant")
    assert [row.verdict for row in run(CLAIMS["trained-keep"], [cell]).rows] == [HOLDS]
    mamba = {"path": named(small_zoo, "trained-keep-mamba1-64").path}
    swapped = Cell(cell.table, cell.how, cell.criterion, mamba)
    assert [row.verdict for row in run(CLAIMS["trained-keep"], [swapped]).rows] == [FAILS]


def test_ratios_of_planted_deltas():
    """Delta 2 before n = 3, 8 at it, 1/2 after, but for a channel that is left out and one that is constant."""
    delta = np.full((2, 10, 3), 0.5)
    delta[:, :3], delta[:, 3] = 2.0, 8.0
    delta[..., 1], delta[..., 2] = 77.0, 0.1
    delta[:, 4:, 1] = 1.0
    trace = xr.Dataset({"delta": (("layer", "batch", "token", "channel"), delta[None])}, attrs={"n": 3})
    first = np.array([[True, True], [False, False], [False, False]])
    assert trained_keep._ratios(trace, 0, first, seed=0) == pytest.approx(np.array([[4, 16]] * 3))
    both = first | np.array([[False], [False], [True]])
    assert trained_keep._ratios(trace, 0, both, seed=0) == pytest.approx(np.array([[2, 4]] * 3))
    constant = trace.isel(batch=0, token=0, drop=True).expand_dims(batch=2, token=10).isel(token=0, batch=0)
    held = xr.Dataset({"delta": constant["delta"]}, {"batch": [0, 1], "token": range(10)}, {"n": 3})
    assert trained_keep._ratios(held, 0, both, seed=0) == pytest.approx(np.ones((3, 2)))


def test_the_words_of_findings():
    assert lies(1.0, (1.0, 1.0), 0.1, 1.0) == BETWEEN
    assert lies(0.05, (0.01, 0.09), 0.1, 1.0) == OUTSIDE
    assert lies(1.2, (math.nan, math.nan), 0.1, 1.0) == OUTSIDE
    assert lies(-0.5, (-0.6, -0.4), 0.0, -1.0) == BETWEEN
    assert lies(0.5, (0.4, 0.6), 0.1, math.nan) == REPORTED
    assert way(-0.5, 0.0, -1.0) == 0.5
    assert math.isnan(way(0.5, 1.0, 1.0))


def test_what_is_reported_neither_holds_nor_fails():
    said = {"what": "a", "mixer": "S4D", "dtype": "float32", "sizes": {}, "estimator": "b", "null": 0.0, "null_is": "c"}
    rows = [measured(Cell("t", "how", REPORT), "x", value, over="d", **said) for value in (1.0, 2.0)]
    rows.append(measured(Cell("t", "how", Criterion("<=", 1.0)), "x", 1.0, over="d", **said))
    assert count(rows) == {HOLDS: 1, "fails as it must": 0, FAILS: 0, REPORTED: 2}
    assert sentence(rows) == "3 measurements: 1 hold, 0 fail as they must, none FAILS; 2 reported"


def test_a_circuit_is_scored_where_the_task_is_solved(small_zoo):
    cells = [cell for cell in trained_analyses.cells(checkpoints(small_zoo)) if cell.how == "recall_circuit"]
    rows = run(CLAIMS["trained-analyses"], cells).rows
    solved = [row for row in rows if row.what == "trained-mqar-mamba2"]
    assert {row.quantity.split(":")[0] for row in solved} > {"S1", "S3", "S6"}
    assert {row.ideal for row in solved if row.quantity.startswith(("S1:", "S3:", "S6:"))} == {1.0}
    assert NO_CIRCUIT not in {row.verdict for row in solved}
    others = [row for row in rows if row.what != "trained-mqar-mamba2"]
    assert {row.what for row in others} == {"trained-mqar-s4d-small", "trained-mqar-no-conv"}
    assert {row.verdict for row in others} == {NO_CIRCUIT}


def test_taking_out_the_convolution_is_asked_of_models_that_have_one_and_recall(small_zoo):
    cells = [cell for cell in trained_recall.cells(checkpoints(small_zoo)) if cell.how == "without conv"]
    assert [cell.build["path"].name for cell in cells] == ["trained-mqar-mamba2"]
    (row,) = run(CLAIMS["trained-recall"], cells).rows
    assert row.verdict == REPORTED
    assert row.value < row.sizes["with conv"] - 0.3


@pytest.mark.parametrize("name", MODULES)
def test_what_the_zoo_lacks_is_said(name, small_zoo, tmp_path):
    claim, cells = CLAIMS[f"trained-{name}"], MODULES[name].cells(checkpoints(small_zoo))
    assert claim.absent is not None
    said = " ".join(claim.absent(cells))
    lacking = [each for each in RECIPES if each not in UNSAID[name] and not (small_zoo / each).exists()]
    assert all(each in said for each in lacking)
    assert not any(f" {each.name}," in said.split("Absent")[-1] for each in small_zoo.iterdir())
    result = run(replace(claim, cells=tuple))
    assert result.rows == []
    write(claim, result, tmp_path)
    assert "0 measurements" in (tmp_path / f"trained-{name}.md").read_text()
    assert "trained-keep-mamba1-256" in " ".join(result.left_out) or name == "recall"


UNSAID = {
    "keep": [name for name in RECIPES if "keep" not in name],
    "recall": [name for name in RECIPES if "keep" in name],
    "analyses": [],
}
