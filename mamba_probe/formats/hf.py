"""transformers' directories: MambaForCausalLM, MambaModel, Mamba2ForCausalLM and Mamba2Model.

Keys (language model; a backbone has them without `backbone.` and without the head):

| key in the file | key in the module |
|---|---|
| backbone.embeddings.weight, or backbone.embedding.weight in early conversions | backbone.embeddings.weight |
| backbone.layers.N.norm.weight, backbone.layers.N.mixer.*, backbone.norm_f.weight | the same |
| lm_head.weight; absent when tied | lm_head.weight |
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats.build import HEAD, agree, build, configure, language_model
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "RENAMED", "convert", "matches", "rename"]

NAME = "transformers"
RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight", "embedding.weight": "embeddings.weight"}


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is a transformers checkpoint of Mamba or Mamba-2.

    Source: ours.

    Example:
        >>> matches({"model_type": "mamba2"}, ["backbone.embeddings.weight"]), matches({"d_model": 8}, [])
        (True, False)
    """
    from mamba_probe.formats import mixer

    return config.get("model_type") in ("mamba", "mamba2") and not mixer.matches(config, keys)


def rename(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give the original names transformers' spelling.

    Source: ours; `RENAMED` is the table.

    Raises:
        ValueError: a tensor is there under both names.

    Example:
        >>> list(rename({"backbone.embedding.weight": Tensor([1.0])}, "here"))
        ['backbone.embeddings.weight']
    """
    both = [name for name in weights if RENAMED.get(name) in weights]
    if both:
        raise ValueError(f"{where}: the weights hold both {both[0]} and {RENAMED[both[0]]}; keep one.")
    return {RENAMED.get(name, name): tensor for name, tensor in weights.items()}


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of transformers' class for these weights: with a head if they have one, else the backbone.

    Source: ours. Code named by `auto_map` is never run: transformers' own class is built, with a warning.

    Raises:
        ValueError: the config is invalid or contradicts the weights.

    Example:
        >>> config = {"model_type": "mamba", "hidden_size": 8, "vocab_size": 4, "num_hidden_layers": 1}
        >>> type(convert(config, {"embedding.weight": Tensor(4, 8)}, "here").module).__name__
        'MambaModel'
    """
    named = rename(weights, where)
    role = "language_model" if any(name == HEAD or name.startswith("backbone.") for name in named) else "backbone"
    agree(config, role, where)
    if "auto_map" in config:
        warnings.warn(f"{where}: the code that `auto_map` names is not run; transformers' own is.", stacklevel=4)
    values = {name: value for name, value in config.items() if name not in ("auto_map", "model_type")}
    made = configure(config["model_type"], values, where)
    return language_model(made, named, where) if role == "language_model" else Recipe(build(made, role), named)
