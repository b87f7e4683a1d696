"""mamba-minimal: the original's names without `backbone.`, and its ModelArgs as config.json.

| key in the file | key in the module |
|---|---|
| embedding.weight | backbone.embeddings.weight |
| layers.N.norm.weight, layers.N.mixer.*, norm_f.weight | the same after `backbone.` |
| lm_head.weight, always the embedding | lm_head.weight, shared |

Source of names and fields: johnma2006/mamba-minimal, `model.py` (`ModelArgs`, `Mamba`). config.json holds the fields of
ModelArgs (`vars(model.args)`), or is the original one beside which the weights were read: mamba-minimal then knows only
its d_model, n_layer and vocab_size, so that an `ssm_cfg` with anything in it is refused. The residual is added in the
weights' dtype, as there.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats import state_spaces
from mamba_probe.formats.fields import refuse_unknown, refuse_values
from mamba_probe.formats.pretrained import Pretrained
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "convert", "matches"]

NAME = "mamba-minimal"

_SSM = ("d_state", "expand", "dt_rank", "d_conv", "conv_bias", "bias")
_TOP = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")
_ONLY = {
    "ssm_cfg": ({},), "rms_norm": (True,), "tie_embeddings": (True,), "d_intermediate": (0,), "attn_layer_idx": ([],),
    "attn_cfg": ({},),
}  # fmt: skip
_WITHOUT_EFFECT = ("residual_in_fp32", "fused_add_norm")  # of an original config; mamba-minimal does not read them


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is an original config or ModelArgs, with names that lack `backbone.`.

    Source: ours.

    Example:
        >>> config = {"d_model": 8, "n_layer": 1, "vocab_size": 10}
        >>> matches(config, ["embedding.weight", "lm_head.weight"]), matches(config, ["backbone.embedding.weight"])
        (True, False)
    """
    return state_spaces.matches(config, keys) and {"embedding.weight", "lm_head.weight"} <= set(keys)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe | Pretrained:
    """Recipe of MambaForCausalLM.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field is unknown or has a value that mamba-minimal does not know, or see `state_spaces.convert`.

    Example:
        >>> type(convert({"d_model": 8, "n_layer": 1, "vocab_size": 8}, {}, "here").module).__name__
        'MambaForCausalLM'
    """
    refuse_unknown(config, (*_TOP, *_SSM, *_ONLY, *_WITHOUT_EFFECT, "d_inner"), where)
    refuse_values(config, _ONLY, where, why="mamba-minimal's own code does not read it")
    original = {name: config[name] for name in _TOP if name in config}
    original |= {"ssm_cfg": {name: config[name] for name in _SSM if name in config}, "residual_in_fp32": False}
    inner = {"d_inner": (config["d_model"] * config.get("expand", 2),)}
    refuse_values(config, inner, where, why="it is expand * d_model")
    return state_spaces.convert(original, {_renamed(name): tensor for name, tensor in weights.items()}, where)


def _renamed(name: str) -> str:
    return name if name.startswith("lm_head.") else f"backbone.{name}"
