"""Where transformers' own loaders go wrong in silence or with a puzzle, ours loads, or says what is the matter."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mamba_probe.loading import load


def test_autoconfig_does_not_know_a_state_spaces_directory(kit, family, tmp_path):
    source = kit.tiny(family, tie_word_embeddings=True)
    kit.write(tmp_path, kit.ORIGINAL[family], kit.original_weights(source))
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoConfig.from_pretrained(tmp_path)
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(source))


@pytest.mark.parametrize("tied", [True, False])
def test_original_keys_under_a_transformers_config_would_have_random_embeddings(kit, family, tied, tmp_path, capfd):
    """from_pretrained raises nothing: it makes up the embeddings. Ours renames them."""
    source = kit.tiny(family, tie_word_embeddings=tied)
    weights = kit.original_weights(source)
    if tied:
        del weights["lm_head.weight"]
    kit.write(tmp_path, json.loads(source.config.to_json_string()), weights, "model.safetensors")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] >= {"backbone.embeddings.weight"}
    assert not torch.equal(theirs.backbone.embeddings.weight, source.backbone.embeddings.weight)
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(source))


def test_a_lost_tensor_would_have_been_made_up(kit, family, tmp_path):
    source = kit.tiny(family)
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items() if name != "backbone.norm_f.weight"}
    kit.write(tmp_path, json.loads(source.config.to_json_string()), weights)
    assert not torch.equal(kit.logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), kit.logits(source))
    with pytest.raises(ValueError, match=r"missing backbone.norm_f.weight"):
        load(tmp_path)
