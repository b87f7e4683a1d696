"""Mamba-Codestral as Mistral gives it out: `params.json` and `consolidated.safetensors`.

| key in the file | key in the module |
|---|---|
| model.backbone.embedding.weight | backbone.embeddings.weight |
| model.backbone.layers.N.*, model.backbone.norm_f.weight, model.lm_head.weight | the same without `model.` |

Source of names and fields: mistralai/mistral-inference, `src/mistral_inference/mamba.py` (which wraps mamba_ssm's
MambaLMHeadModel as `model`) and `args.py`. What `params.json` does not say has mamba_ssm's default: Mamba-2 with 128
states, heads of 64, chunks of 256.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats import state_spaces
from mamba_probe.formats.fields import refuse_unknown
from mamba_probe.formats.pretrained import Pretrained
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "PREFIX", "convert", "matches"]

NAME = "mamba-codestral"
PREFIX = "model."

_SAME = ("vocab_size", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings")
_FIELDS = ("dim", "n_layers", "n_groups", "model_type", *_SAME)


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is Mistral's config of a Mamba: `dim`, `n_layers` and `n_groups`.

    Source: ours.

    Example:
        >>> matches({"dim": 8, "n_layers": 1, "n_groups": 1}, []), matches({"model_type": "mamba"}, [])
        (True, False)
    """
    return {"dim", "n_layers", "n_groups"} <= set(config)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe | Pretrained:
    """Recipe of Mamba2ForCausalLM.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field is missing or unknown, a name lacks the prefix, or see `state_spaces.convert`.

    Example:
        >>> config = {"dim": 64, "n_layers": 1, "n_groups": 1, "vocab_size": 8, "rms_norm": True,
        ...           "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1,
        ...           "tie_embeddings": False}
        >>> type(convert(config, {}, "here").module).__name__
        'Mamba2ForCausalLM'
    """
    refuse_unknown(config, _FIELDS, where)
    missing = [name for name in _FIELDS if name not in config and name != "model_type"]
    if missing:
        raise ValueError(f"{where}: params.json must give {', '.join(missing)} too.")
    bare = [name for name in weights if not name.startswith(PREFIX)]
    if bare:
        raise ValueError(f"{where}: names of a Mamba-Codestral start with {PREFIX!r}, but the weights hold {bare[:5]}.")
    original = {name: config[name] for name in _SAME} | {
        "d_model": config["dim"],
        "n_layer": config["n_layers"],
        "ssm_cfg": {"layer": "Mamba2", "ngroups": config["n_groups"]},
    }
    named = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    return state_spaces.convert(original, named, where)
