"""Vim and Caduceus: recognised by their names and refused by name, before any module is built."""

import pytest
import torch

from mamba_probe.loading import load

VIM = (
    "layers.0.mixer.in_proj.weight",
    "layers.0.mixer.A_log",
    "layers.0.mixer.A_b_log",
    "layers.0.mixer.D_b",
    "cls_token",
)


@pytest.mark.parametrize("file", ["vim.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("config", [None, {"model_type": "mamba"}])
def test_vim(file, config, kit, tmp_path):
    weights = {"model": {name: torch.ones(2) for name in VIM}}
    if config is None:
        torch.save(weights, tmp_path / file)
    else:
        kit.write(tmp_path, config, {}, "x.bin")
        torch.save(weights, tmp_path / file)
    with pytest.raises(ValueError, match=r"this is Vim \(Vision Mamba\), whose layers scan in both directions"):
        load(tmp_path / file)


def test_caduceus_by_its_config_before_weights_are_read(kit, tmp_path):
    """Its complement_map is of integers, which are no weights: the config speaks first."""
    config = {"model_type": "caduceus", "d_model": 8, "n_layer": 1, "vocab_size": 12, "rcps": True}
    kit.write(tmp_path, config, {"lm_head.complement_map": torch.arange(12)})
    with pytest.raises(ValueError, match=r"this is Caduceus, which scans in both directions"):
        load(tmp_path)


@pytest.mark.parametrize("config", [None, {"d_model": 8, "n_layer": 1, "vocab_size": 12}])
def test_caduceus_by_its_names(kit, config, tmp_path):
    weights = {f"caduceus.backbone.layers.0.mixer.mamba_{way}.A_log": torch.ones(2) for way in ("fwd", "rev")}
    kit.write(tmp_path, config or {}, weights)
    if config is None:
        (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"this is Caduceus, .*probe its mixers live"):
        load(tmp_path)
