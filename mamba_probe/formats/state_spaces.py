"""Original state-spaces directories (mamba_ssm's MambaLMHeadModel): Mamba-1 and Mamba-2 language models.

| key in the file | key in the module |
|---|---|
| backbone.embedding.weight | backbone.embeddings.weight |
| backbone.layers.N.norm.weight, backbone.layers.N.mixer.*, backbone.norm_f.weight | the same |
| lm_head.weight, a copy of the embedding when `tie_embeddings` | lm_head.weight, shared when tied |

Fields and their defaults are those of mamba_ssm (`models/config_mamba.py`, `modules/mamba_simple.py`,
`modules/mamba2.py`, https://github.com/state-spaces/mamba). Refused by name, since no class of transformers has them:
`D_has_hdim`, `norm_before_gate`, `rmsnorm=False`, a `d_ssm` below expand * d_model, and `rms_norm=False`. The
vocabulary is padded up to a multiple of `pad_vocab_size_multiple`, as there. The original holds no special token ids:
pad, bos and eos stay None.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats import hf, state_spaces_hybrid
from mamba_probe.formats.build import configure, language_model
from mamba_probe.formats.fields import refuse_unknown, refuse_values, rename, whole
from mamba_probe.formats.pretrained import Pretrained
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "convert", "matches", "translate"]

NAME = "state-spaces"

_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
_TOP = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "residual_in_fp32": "residual_in_fp32",
    "tie_embeddings": "tie_word_embeddings",
}
_TOP_DEFAULT = {"residual_in_fp32": True, "tie_embeddings": True}
_TOP_ONLY = {"rms_norm": (True,)}
_TOP_OTHER = (
    *("vocab_size", "pad_vocab_size_multiple", "ssm_cfg", "fused_add_norm"),
    *("d_intermediate", "attn_layer_idx", "attn_cfg"),
)

_COMMON = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}
_COMMON_DEFAULT = {"d_conv": 4, "expand": 2, "bias": False, "conv_bias": True}
_SSM = {
    "mamba": _COMMON | {"dt_rank": "time_step_rank", "dt_init": "time_step_init_scheme", "dt_scale": "time_step_scale"},
    "mamba2": _COMMON
    | {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit", "chunk_size": "chunk_size"},
}
_SSM_DEFAULT = {
    "mamba": _COMMON_DEFAULT | {"d_state": 16, "dt_rank": "auto"},
    "mamba2": _COMMON_DEFAULT
    | {"d_state": 128, "headdim": 64, "ngroups": 1, "dt_limit": (0.0, float("inf")), "chunk_size": 256},
}
_SSM_ONLY = {
    "mamba": {},
    "mamba2": {"D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,), "process_group": (None,)},
}
_SSM_OTHER = {
    "mamba": ("layer", "use_fast_path"),
    "mamba2": ("layer", "use_mem_eff_path", "sequence_parallel", "A_init_range", "conv_init", "d_ssm"),
}
"""`_X_ONLY`: the values that the class can represent. `_X_OTHER`: read apart, or without effect on the function."""


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is an original config: no model_type, but d_model, n_layer and vocab_size.

    Source: ours.

    Example:
        >>> matches({"d_model": 8, "n_layer": 1, "vocab_size": 10}, []), matches({"model_type": "mamba"}, [])
        (True, False)
    """
    return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= set(config)


def translate(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The family and the fields of transformers' config that an original config stands for.

    Source: mamba_ssm, see the module's head.

    Args:
        config: the original config.json.
        where: the checkpoint's place, for error messages.

    Raises:
        ValueError: a field is unknown, or has a value that transformers' class cannot represent (named).

    Example:
        >>> family, fields = translate({"d_model": 8, "n_layer": 1, "vocab_size": 10}, "here")
        >>> family, fields["vocab_size"], fields["state_size"]
        ('mamba', 16, 16)
    """
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise ValueError(f"{where}: config.json: ssm_cfg must be a dictionary, got {ssm!r}.")
    family = _family(ssm.get("layer", "Mamba1"), where)
    refuse_unknown(config, (*_TOP, *_TOP_ONLY, *_TOP_OTHER), where)
    refuse_values(config, _TOP_ONLY, where)
    refuse_unknown(ssm, (*_SSM[family], *_SSM_ONLY[family], *_SSM_OTHER[family]), where, "ssm_cfg.")
    refuse_values(ssm, _SSM_ONLY[family], where, "ssm_cfg.")
    fields = rename(config, _TOP, _TOP_DEFAULT) | rename(ssm, _SSM[family], _SSM_DEFAULT[family])
    fields |= {"vocab_size": _padded_vocabulary(config, where), "layer_norm_epsilon": 1e-5, "hidden_act": "silu"}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return family, fields | (_heads(fields, ssm, where) if family == "mamba2" else {})


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe | Pretrained:
    """Recipe of transformers' language model for an original checkpoint; a hybrid is one of Bamba.

    Source: ours; the tables are at the module's head and that of `state_spaces_hybrid`.

    Raises:
        ValueError: see `translate`; or the head is tied and differs from the embedding.

    Example:
        >>> recipe = convert({"d_model": 8, "n_layer": 1, "vocab_size": 10, "ssm_cfg": {}}, {}, "here")
        >>> type(recipe.module).__name__
        'MambaForCausalLM'
    """
    family, fields = translate(config, where)
    if state_spaces_hybrid.is_hybrid(config):
        return state_spaces_hybrid.convert(config, fields, family, weights, where)
    return language_model(configure(family, fields, where), hf.rename(weights, where), where)


def _family(layer: Any, where: str) -> str:
    if not isinstance(layer, str) or layer not in _LAYERS:
        raise ValueError(
            f"{where}: config.json: ssm_cfg.layer {layer!r} is not supported; supported are {sorted(_LAYERS)}."
        )
    return _LAYERS[layer]


def _padded_vocabulary(config: Mapping[str, Any], where: str) -> int:
    size = whole("vocab_size", config["vocab_size"], where)
    multiple = whole("pad_vocab_size_multiple", config.get("pad_vocab_size_multiple", 8), where)
    return -(-size // multiple) * multiple


def _heads(fields: Mapping[str, Any], ssm: Mapping[str, Any], where: str) -> dict[str, int]:
    sizes = {name: fields[name] for name in ("hidden_size", "expand", "head_dim")}
    if not all(isinstance(value, int) and value > 0 for value in sizes.values()):
        raise ValueError(f"{where}: config.json: d_model, expand and headdim must be whole numbers >= 1, got {sizes}.")
    width = fields["hidden_size"] * fields["expand"]
    if ssm.get("d_ssm") not in (None, width):
        raise ValueError(
            f"{where}: config.json: ssm_cfg.d_ssm={ssm['d_ssm']!r} is not supported, only expand * d_model = {width} "
            "is: transformers' class has no gated MLP beside the SSM."
        )
    if width % fields["head_dim"]:
        raise ValueError(
            f"{where}: config.json: expand * d_model must be a multiple of headdim, got {width} and "
            f"{fields['head_dim']}."
        )
    return {"num_heads": width // fields["head_dim"]}
