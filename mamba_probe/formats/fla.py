"""flash-linear-attention's MambaForCausalLM and Mamba2ForCausalLM, in transformers' classes.

| key in the file | key in the module |
|---|---|
| backbone.embeddings.weight, or backbone.embedding.weight | backbone.embeddings.weight |
| backbone.layers.N.norm.weight, backbone.layers.N.mixer.*, backbone.norm_f.weight, lm_head.weight | the same |

The names are transformers', `model_type` too, but the fields are not: fla's `norm_eps` is `layer_norm_epsilon`, its
`dt_limit` is `time_step_limit`, and its defaults differ (untied head, residual in the weights' dtype for Mamba-1), so
that transformers' own loader would change the model without a word. A config is fla's if it has one of `MARKS`.

Source of names and fields: fla-org/flash-linear-attention, `fla/models/mamba/{configuration,modeling}_mamba.py`,
`fla/models/mamba2/{configuration,modeling}_mamba2.py` and `fla/layers/mamba{,2}.py`. As there, Mamba-1 always has SiLU
and a bias in its convolution. Its mixers return a tuple and clamp delta in decoding, which belongs to a live model of
fla's, not to a checkpoint. Refused by name: n_groups > 1, where fla's fused path norms by group and its other one over
all channels.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats import hf
from mamba_probe.formats.build import HEAD, build, configure, language_model
from mamba_probe.formats.fields import refuse_values, rename, whole
from mamba_probe.formats.recipe import Recipe

__all__ = ["MARKS", "NAME", "convert", "matches"]

NAME = "fla"
MARKS = ("fuse_cross_entropy", "fuse_norm", "norm_eps")
"""Fields that fla's configs have and transformers' have not."""

_SAME = (
    *("vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand", "conv_kernel", "use_bias"),
    *("residual_in_fp32", "tie_word_embeddings", "initializer_range", "time_step_min", "time_step_max"),
    *("time_step_floor", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_COMMON = {name: name for name in _SAME} | {"norm_eps": "layer_norm_epsilon"}
_TABLE = {
    "mamba": _COMMON | {name: name for name in ("time_step_rank", "time_step_scale", "time_step_init_scheme")},
    "mamba2": _COMMON
    | {name: name for name in ("head_dim", "n_groups", "chunk_size", "use_conv_bias", "hidden_act", "time_step_limit")}
    | {"dt_limit": "time_step_limit", "dt_min": "time_step_min", "dt_max": "time_step_max"}
    | {"dt_init_floor": "time_step_floor"},
}
_DEFAULT = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 48, "norm_eps": 1e-5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "expand": 2, "conv_kernel": 4, "use_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
_DEFAULTS = {
    "mamba": _DEFAULT | {"state_size": 16, "residual_in_fp32": False, "time_step_rank": "auto"},
    "mamba2": _DEFAULT
    | {"state_size": 128, "residual_in_fp32": True, "head_dim": 64, "n_groups": 1, "chunk_size": 256}
    | {"use_conv_bias": True, "hidden_act": "silu"},
}
_ONLY = {
    "mamba": {},
    "mamba2": {"n_groups": (1,), "D_has_hdim": (False,), "norm_before_gate": (False,), "rmsnorm": (True,)},
}


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is fla's config of a Mamba.

    Source: ours.

    Example:
        >>> matches({"model_type": "mamba", "fuse_cross_entropy": True}, []), matches({"model_type": "mamba"}, [])
        (True, False)
    """
    return config.get("model_type") in _TABLE and any(mark in config for mark in MARKS)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of transformers' class: with a head if the weights have one, else the backbone.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field has a value that transformers' class cannot represent (named).

    Example:
        >>> config = {"model_type": "mamba", "fuse_cross_entropy": True, "norm_eps": 1e-6}
        >>> convert(config, {"lm_head.weight": Tensor(4, 8)}, "here").module.config.layer_norm_epsilon
        1e-06
    """
    family = config["model_type"]
    refuse_values(config, _ONLY[family], where)
    if "time_step_limit" in config and "dt_limit" in config:
        raise ValueError(f"{where}: config.json has both dt_limit and time_step_limit; keep that of its fla release.")
    fields = rename(config, _TABLE[family], _DEFAULTS[family])
    if family == "mamba":
        fields |= {"use_conv_bias": True, "hidden_act": "silu"}
    else:
        fields["num_heads"] = _heads(fields, config, where)
    made, named = configure(family, fields, where), hf.rename(weights, where)
    if any(name == HEAD or name.startswith("backbone.") for name in named):
        return language_model(made, named, where)
    return Recipe(build(made, "backbone"), named)


def _heads(fields: Mapping[str, Any], config: Mapping[str, Any], where: str) -> int:
    sizes = [whole(name, fields[name], where) for name in ("hidden_size", "expand", "head_dim")]
    heads = sizes[0] * sizes[1] // sizes[2]
    refuse_values(config, {"num_heads": (heads,)}, where, why="it is expand * hidden_size / head_dim")
    return heads
