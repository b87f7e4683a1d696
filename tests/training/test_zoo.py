"""The trained checkpoints that ship: what their cards say, their weights answer, on the cards' rows and on others."""

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm

import mamba_probe as mp
from mamba_probe import zoo
from mamba_probe.training import RECIPES, Config, answered
from mamba_probe.training.card import UNSEEN_BATCHES

TRAINED = [name for name in zoo.names() if name.startswith("trained-")]
LENGTHY = (
    "trained-induction-mamba1",
    "trained-keep-mamba1-1024",
    "trained-keep-s4d-1024",
    "trained-keep-s4d-256",
    "trained-mqar-s4d",
)
EACH = [pytest.param(name, marks=[pytest.mark.long] if name in LENGTHY else []) for name in TRAINED]


def as_trained(name):
    """The card's config on a CPU, and its model with the shipped weights: S4D by its convolution, as in training."""
    config = Config(**zoo.card(name)["config"] | {"device": "cpu"})
    model = config.build()
    model.load_state_dict(load_file(zoo.path(name) / "model.safetensors"), strict=True)
    return model.eval(), config


def test_every_recipe_is_shipped_and_nothing_else():
    assert set(TRAINED) == set(RECIPES)


@pytest.mark.parametrize("name", EACH)
def test_the_cards_accuracy_is_that_of_its_weights(name):
    """Counted on a GPU, and again here: equal but for ties of the largest logit."""
    said = zoo.card(name)["accuracy"]
    assert said["batches"] == UNSEEN_BATCHES
    correct, total = answered(*as_trained(name), "test", said["batches"])
    assert total == said["total"]
    assert abs(correct - said["correct"]) <= 2


@pytest.mark.parametrize("name", TRAINED)
def test_its_accuracy_is_as_great_on_rows_that_no_one_has_drawn(name):
    """A training of another seed has other test rows; the difference is within 4 sd of two binomial draws."""
    model, config = as_trained(name)
    said = zoo.card(name)["accuracy"]
    batches = 4 if config.task["length"] <= 64 else 1
    other = Config(**zoo.card(name)["config"] | {"device": "cpu", "seed": 1_000})
    correct, total = answered(model, other, "test", batches)
    pooled = (correct + said["correct"]) / (total + said["total"])
    spread = (pooled * (1 - pooled) * (1 / total + 1 / said["total"])) ** 0.5
    assert abs(correct / total - said["value"]) <= norm.isf(3e-5) * spread


@pytest.mark.parametrize("name", TRAINED)
def test_its_card_is_of_its_recipe(name):
    card, recipe = zoo.card(name), RECIPES[name]
    given = Config(**card["config"])
    assert Config(**card["config"] | {"device": "cpu", "learning_rate": recipe.config.learning_rate}) == recipe.config
    assert given.learning_rate in recipe.learning_rates
    assert sorted(card["trials"]) == sorted(f"{rate:.3g}" for rate in recipe.learning_rates)
    least, most = recipe.expected
    assert least <= card["accuracy"]["value"] <= most
    assert (card["what"], card["engine"][0].split()[-1]) == (recipe.what, "cuda")
    assert card["commit"] not in ("unknown", "")


@pytest.mark.parametrize("name", ["trained-mqar-mamba1", "trained-mqar-mamba2", "trained-keep-s4d-64"])
def test_loaded_by_its_name_it_is_the_trained_model_and_takes_a_probe(name):
    model, config = as_trained(name)
    task = config.draw(2, 5)
    loaded = mp.load(f"zoo:{name}")
    with mp.attach(loaded) as probe:
        trace, parity = probe.record(task), probe.parity(task.input_ids)
    wanted = model(torch.from_numpy(task.input_ids)).logits.argmax(-1).numpy()
    assert (trace.prediction.values == wanted).mean() > 0.99
    assert float(parity.out_vs_native.max()) < 1e-5
