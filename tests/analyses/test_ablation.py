"""Head and layer ablation: planted units, transformers with weights set to 0, the gate, and refusals."""

import copy
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.ablating import ablate_class, ablate_units
from mamba_probe.analyses import ablation, hidden_attention
from mamba_probe.analyses.ablation.entry import ANALYSIS, _draws, _parts
from mamba_probe.run import record_task


def measured(model, task, **options):
    with mp.attach(model) as probe:
        trace = probe.record(task)
        return trace, ablate_units(probe, task, **options)


@pytest.fixture(scope="module")
def planted():
    """Values have one channel each: codes of the keys have constant weight, those of the values one one."""
    built = mp.constructions.mqar(n_keys=16, n_values=16, key_code="constant-weight")
    task = mp.tasks.mqar(batch=12, length=32, n_pairs=4, vocab=32, seed=0)
    trace, ablated = measured(built.model, task, heads=range(len(built.channels)), n_random=2)
    return built, task, trace, ablated


def test_the_channel_of_a_value_kills_exactly_its_answers(planted):
    built, task, _, ablated = planted
    asked = task.target >= 0
    assert ablated["correct"].values[asked].all()
    seen = 0
    for channel, label in enumerate(built.channels):
        correct = ablated["unit_correct"].sel(unit=f"layer 0 channel {channel}").values[asked] == 1
        if label.startswith("value bit"):
            mine = task.target[asked] == 16 + int(label.split()[-1])
            assert np.array_equal(correct, ~mine)
            seen += mine.sum()
        else:
            assert correct.all()
    assert seen == task.n_query


def test_unread_channels_change_nothing_at_all(planted):
    built, task, trace, ablated = planted
    found = ablation.measure(trace, ablated=ablated, n_bootstrap=50)
    for channel, label in enumerate(built.channels):
        one = found.sel(unit=f"layer 0 channel {channel}")
        if not label.startswith("value bit"):
            assert one["effect_accuracy"].item() == 0.0
            assert one["effect_loss"].item() == 0.0
            assert one["effect_loss_p"].item() == 1.0
        else:
            share = (task.target == 16 + int(label.split()[-1])).sum() / task.n_query
            assert one["effect_accuracy"].item() == pytest.approx(-share)
    assert found["effect_accuracy"].sel(unit="layer 0").item() == -1.0
    assert np.isnan(found["excess_accuracy"].sel(unit="layer 0").item()), "one layer: no null of as many others"
    assert found["solved"].item()


def zeroed(model, layer, kind, head=None):
    """A copy in which weights are 0, so that the part gives nothing; run by transformers alone."""
    model = copy.deepcopy(model)
    mixer = model.backbone.layers[layer].mixer
    with torch.no_grad():
        if kind == "layer":
            mixer.out_proj.weight.zero_()
            if mixer.out_proj.bias is not None:
                mixer.out_proj.bias.zero_()
        elif hasattr(mixer, "num_heads"):
            size = mixer.head_dim
            rows = slice(head * size, (head + 1) * size)
            mixer.in_proj.weight[mixer.intermediate_size + rows.start : mixer.intermediate_size + rows.stop] = 0
            mixer.conv1d.weight[rows], mixer.conv1d.bias[rows] = 0, 0
        else:
            mixer.out_proj.weight[:, head] = 0
    return model


def native_loss(model, ids):
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


def test_units_are_transformers_with_weights_set_to_zero(model, family):
    ids = torch.randint(1, 61, (2, 14), generator=torch.Generator().manual_seed(1))
    word = {"mamba": "channel", "mamba2": "head"}[family]
    with mp.attach(model) as probe:
        found = ablate_units(probe, ids, heads=[1, 4], n_random=1)
    assert found["loss"].mean().item() == pytest.approx(native_loss(model, ids), rel=1e-6)
    for layer in (0, 1):
        whole = found["unit_loss"].sel(unit=f"layer {layer}").mean().item()
        assert whole == pytest.approx(native_loss(zeroed(model, layer, "layer"), ids), rel=1e-6)
        for head in (1, 4):
            one = found["unit_loss"].sel(unit=f"layer {layer} {word} {head}").mean().item()
            assert one == pytest.approx(native_loss(zeroed(model, layer, "part", head), ids), rel=1e-5)
            assert one != pytest.approx(found["loss"].mean().item(), rel=1e-5)


def test_groups_cover_a_layer_and_their_null_has_as_many_channels(monkeypatch):
    from mamba_probe import ablating

    edits, scattered = [], ablating._scattered

    def noted(probe, pool, seed):
        edits.append((pool, scattered(probe, pool, seed)))
        return edits[-1][1]

    monkeypatch.setattr(ablating, "_scattered", noted)
    task, model, calls = mp.tasks.mqar(batch=2, length=32, n_pairs=4, seed=0), mp.load("zoo:trained-mqar-mamba2"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = measured(model, task, group=3, n_random=2)[1]
    assert found["unit"].values.tolist() == ["layer 0", "layer 0 heads 0-2", "layer 0 head 3"]
    assert found["unit_pool"].values.tolist() == [-1, 0, 1]
    assert [pool for pool, _ in edits] == [(0, 96), (0, 96), (0, 32), (0, 32)]
    for (_, size), chosen in edits:
        channels = [(edit.where[0][1][0], inner) for edit in chosen for inner in edit.where[1][1]]
        assert len(set(channels)) == size
    assert found.attrs["n_forward"] == 1 + 3 + 4 == len(calls) - 1, "one forward a unit and set, and the recording's"


def test_the_null_of_a_layer_is_drawn_from_all_layers():
    task = mp.tasks.keep_nth(batch=2, length=32, n=5, n_tokens=16, seed=0)
    found = measured(mp.load("zoo:trained-keep-mamba1-64"), task, heads=(), n_random=2)[1]
    assert found["unit"].values.tolist() == ["layer 0", "layer 1"]
    assert found["unit_pool"].values.tolist() == [0, 0]
    assert found["random_loss"].sizes["pool"] == 1


def test_effects_are_means_over_rows_of_paired_changes():
    task = mp.tasks.mqar(batch=8, length=64, seed=2)
    trace, ablated = measured(mp.load("zoo:trained-mqar-mamba2"), task, n_random=3)
    found = ablation.measure(trace, ablated=ablated)
    for name, stored in (("accuracy", "correct"), ("loss", "loss")):
        for index, unit in enumerate(found["unit"].values):
            rows, drawn = [], []
            for row in range(8):
                asked = task.target[row] >= 0
                intact = ablated[stored].values[row, asked].mean()
                rows.append(ablated[f"unit_{stored}"].values[index, row, asked].mean() - intact)
                drawn.append(ablated[f"random_{stored}"].values[0, :, row][:, asked].mean() - intact)
            one = found.sel(unit=unit)
            assert one[f"effect_{name}"].item() == pytest.approx(np.mean(rows), abs=1e-9)
            if unit != "layer 0":
                assert one[f"random_{name}"].item() == pytest.approx(np.mean(drawn), abs=1e-9)
                assert one[f"excess_{name}"].item() == pytest.approx(np.mean(rows) - np.mean(drawn), abs=1e-9)
                assert one[f"effect_{name}_low"] <= one[f"effect_{name}"] <= one[f"effect_{name}_high"]
    heads = found.isel(unit=slice(1, None))
    read = hidden_attention.measure(trace, query_tokens=np.array([np.flatnonzero(t >= 0) for t in task.target]))
    np.testing.assert_allclose(heads["entropy"].values, read["head_entropy"].values[0], rtol=1e-9)
    assert found["entropy"].sel(unit="layer 0").item() == pytest.approx(heads["entropy"].mean().item())


def test_a_model_that_does_not_solve_its_task_has_no_effect():
    task = mp.tasks.mqar(batch=8, length=64, seed=2)
    trace, ablated = measured(mp.load("zoo:trained-mqar-no-conv"), task, group=32, n_random=1)
    found = ablation.measure(trace, ablated=ablated)
    assert not found["solved"].item()
    assert found["accuracy_low"].item() <= 0.5
    assert found.attrs["verdict"].startswith("the model does not solve the task (accuracy 0.")
    for name in found.data_vars:
        if name.startswith(("effect", "random", "excess", "correlation")):
            assert np.isnan(found[name]).all()
    assert np.isfinite(found["entropy"]).all()
    axes = ablation.plot(found)
    assert "does not solve the task" in axes.texts[0].get_text()
    plt.close(axes.figure)


def test_without_a_task_the_loss_is_scored(model):
    ids = np.random.default_rng(1).integers(1, 61, (6, 16))
    trace, ablated = measured(model, ids, heads=[0, 1, 2, 3], n_random=1)
    found = ablation.measure(trace, ablated=ablated)
    assert "solved" not in found
    assert found.attrs["scored"] == "loss"
    assert np.isfinite(found["effect_loss"]).all()
    assert np.isfinite(found["correlation"])
    for kind in ("effect", "entropy"):
        plt.close(ablation.plot(found, kind=kind).figure)


def test_few_rows_tell_no_effect_from_chance():
    task = mp.tasks.mqar(batch=5, length=64, seed=2)
    trace, ablated = measured(mp.load("zoo:trained-mqar-mamba2"), task, n_random=1)
    found = ablation.measure(trace, ablated=ablated)
    assert found["effect_accuracy_p"].min() > 0.05
    assert found.attrs["verdict"].startswith("5 row(s) tell no unit's effect from chance (6 are needed); the largest")
    assert found.attrs["verdict"].endswith("without layer 0")


def test_what_cannot_be_taken_out_is_refused():
    task = mp.tasks.mqar(batch=2, length=32, n_pairs=4, seed=0)
    with mp.attach(mp.load("zoo:trained-mqar-mamba2")) as probe:
        for options, text in (
            ({"heads": [0], "group": 2}, "give heads or group, and not both"),
            ({"group": 0}, "group, a number of consecutive heads or channels, is at least 1"),
            ({"heads": [0, 4]}, "layer 0 has heads 0 to 3"),
            ({"heads": [1, 1]}, "heads needs distinct integers"),
            ({"heads": [0.5]}, "heads is a list of whole numbers"),
            ({"layers": [2]}, "unknown layer '2'"),
            ({"n_random": 0}, "n_random is at least 1"),
        ):
            with pytest.raises(ValueError, match=text):
                ablate_units(probe, task, **options)


def test_layers_of_several_directions_are_refused():
    adapter = SimpleNamespace(layer=4, sizes=SimpleNamespace(directions=("forward", "backward")))
    probe = SimpleNamespace(_adapters=[adapter], hook_names=lambda: ["blocks.4.mixer.hook_delta"])
    for ablate, options in ((ablate_units, {}), (ablate_class, {"classes": {}})):
        with pytest.raises(ValueError, match=r"layers \[4\] scan in several directions"):
            ablate(probe, None, **options)


def test_an_ablation_of_something_else_is_refused(planted):
    _, _, trace, ablated = planted
    for other, text in (
        (ablated.assign_attrs(model_hash="other"), "ablated is of another model"),
        (ablated.assign_coords(token_id=ablated["token_id"] + 1), "its token_id is not the trace's"),
        (ablated.drop_vars("unit_loss"), "it has no unit_loss"),
    ):
        with pytest.raises(ValueError, match=text):
            ablation.measure(trace, ablated=other)
    with pytest.raises(ValueError, match="n_bootstrap must be at least 2"):
        ablation.measure(trace, ablated=ablated, n_bootstrap=1)
    with pytest.raises(ValueError, match="does not use baseline"):
        ablation.measure(trace, ablated=ablated, baseline=trace)


@pytest.mark.parametrize(
    "name", ["trained-mqar-mamba1-small", pytest.param("trained-mqar-mamba2", marks=pytest.mark.long)]
)
def test_a_run_is_measured_said_and_drawn(name):
    run = record_task(mp.load(f"zoo:{name}"), "mqar", rows=18, length=64)
    assert ANALYSIS.lacks(run) == ""
    result = ANALYSIS.of_run(run, 0)
    assert result.attrs["rows"] == "the first 16 of 18"
    sentence, rows = ANALYSIS.says(result)
    solved = name.endswith("mamba2")
    assert ANALYSIS.drawn(result) == solved
    assert ("cost accuracy" if solved else "does not solve the task") in sentence
    assert len(rows) == (1 + 5 + 1 if solved else 1)
    panels = ANALYSIS.panels([result])
    figure, axes = plt.subplots(1, len(panels), squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        panel.draw(result, ax)
    figure.canvas.draw()
    plt.close(figure)


def test_what_a_run_may_lack_and_which_parts_are_taken():
    bare = SimpleNamespace(trace=xr.Dataset(), lacks_model=lambda: "")
    assert ANALYSIS.lacks(bare).startswith("token ids, and predictions")
    assert [_parts(*sizes)[0] for sizes in ((4, 1), (276, 1), (128, 2), (1536, 24), (24, 64))] == [
        {"group": 1}, {"group": 35}, {"group": 16}, {"heads": ()}, {"heads": ()},
    ]  # fmt: skip


def test_as_many_random_sets_are_drawn_as_can_decide_or_as_are_affordable():
    def shaped(tokens, layers, channels, states, rows=8):
        coords = {"valid": (("batch", "token"), np.ones((rows, tokens // rows), bool))}
        delta = np.broadcast_to(0.0, (layers, rows, tokens // rows, channels))
        A = np.broadcast_to(0.0, (layers, channels, states))
        return xr.Dataset(
            {"delta": (("layer", "batch", "token", "channel"), delta), "A": (("layer", "channel", "state"), A)}, coords
        )

    assert _draws({"group": 16}, shaped(1024, 1, 128, 16)) == 20 * 8
    assert _draws({"group": 16}, shaped(1024, 2, 128, 16)) == 20 * 2 * 9
    assert _draws({"group": 16}, shaped(2**14, 1, 128, 16)) == 2**31 // (2**14 * 128 * 16)
    assert _draws({"heads": ()}, shaped(2**16, 24, 1536, 16)) == 2
    assert _draws({"group": 16}, shaped(1024, 1, 128, 16, rows=4)) == 2, "4 rows tell nothing from chance"


@pytest.mark.long
def test_a_unit_is_more_than_random_where_no_random_set_reaches_it():
    """One channel in 16 holds all answers: of 400 sets of a channel some hold it too, so its rank says that it may be
    a draw; where no other channel does anything, one unit among 16 is 1 in 16 of the draws."""
    built = mp.constructions.mqar(n_keys=16, n_values=16, key_code="constant-weight")
    task = mp.tasks.mqar(batch=12, length=32, n_pairs=4, vocab=32, seed=0)
    trace, ablated = measured(built.model, task, group=1, n_random=400)
    found = ablation.measure(trace, ablated=ablated)
    drawn = ablated["random_correct"].mean(("batch", "token")).values[0] - ablated["correct"].mean().item()
    parts = found.isel(unit=slice(1, None))
    n = parts.sizes["unit"]
    for unit in range(n):
        harm = -parts["effect_accuracy"].values[unit]
        reached = (-drawn >= harm - 1e-12).sum()
        expected = min(1.0, n * (1 + reached) / 401)
        assert parts["rank_accuracy_p"].values[unit] == pytest.approx(expected)
    assert (found["rank_accuracy_p"].fillna(1) > 0.05).all(), "single value channels are among the random ones"
    assert np.isclose(parts["random_accuracy_min"].values, drawn.min()).all()
    assert np.isclose(parts["random_accuracy_max"].values, drawn.max()).all()


def test_too_few_random_sets_are_said_to_tell_nothing(planted):
    _, _, trace, ablated = planted
    verdict = ablation.measure(trace, ablated=ablated).attrs["verdict"]
    units = int((ablated["unit_pool"] >= 0).sum())
    assert f"not told from the 2 random sets drawn for each size, too few for {units} units" in verdict


@pytest.mark.parametrize("kept", [slice(0, 2), slice(2, 4)])
def test_the_entropy_of_a_unit_is_that_of_its_own_heads_in_a_trace_of_some(kept):
    task = mp.tasks.mqar(batch=6, length=32, n_pairs=4, vocab=256, seed=0)
    trace, ablated = measured(mp.load("zoo:trained-mqar-mamba2"), task, group=1, n_random=2)
    whole = ablation.measure(trace, ablated=ablated)["entropy"].values
    part = trace.isel(head=kept).assign_attrs(n_heads=4)
    found = ablation.measure(part, ablated=ablated)["entropy"].values
    heads = np.arange(4)[kept] + 1  # after the layer as a whole
    np.testing.assert_allclose(found[heads], whole[heads])
    assert np.isnan(np.delete(found, heads)).all()


@pytest.mark.long
@pytest.mark.parametrize("name", mp.zoo.names())
def test_every_model_of_the_zoo_that_solves_its_task_needs_its_last_layer(name):
    card = mp.zoo.card(name)["task"]
    options = {key: value for key, value in card.items() if key != "name"} | {"batch": 8, "seed": 1}
    task = getattr(mp.tasks, card["name"])(**options)
    trace, ablated = measured(mp.load(f"zoo:{name}"), task, heads=(), n_random=1)
    found = ablation.measure(trace, ablated=ablated)
    if found["solved"].item():
        assert found["effect_accuracy"].values[-1] < -0.5
    else:
        assert "does not solve the task" in found.attrs["verdict"]
