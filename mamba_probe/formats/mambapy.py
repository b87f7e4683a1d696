"""mamba.py (the package mambapy): LM around its Mamba or Mamba2, and their dataclass as config.json.

| key in the file | key in the module |
|---|---|
| embedding.weight | backbone.embeddings.weight |
| mamba.layers.N.norm.weight, mamba.layers.N.mixer.* | backbone.layers.N.norm.weight, backbone.layers.N.mixer.* |
| norm_f.weight | backbone.norm_f.weight |
| lm_head.weight, not shared | lm_head.weight |
| mamba.layers.N.mixer.{dt,B,C}_layernorm.weight (`inner_layernorms`; Jamba's dt_, b_, c_layernorm) | refused |
| mamba.layers.N.mixer.init_states (`learnable_init_states`) | refused |

Source of names and fields: alxndrTL/mamba.py, `mambapy/lm.py` (LM), `mambapy/mamba.py` (MambaConfig) and
`mambapy/mamba2.py` (Mamba2Config, known by `d_head`). config.json holds the dataclass (`asdict` or `vars`) and LM's
`vocab_size` and `pad_vocab_size_multiple`. Refused by name: muP, which divides the logits and has no norm weights; the
inner norms, since the only class with them, Jamba, has an MLP in every layer; learned initial states; and n_groups > 1,
where the library's fused path norms by group and its step does not.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mamba_probe.formats.build import configure, language_model
from mamba_probe.formats.fields import refuse_unknown, refuse_values, rename, whole
from mamba_probe.formats.recipe import Recipe

__all__ = ["NAME", "PREFIX", "convert", "matches"]

NAME = "mamba.py"
PREFIX = "mamba.layers."

_COMMON = {
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "d_state": "state_size", "expand_factor": "expand",
    "d_conv": "conv_kernel", "bias": "use_bias", "conv_bias": "use_conv_bias", "rms_norm_eps": "layer_norm_epsilon",
    "dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor",
}  # fmt: skip
_DEFAULT = {"expand_factor": 2, "d_conv": 4, "bias": False, "conv_bias": True, "rms_norm_eps": 1e-5}
_TABLE = {
    "mamba": _COMMON | {"dt_rank": "time_step_rank", "dt_scale": "time_step_scale", "dt_init": "time_step_init_scheme"},
    "mamba2": _COMMON
    | {"d_head": "head_dim", "n_groups": "n_groups", "dt_limit": "time_step_limit", "chunk_size": "chunk_size"},
}
_DEFAULTS = {
    "mamba": _DEFAULT | {"d_state": 16, "dt_rank": "auto"},
    "mamba2": _DEFAULT | {"d_state": 64, "n_groups": 1, "dt_limit": (0.0, float("inf")), "chunk_size": 256},
}
_ONLY = {
    "mamba": {"mup": (False,), "inner_layernorms": (False,)},
    "mamba2": {
        "mup": (False,), "learnable_init_states": (False,), "activation": ("swish", "silu"), "n_groups": (1,),
        "rms_norm_eps": (1e-5,),
    },
}  # fmt: skip
_OTHER = {
    "mamba": ("pscan", "use_cuda"),
    "mamba2": ("A_init_range", "conv_init", "use_mem_eff_path", "dtype", "device", "n_heads"),
}
_ANYWAY = ("vocab_size", "pad_vocab_size_multiple", "d_inner", "base_std", "mup_base_width", "mup_width_mult")


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether names start with `mamba.layers.`.

    Source: ours.

    Example:
        >>> matches({}, ["mamba.layers.0.norm.weight"]), matches({}, ["backbone.layers.0.norm.weight"])
        (True, False)
    """
    return "model_type" not in config and any(name.startswith(PREFIX) for name in keys)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of MambaForCausalLM or Mamba2ForCausalLM, its head its own.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field is missing or unknown, or has a value that transformers' class cannot represent (named).

    Example:
        >>> type(convert({"d_model": 8, "n_layers": 1, "vocab_size": 8}, {}, "here").module).__name__
        'MambaForCausalLM'
    """
    family = "mamba2" if "d_head" in config else "mamba"
    refuse_unknown(config, (*_TABLE[family], *_ONLY[family], *_OTHER[family], *_ANYWAY), where)
    refuse_values(config, _ONLY[family], where)
    missing = [name for name in ("d_model", "n_layers", "vocab_size") if name not in config]
    if missing:
        raise ValueError(
            f"{where}: config.json must give {', '.join(missing)} too (LM's vocab_size beside the others)."
        )
    fields = rename(config, _TABLE[family], _DEFAULTS[family])
    fields |= {"residual_in_fp32": False, "tie_word_embeddings": False, "hidden_act": "silu"}
    fields |= {"vocab_size": _padded(config, where)} | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if family == "mamba2":
        fields["num_heads"] = _heads(fields, where)
    named = {_renamed(name): tensor for name, tensor in weights.items()}
    return language_model(configure(family, fields, where), named, where)


def _renamed(name: str) -> str:
    if name == "embedding.weight":
        return "backbone.embeddings.weight"
    return name if name.startswith("lm_head.") else "backbone." + name.removeprefix("mamba.")


def _padded(config: Mapping[str, Any], where: str) -> int:
    size, multiple = whole("vocab_size", config["vocab_size"], where), config.get("pad_vocab_size_multiple")
    return size if multiple is None else -(-size // whole("pad_vocab_size_multiple", multiple, where)) * multiple


def _heads(fields: Mapping[str, Any], where: str) -> int:
    sizes = [whole(name, fields[name], where) for name in ("hidden_size", "expand", "head_dim")]
    width = sizes[0] * sizes[1]
    if width % sizes[2]:
        raise ValueError(f"{where}: config.json: expand_factor * d_model = {width} must be a multiple of d_head.")
    return width // sizes[2]
