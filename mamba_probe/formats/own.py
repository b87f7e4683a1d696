"""Our own blocks' directories (`mamba_probe.blocks`): S4D models, and Mamba-2 without its norm.

config.json holds `model_type` ("mamba_probe"), `mixers` (kind and sizes of each) and `vocab_size` (null for a bare
block); the weights are the module's own state dict, in upstream's names.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mamba_probe import blocks
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "convert", "matches"]

NAME = "mamba_probe"
FIELDS = {"model_type", "mixers", "vocab_size"}


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is a model of our own blocks.

    Source: ours.

    Example:
        >>> matches({"model_type": "mamba_probe"}, []), matches({"model_type": "mamba"}, [])
        (True, False)
    """
    return config.get("model_type") == blocks.MODEL_TYPE


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of the block or language model.

    Source: ours.

    Raises:
        ValueError: the config lacks a field, has one too many, or names a kind or size that cannot be.

    Example:
        >>> described = {"kind": "s4d", "d_model": 4, "d_state": 2}
        >>> config = {"model_type": "mamba_probe", "mixers": [described], "vocab_size": None}
        >>> type(convert(config, {}, "here").module).__name__
        'S4DBlock'
    """
    if set(config) != FIELDS:
        raise ValueError(f"{where}: config.json needs exactly the fields {sorted(FIELDS)}; got {sorted(config)}")
    try:
        with torch.device("meta"):
            return Recipe(blocks.build(config), weights)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: config.json: {error}") from error
