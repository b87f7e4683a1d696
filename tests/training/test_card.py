"""The card of a trained checkpoint says what its weights do; the zoo loads what is written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
from scipy.stats import binomtest

import mamba_probe as mp
from mamba_probe import zoo
from mamba_probe.training import RECIPES, Config, Recipe, answered, describe, held_out, initial, run, run_all, train
from mamba_probe.training.__main__ import main
from mamba_probe.training.run import Outcome


@pytest.fixture
def shipped(solved, tmp_path, monkeypatch):
    """`solved` in a zoo of its own, as zoo:small."""
    card = describe(solved, "small", "A small model.", regenerate="no command", beyond=({"length": 24},))
    zoo.save(solved.model, card, tmp_path / "small")
    monkeypatch.setattr(zoo, "_HERE", tmp_path)
    return card


def test_the_cards_numbers_are_those_of_the_loaded_model(shipped):
    model, card = mp.load("zoo:small"), zoo.card("small")
    assert card == json.loads(json.dumps(shipped))
    config = Config.from_json(json.dumps(card["config"]))
    accuracy = card["accuracy"]
    assert answered(model, config, "test", accuracy["batches"]) == (accuracy["correct"], accuracy["total"])
    assert 0.2 < accuracy["value"] < 1
    interval = binomtest(accuracy["correct"], accuracy["total"]).proportion_ci(method="wilson")
    assert (accuracy["low"], accuracy["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    longer = card["beyond"][0]
    assert longer["task"] == {"length": 24}
    changed = replace(config, task={**config.task, "length": 24})
    assert answered(model, changed, "test", longer["batches"]) == (longer["correct"], longer["total"])


def test_the_card_says_where_it_came_from(shipped, solved):
    assert set(zoo.CARD) <= set(shipped)
    assert shipped["curve"][-1]["step"] == solved.last.step == 150
    assert shipped["seed"] == 1
    assert shipped["parameters"] == sum(weight.numel() for weight in mp.load("zoo:small").state_dict().values())
    assert shipped["engine"] == ["cpu on cpu"]
    assert shipped["versions"]["torch"] == torch.__version__
    assert shipped["task"] == {
        "name": "mqar", "batch": 32, "length": 12, "n_pairs": 2, "vocab": 12, "power_a": 0.01, "filler": "zero",
        "n_keys": 2,
    }  # fmt: skip


def test_loaded_weights_are_the_trained_ones_and_can_be_probed(shipped, solved):
    model = mp.load("zoo:small")
    for name, weight in solved.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    with mp.attach(model) as probe:
        trace = probe.record(held_out(solved.config, "test", 0))
    assert trace.attrs["family"] == "mamba2"


def test_names_hold_what_is_there_and_a_trained_one_is_not_built(shipped, tmp_path):
    assert zoo.names() == ["mqar-mamba1", "small"]
    with pytest.raises(ValueError, match="small was trained, not written down: no command trains it again"):
        zoo.build("small", tmp_path / "again")


def test_larger_than_the_limit_is_refused_by_name_unless_told(solved, shipped, tmp_path):
    with pytest.raises(ValueError, match=r"the weights of small take [\d,]+ bytes, more than limit=1,000"):
        zoo.save(solved.model, shipped, tmp_path / "large", limit=1000)
    assert not (tmp_path / "large").exists()
    zoo.save(solved.model, shipped, tmp_path / "large", limit=1_000_000)


def test_what_the_zoo_refuses_to_write(solved, shipped, tmp_path):
    with pytest.raises(ValueError, match="lacks what, license"):
        zoo.save(solved.model, {k: v for k, v in shipped.items() if k not in ("what", "license")}, tmp_path / "new")
    with pytest.raises(ValueError, match=r"holds config.json and model.safetensors and card.json: .*overwrite=True"):
        zoo.save(solved.model, shipped, tmp_path / "small")
    broken = initial(solved.config)
    broken.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"zoo: small: weights must be finite; lm_head.weight has 1"):
        zoo.save(broken, shipped, tmp_path / "new")
    with pytest.raises(ValueError, match="no block or language model"):
        zoo.save(torch.nn.Linear(2, 2), shipped, tmp_path / "new")


def test_an_unfinished_training_gets_no_card(config):
    with pytest.raises(ValueError, match="a card is of a finished training; this one ended by 'until'"):
        describe(train(config, until=3), "x", "x", regenerate="x")


def test_of_very_long_rows_fewer_batches_are_counted_and_the_card_says_so(solved, monkeypatch):
    size = solved.config.draw(solved.config.batch, 0).input_ids.size
    monkeypatch.setattr("mamba_probe.training.card.TOKENS", 3 * size + 1)
    counted = describe(solved, "x", "x", regenerate="x", unseen_batches=5)["accuracy"]
    assert counted["batches"] == 3
    assert (counted["correct"], counted["total"]) == answered(solved.model, solved.config, "test", 3)


def test_the_commit_given_is_the_commit_said(solved):
    assert describe(solved, "x", "x", regenerate="x", unseen_batches=1, commit="abc")["commit"] == "abc"


@pytest.fixture
def recipe(config):
    return Recipe("tiny", "A tiny model.", config, expected=(0.0, 0.9), learning_rates=(1e-3, 1e-2), trial=3)


def test_a_recipe_is_trained_in_parts_written_to_the_zoo_and_then_left_alone(recipe, tmp_path):
    first = run(recipe, tmp_path, seconds=0.0)
    assert (first.state, first.accuracy) == ("to be resumed", None)
    done = run(recipe, tmp_path)
    assert (done.state, done.as_expected) == ("trained", True)
    card = json.loads((tmp_path / "zoo" / "tiny" / "card.json").read_text())
    assert card["accuracy"]["value"] == done.accuracy
    assert set(card["trials"]) == {"0.001", "0.01"}
    model = mp.load(tmp_path / "zoo" / "tiny")
    assert answered(model, recipe.config, "test", 16)[0] == card["accuracy"]["correct"]
    again = run(recipe, tmp_path)
    assert replace(again, seconds=0) == replace(done, seconds=0)


def test_recipes_out_of_time_each_get_their_share_and_unknown_ones_are_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    monkeypatch.setitem(RECIPES, "twin", replace(recipe, name="twin", expected=(0.9, 1.0)))
    tiny, twin = run_all(["tiny", "twin", "tiny"], tmp_path, seconds=60.0)
    assert (tiny.as_expected, twin.as_expected) == (True, False)
    assert isinstance(tiny, Outcome)
    with pytest.raises(ValueError, match=r"unknown recipe 'tyni': .*tiny"):
        run_all(["tyni"], tmp_path)
    with pytest.raises(ValueError, match="name recipes, or all"):
        run_all([], tmp_path)


def test_one_that_diverges_or_is_refused_says_so_and_stops_no_other(recipe, tmp_path, monkeypatch):
    wild = replace(recipe, name="wild", learning_rates=(1e30,), config=replace(recipe.config, clip=None, warmup=0))
    for each in (recipe, wild, replace(recipe, name="twin")):
        monkeypatch.setitem(RECIPES, each.name, each)
    train(replace(recipe.config, seed=9, learning_rate=1e-3), tmp_path / "runs" / "tiny" / "rate-0.001", until=3)
    tiny, wild, twin = run_all(["tiny", "wild", "twin"], tmp_path)
    assert tiny.state.startswith("refused: ")
    assert "another training (seed 9, not 5)" in tiny.state
    assert (wild.state, twin.state) == ("diverged", "trained")
    assert [folder.name for folder in (tmp_path / "zoo").iterdir()] == ["twin"]


def test_the_shipped_recipes_hold_what_the_zoo_is_to_hold():
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        with torch.device("meta"):
            size = sum(4 * parameter.numel() for parameter in recipe.config.build().parameters())
        assert size < zoo.LIMIT - 10_000, name
        trial = recipe.trial or recipe.config.every
        assert trial % recipe.config.every == 0
    solving = [RECIPES[f"trained-mqar-{kind}"] for kind in ("mamba1", "mamba2", "s4d")]
    for recipe in solving:
        task = recipe.config.task
        assert (task["length"] >= 64, task["n_pairs"] >= 8, task["vocab"] // 2 >= 128) == (True, True, True)
        assert recipe.expected[0] >= 0.95
    assert RECIPES["trained-mqar-no-conv"].config.mixer["d_conv"] == 1


def test_the_command_lists_the_recipes(tmp_path):
    command = [sys.executable, "-m", "mamba_probe.training"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert all(f"{name}: {recipe.what}" in listed.stdout for name, recipe in RECIPES.items())


def test_the_commands_exit_codes(recipe, tmp_path, monkeypatch, capsys):
    """0 once all is trained, 3 where something is to be resumed, 2 for wrong input."""
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    with pytest.raises(typer.Exit) as left:
        main(["tiny"], tmp_path, budget=0.0)
    assert left.value.exit_code == 3
    main(["tiny"], tmp_path)
    assert "trained" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as wrong:
        main(["tyni"], tmp_path)
    assert wrong.value.exit_code == 2
    assert "error: unknown recipe 'tyni'" in capsys.readouterr().err
