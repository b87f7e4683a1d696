"""Directories of a bare mixer."""

import json

import pytest
import torch

from mamba_probe.loading import load

NAMES = {"mamba": "MambaMixer", "mamba2": "Mamba2Mixer"}


def bare(kit, family, folder, prefix="", **change):
    source = kit.tiny(family)
    config = json.loads(source.config.to_json_string()) | {"architectures": [NAMES[family]]} | change
    mixer = source.backbone.layers[1].mixer
    kit.write(folder, config, {prefix + name: tensor for name, tensor in mixer.state_dict().items()})
    return mixer


@pytest.mark.parametrize("prefix", ["", "mixer."])
def test_output_is_bit_equal(kit, family, prefix, tmp_path):
    source = bare(kit, family, tmp_path, prefix)
    mixer = load(tmp_path)
    assert type(mixer) is type(source)
    assert (mixer.layer_idx, mixer.training) == (0, False)
    assert mixer._mamba_probe_source["format"] == "mixer"
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(mixer(hidden), source(hidden))


def test_config_of_a_language_model_is_refused(kit, family, tmp_path):
    bare(kit, family, tmp_path, architectures=[NAMES[family].replace("Mixer", "ForCausalLM")])
    with pytest.raises(ValueError, match=r"ForCausalLM'\], but the weights are those of Mamba2?Mixer"):
        load(tmp_path)


def test_other_sizes_are_named(kit, tmp_path):
    bare(kit, "mamba", tmp_path, state_size=5)
    with pytest.raises(
        ValueError, match=r"do not fit MambaMixer:\n.*shape of A_log: expected \(32, 5\), got \(32, 4\)"
    ):
        load(tmp_path)
