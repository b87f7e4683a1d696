"""A bare mixer's directory: transformers' MambaMixer or Mamba2Mixer alone, which takes hidden states.

config.json holds the fields of MambaConfig or Mamba2Config, `model_type` and `architectures` (["MambaMixer"] or
["Mamba2Mixer"]); the weights are the mixer's own state dict.

| key in the file | key in the module |
|---|---|
| A_log, D, in_proj.*, conv1d.*, out_proj.* | the same |
| x_proj.*, dt_proj.* (mamba); dt_bias, norm.weight (mamba2) | the same |
| the same after `mixer.` | without `mixer.` |
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats.build import agree, build, configure
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "PREFIX", "convert", "matches"]

NAME = "mixer"
PREFIX = "mixer."


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is a bare mixer: a Mamba config and A_log at the top of the state dict.

    Source: ours.

    Example:
        >>> matches({"model_type": "mamba"}, ["A_log", "D"]), matches({"model_type": "mamba"}, ["layers.0.mixer.A_log"])
        (True, False)
    """
    bare = "A_log" in keys or f"{PREFIX}A_log" in keys
    return config.get("model_type") in ("mamba", "mamba2") and bare


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of MambaMixer(config, layer_idx=0) or Mamba2Mixer(config, layer_idx=0).

    Source: ours.

    Raises:
        ValueError: the config is invalid or names another class.

    Example:
        >>> recipe = convert({"model_type": "mamba2", "hidden_size": 8, "num_heads": 4, "head_dim": 4, "n_groups": 1},
        ...                  {"A_log": Tensor(4)}, "here")
        >>> type(recipe.module).__name__
        'Mamba2Mixer'
    """
    agree(config, "mixer", where)
    values = {name: value for name, value in config.items() if name not in ("auto_map", "model_type")}
    made = configure(config["model_type"], values, where)
    prefixed = all(name.startswith(PREFIX) for name in weights)
    named = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()} if prefixed else weights
    return Recipe(build(made, "mixer"), named)
