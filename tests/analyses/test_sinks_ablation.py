"""The class-conditional ablation: by edits of single tokens, in closed form, and what it says of real models."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.ablating import ablate_class
from mamba_probe.analyses import sinks
from mamba_probe.analyses.sinks.entry import ANALYSIS
from mamba_probe.losses import losses
from mamba_probe.run import Run, randomised_twin, record_task


def measured(name, task, n_random=2, **options):
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task)
        ablated = ablate_class(probe, task, classes=sinks.classes(trace), n_random=n_random, **options)
    return trace, ablated


def by_assigned_steps(probe, trace, mask, task):
    """The same ablation with one edit a row and token, from the step sizes that were recorded."""
    delta, edits = trace["delta"].values[0], []
    for row, chosen in enumerate(mask):
        mean = torch.from_numpy(delta[row, ~chosen].mean(axis=0))
        edits += [mp.assign("delta", mean, batch=row, token=token) for token in np.flatnonzero(chosen).tolist()]
    return losses(probe, task, edits=edits)


@pytest.mark.parametrize("name", ["trained-mqar-mamba1-small", "trained-mqar-mamba2"])
def test_one_layer_is_as_with_its_steps_assigned_one_by_one(name):
    task = mp.tasks.mqar(batch=3, length=64, seed=5)
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task)
        classes = sinks.classes(trace)
        found = ablate_class(probe, task, classes=classes, n_random=1, batch_size=2)
        for index, mask in enumerate(classes.values):
            loop = by_assigned_steps(probe, trace, mask, task)
            np.testing.assert_allclose(found["class_loss"].values[index], loop["loss"].values, atol=2e-5)
            assert np.array_equal(found["class_correct"].values[index], loop["correct"].values, equal_nan=True)
        assert np.nanmax(np.abs(found["class_loss"] - found["loss"])) > 0.1
        assert found.attrs["n_forward"] == 1 + 2 * len(classes)


def test_a_levelled_value_leaves_the_recall_construction_no_difference_to_tell_by():
    """All steps but the values' are softplus(-40): levelled to them, all logits are alike and the loss is ln vocab."""
    task = mp.tasks.mqar(batch=4, length=64, vocab=256, seed=0)
    trace, ablated = measured("mqar-mamba1", task)
    found = sinks.measure(trace, ablated=ablated)
    value = found.sel({"class": "role: value"})
    assert value["intact_loss"].item() + value["effect_loss"].item() == pytest.approx(np.log(256), abs=1e-4)
    assert value["ratio"].min().item() > 1e16
    assert value["share"].item() == 1
    for name in ("role: key", "role: query", "role: filler", "first token"):
        assert found["effect_loss"].sel({"class": name}).item() == pytest.approx(0, abs=1e-6)


def test_excess_is_over_random_tokens_of_the_same_rows():
    task = mp.tasks.mqar(batch=10, length=64, seed=0)
    trace, ablated = measured("trained-mqar-mamba2", task)
    found = sinks.measure(trace, ablated=ablated)
    value, key = (found.sel({"class": f"role: {name}"}) for name in ("value", "key"))
    assert value["verdict"].item() == "matters more than random tokens"
    assert value["effect_accuracy"].item() < -0.9
    assert value["excess_loss_p"].item() <= 0.05
    assert key["verdict"].item() == "matters less than random tokens"
    assert abs(key["effect_loss"].item()) < 0.01
    rows = np.nanmean(ablated["class_loss"].values, axis=-1) - np.nanmean(ablated["loss"].values, axis=-1)
    drawn = np.nanmean(ablated["random_loss"].values, axis=-1) - np.nanmean(ablated["loss"].values, axis=-1)
    np.testing.assert_allclose(found["excess_loss"].values, (rows - drawn.mean(axis=1)).mean(axis=1), rtol=1e-9)
    counts = ablated["member"].sum("token").values
    assert counts[found["class"].values.tolist().index("role: value")].tolist() == [8] * 10


def test_a_ratio_without_a_function():
    """Specialists of a class, and nothing lost when its steps are levelled: the reason for the ablation."""
    task = mp.tasks.keep_nth(batch=8, length=64, n=5, n_tokens=16, seed=0)
    trace, ablated = measured("trained-keep-mamba1-64", task)
    found = sinks.measure(trace, ablated=ablated).sel({"class": "role: kept"})
    assert found["share"].item() > 0.02
    assert found["ratio"].max().item() > 10
    assert found["effect_accuracy"].item() == 0
    assert abs(found["effect_loss"].item()) < 0.01
    assert found["verdict"].item().startswith("matters no more")


@pytest.mark.parametrize("name", ["trained-mqar-mamba1", "trained-mqar-mamba2"])
def test_untrained_models_have_neither_specialists_nor_effects(name):
    for seed in range(4):
        task = mp.tasks.mqar(batch=16, length=64, seed=seed)
        with mp.attach(randomised_twin(mp.load(f"zoo:{name}"), seed)) as probe:
            trace = probe.record(task, variables=("delta", "A"))
            ablated = ablate_class(probe, task, classes=sinks.classes(trace), n_random=1)
        found = sinks.measure(trace, ablated=ablated, seed=seed)
        low, high = {"trained-mqar-mamba1": (0.99, 1.01), "trained-mqar-mamba2": (0.5, 1.5)}[name]
        assert low < found["layer_ratio"].min()
        assert found["layer_ratio"].max() < high
        assert found["share"].sum() == 0
        assert abs(found["effect_loss"]).max() < 0.01


def test_random_sets_have_as_many_tokens_and_differ(monkeypatch):
    from mamba_probe import ablating

    drawn, random = [], ablating._random

    def noted(mask, valid, seed):
        drawn.append((mask, random(mask, valid, seed)))
        return drawn[-1][1]

    monkeypatch.setattr(ablating, "_random", noted)
    measured("trained-mqar-mamba1-small", mp.tasks.mqar(batch=2, length=32, seed=0), n_random=3)
    for mask, other in drawn:
        assert np.array_equal(mask.sum(axis=1), other.sum(axis=1))
    assert len({other.tobytes() for _, other in drawn}) == len(drawn)


def test_one_row_tells_nothing_of_a_function():
    trace, ablated = measured("trained-mqar-mamba1-small", mp.tasks.mqar(batch=1, length=32, n_pairs=4, seed=0))
    found = sinks.measure(trace, ablated=ablated)
    assert set(found["verdict"].values) == {"1 row(s) cannot tell whether it matters: 6 are needed"}
    assert np.isnan(found["effect_loss_low"]).all()
    assert found.attrs["interval"].startswith("NaN: one row")


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ({}, "classes is a non-empty mapping"),
        ({"a": np.ones((2, 32), bool)}, "class 'a' holds every token of row 0"),
        ({"a": np.zeros((2, 32), bool)}, "class 'a' holds no token"),
        ({"a": np.zeros((2, 31), bool)}, r"class 'a' needs booleans \(batch, token\) = \(2, 32\); got bool \(2, 31\)"),
        ({"a": np.zeros((2, 32))}, "got float64"),
        (xr.DataArray(np.ones((2, 32), bool), dims=("batch", "token")), r"classes has dims \('class', 'batch'"),
    ],
)
def test_classes_that_cannot_be_ablated_are_refused(classes, text):
    task = mp.tasks.mqar(batch=2, length=32, n_pairs=4, seed=0)
    with mp.attach(mp.load("zoo:trained-mqar-mamba1-small")) as probe, pytest.raises(ValueError, match=text):
        ablate_class(probe, task, classes=classes)


def test_what_has_no_steps_or_no_null_is_refused():
    task = mp.tasks.mqar(batch=2, length=32, n_pairs=4, seed=0)
    with mp.attach(mp.load("zoo:trained-mqar-s4d-small")) as probe:
        with pytest.raises(ValueError, match="no layer of this model selects its step sizes"):
            ablate_class(probe, task, classes={"value": task.role == "value"})
        with pytest.raises(ValueError, match="n_random is at least 1"):
            ablate_class(probe, task, classes={"value": task.role == "value"}, n_random=0)


def test_an_ablation_of_something_else_is_refused():
    task, other = (mp.tasks.mqar(batch=2, length=32, n_pairs=4, seed=seed) for seed in (0, 1))
    trace, ablated = measured("trained-mqar-mamba1-small", task)
    with pytest.raises(ValueError, match="ablated was made on other tokens"):
        sinks.measure(trace, ablated=measured("trained-mqar-mamba1-small", other)[1])
    with pytest.raises(ValueError, match="ablated is of another model"):
        sinks.measure(trace, ablated=ablated.assign_attrs(model_hash="other"))
    with pytest.raises(ValueError, match="ablated has the classes"):
        sinks.measure(trace, ablated=ablated, classes=np.where(task.role == "key", "mine", "").astype(object))


@pytest.fixture(scope="module")
def run():
    return record_task(mp.load("zoo:trained-mqar-mamba1-small"), "mqar", rows=20, length=32, n_pairs=4)


def test_a_run_is_measured_said_and_drawn(run):
    assert ANALYSIS.lacks(run) == ""
    result = ANALYSIS.of_run(run, 0)
    assert result.attrs["rows"] == "the first 16 of 20"
    sentence, rows = ANALYSIS.says(result)
    assert "Heads that specialise" in sentence
    assert any(row.quantity == "delta at role: key / rest" for row in rows)
    assert len(rows) == 2 * result.sizes["class"]
    figure, axes = plt.subplots(1, 2)
    for panel, ax in zip(ANALYSIS.panels([result]), axes, strict=True):
        panel.draw(result, ax)
    figure.canvas.draw()
    plt.close(figure)


def test_a_run_without_its_model_has_ratios_and_says_so(run):
    bare = SimpleNamespace(trace=run.trace.drop_vars("prediction"), lacks_model=run.lacks_model, probe=None)
    result = ANALYSIS.of_run(bare, 0)
    assert "A ratio, not a function" in ANALYSIS.says(result)[0]
    assert len(ANALYSIS.panels([result])) == 1
    with pytest.raises(ValueError, match="no ablation was measured: pass ablated="):
        sinks.plot(result, kind="effect")
    with pytest.raises(ValueError, match="layer 9 is not in the result"):
        sinks.plot(result, layer=9)


def test_s4d_lacks_steps():
    constant = SimpleNamespace(trace=xr.Dataset(attrs={"family": "s4d"}))
    assert "S4D's are constants" in ANALYSIS.lacks(constant)


def test_plain_ids_are_scored_by_the_next_token(model):
    ids = np.random.default_rng(0).integers(1, 61, (4, 20))
    with mp.attach(model) as probe:
        run = Run(probe.record(ids), probe.weights(), xr.Dataset(), model=model)
    result = ANALYSIS.of_run(run, 0)
    assert result["class"].values.tolist() == ["first token"]
    assert "every token that another follows" in result.attrs["ablation"]
    assert result["effect_loss"].item() != 0


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in mp.zoo.names() if "s4d" not in name])
def test_every_model_of_the_zoo_that_solves_its_task_needs_some_classs_steps(name):
    card = mp.zoo.card(name)["task"]
    options = {key: value for key, value in card.items() if key != "name"} | {"batch": 12, "seed": 1}
    trace, ablated = measured(name, getattr(mp.tasks, card["name"])(**options), n_random=3)
    found = sinks.measure(trace, ablated=ablated)
    assert np.isfinite(found["layer_ratio"]).all()
    if mp.zoo.card(name)["accuracy"]["value"] > 0.9:
        assert (found["effect_loss"] > 0.3).any(), "some class's steps are needed by every model that solves its task"


def test_rows_without_a_scored_token_do_not_count_as_rows(run):
    """All p-values are unknown where one row alone is scored: no verdict, whatever the ratio."""
    part = run.isel(batch=slice(7))
    result = ANALYSIS.of_run(part, 0)
    assert result.attrs["n_scored_rows"] == "7"
    with part.probe() as probe:
        ablated = ablate_class(probe, part.task, classes=sinks.classes(part.trace), n_random=2)
    gone = np.arange(7)[:, None] > 0
    hidden = {name: ablated[name].where(~xr.DataArray(gone, dims=("batch", "one")).isel(one=0)) for name in ablated}
    hidden = ablated.assign({name: each for name, each in hidden.items() if "loss" in name or "correct" in name})
    found = sinks.measure(part.trace, classes=sinks.classes(part.trace), ablated=hidden)
    assert found.attrs["n_scored_rows"] == "1"
    assert not any("matters" in text.replace("whether it matters", "") for text in found["verdict"].values)


def test_a_row_of_one_token_is_left_as_it_is(model):
    ids = np.random.default_rng(0).integers(1, 61, (4, 20))
    mask = np.ones_like(ids)
    mask[2, 1:] = 0
    with mp.attach(model) as probe:
        run = Run(probe.record(ids, mask), probe.weights(), xr.Dataset(), model=model)
        given = ablate_class(probe, ids, mask, classes=sinks.classes(run.trace), n_random=2)
    assert "1 row(s) of one token left as they are" in given.attrs["ablated"]
    assert not given["member"].sel({"class": "first token"}).values[2].any()
    assert np.isfinite(ANALYSIS.of_run(run, 0)["effect_loss"].values).all()
