import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaForCausalLM

from mamba_probe import zoo
from mamba_probe.constructions import mqar as mqar_model
from mamba_probe.tasks import mqar

NAME = "mqar-mamba1"


def test_shipped_files_are_a_fresh_build_bit_for_bit(tmp_path):
    mqar_model(n_keys=128, n_values=128).save(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (zoo.path(NAME) / file).read_bytes()


@pytest.mark.long
def test_build_writes_the_shipped_card(tmp_path):
    zoo.build(NAME, tmp_path)
    assert json.loads((tmp_path / "card.json").read_text()) == zoo.card(NAME)


def test_card_tells_the_size_and_the_accuracy():
    card, weights = zoo.card(NAME), load_file(zoo.path(NAME) / "model.safetensors")
    assert card["parameters"] == sum(weight.numel() for weight in weights.values())
    assert card["accuracy"] == {"correct": 2048, "total": 2048, "value": 1.0}
    assert (card["task"]["batch"], card["task"]["n_pairs"], card["task"]["vocab"]) == (256, 8, 256)


def test_shipped_model_answers_rows_of_the_card():
    """The first rows of another seed, through transformers' own loader."""
    model = MambaForCausalLM.from_pretrained(zoo.path(NAME)).eval()
    task = mqar(batch=2, length=128, n_pairs=8, vocab=256, seed=zoo.card(NAME)["task"]["seed"] + 1)
    with torch.no_grad():
        predicted = model(torch.tensor(task.input_ids), use_cache=False).logits.argmax(-1)
    assert task.accuracy(predicted) == (16, 16)


def test_shipped_files_are_small():
    assert sum(file.stat().st_size for file in zoo.path(NAME).iterdir()) <= 2_000_000


@pytest.mark.parametrize("call", [zoo.path, zoo.card, lambda name: zoo.build(name, "nowhere")])
def test_unknown_name(call):
    with pytest.raises(ValueError, match=r"no checkpoint is named 'mqar-mamba'; did you mean 'mqar-mamba1'\?"):
        call("mqar-mamba")


def test_build_keeps_what_is_there(tmp_path):
    mqar_model(n_keys=4, n_values=4).save(tmp_path)
    with pytest.raises(ValueError, match="overwrite=True"):
        zoo.build(NAME, tmp_path)
