"""Original state-spaces hybrids (mamba_ssm with `attn_layer_idx` or `d_intermediate`), held by BambaForCausalLM.

| key in the file | key in the module |
|---|---|
| backbone.embedding.weight | model.embed_tokens.weight |
| backbone.layers.N.norm.weight | model.layers.N.input_layernorm.weight |
| backbone.layers.N.norm2.weight | model.layers.N.pre_ff_layernorm.weight |
| backbone.layers.N.mixer.*, N not in attn_layer_idx | model.layers.N.mamba.* |
| backbone.layers.N.mixer.in_proj.*, N in attn_layer_idx: rows q, k, v | model.layers.N.self_attn.{q,k,v}_proj.* |
| backbone.layers.N.mixer.out_proj.*, N in attn_layer_idx | model.layers.N.self_attn.o_proj.* |
| backbone.layers.N.mlp.fc1.weight: rows value, gate | model.layers.N.feed_forward.up_proj.weight, gate_proj.weight |
| backbone.layers.N.mlp.fc2.weight | model.layers.N.feed_forward.down_proj.weight |
| backbone.norm_f.weight | model.final_layernorm.weight |
| lm_head.weight | lm_head.weight |

Source of names and sizes: state-spaces/mamba, `mamba_ssm/modules/mha.py`, `mlp.py`, `block.py` and
`models/mixer_seq_simple.py`. Bamba has Mamba-2 mixers, an MLP in every layer, and attention without a convolution: a
checkpoint that has it otherwise (mamba2attn-2.7b: a convolution in its attention, no MLP) is refused by name. Bamba
adds its residual in the weights' dtype, mamba_ssm in fp32 if `residual_in_fp32`: in fp32 they are the same.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mamba_probe.formats.build import HEAD
from mamba_probe.formats.fields import refuse_unknown, refuse_values, whole
from mamba_probe.formats.pretrained import Pretrained, configuration

__all__ = ["convert", "is_hybrid"]

_WHY = "transformers' Bamba, the closest class, cannot represent it"
_ATTENTION_ONLY = {
    "causal": (True,), "d_conv": (0,), "mlp_dim": (0,), "softmax_scale": (None,), "rotary_emb_interleaved": (False,),
}  # fmt: skip
_ATTENTION = (
    *("num_heads", "num_heads_kv", "head_dim", "qkv_proj_bias", "out_proj_bias", "rotary_emb_dim", "rotary_emb_base"),
    *_ATTENTION_ONLY,
)
_MULTIPLE = 128  # GatedMLP rounds its width up to a multiple of this
_RENAMED = {
    "norm": "input_layernorm", "norm2": "pre_ff_layernorm", "mixer.out_proj": "self_attn.o_proj",
    "mlp.fc2": "feed_forward.down_proj",
}  # fmt: skip
_SINGLE = {
    "backbone.embedding.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.final_layernorm.weight",
    HEAD: HEAD,
}


def is_hybrid(config: Mapping[str, Any]) -> bool:
    """Whether an original config names attention layers or MLPs.

    Source: ours.

    Example:
        >>> is_hybrid({"attn_layer_idx": [1]}), is_hybrid({"attn_layer_idx": [], "d_intermediate": 0})
        (True, False)
    """
    return bool(config.get("attn_layer_idx") or config.get("d_intermediate"))


def convert(
    config: Mapping[str, Any], fields: Mapping[str, Any], family: str, weights: dict[str, Tensor], where: str
) -> Pretrained:
    """Pretrained of BambaForCausalLM for an original hybrid.

    Source: ours; the table is at the module's head.

    Args:
        config: the original config.json.
        fields: what it stands for in Mamba2Config, from `state_spaces.translate`.
        family: "mamba" or "mamba2".
        weights: tensors under the original names.
        where: the checkpoint's place, for error messages.

    Raises:
        ValueError: the config names what Bamba cannot represent, or the weights hold a name that is not in the table.
    """
    if family != "mamba2":
        raise ValueError(
            f"{where}: config.json: attn_layer_idx or d_intermediate with ssm_cfg.layer 'Mamba1' is not supported: "
            "no class has plain Mamba-1 mixers beside attention or an MLP (Jamba's norm delta, B and C)."
        )
    attention = _attention(config, fields, where)
    if not config.get("d_intermediate"):
        raise ValueError(
            f"{where}: config.json: attn_layer_idx with d_intermediate=0 is not supported: transformers' Bamba, the "
            "closest class, has an MLP in every layer."
        )
    _warn_of_residual(fields, weights, where)
    import transformers

    made = configuration("bamba", _bamba(config, fields, where) | attention, where)
    return Pretrained(transformers.BambaForCausalLM, made, _renamed(config, made, weights, where))


def _warn_of_residual(fields: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> None:
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in weights.values())
    if half and fields["residual_in_fp32"]:
        warnings.warn(f"{where}: Bamba adds the residual in half precision, this checkpoint's own code in float32; "
                      "pass dtype=torch.float32 for the same numbers.", stacklevel=5)  # fmt: skip


def _layers(config: Mapping[str, Any], where: str) -> list[int]:
    layers, count = config.get("attn_layer_idx") or [], whole("n_layer", config["n_layer"], where)
    if not isinstance(layers, list) or not all(isinstance(one, int) and 0 <= one < count for one in layers):
        raise ValueError(f"{where}: config.json: attn_layer_idx must list layers 0 to {count - 1}, got {layers!r}.")
    return layers


def _attention(config: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bamba's fields of the attention layers; without such layers, sizes that only have to exist."""
    layers, given = _layers(config, where), config.get("attn_cfg") or {}
    if not layers:
        return {"attn_layer_indices": [], "num_attention_heads": 1, "num_key_value_heads": 1}
    refuse_unknown(given, _ATTENTION, where, "attn_cfg.")
    given = {"causal": False, "rotary_emb_dim": 0, "qkv_proj_bias": True, "out_proj_bias": True, **given}
    refuse_values(given, _ATTENTION_ONLY, where, "attn_cfg.", _WHY)
    refuse_values(
        given, {"out_proj_bias": (given["qkv_proj_bias"],)}, where, "attn_cfg.", _WHY + " beside qkv_proj_bias"
    )
    heads = whole("attn_cfg.num_heads", given.get("num_heads"), where)
    size = given.get("head_dim") or fields["hidden_size"] // heads
    if not 0 < given["rotary_emb_dim"] <= size:
        raise ValueError(
            f"{where}: config.json: attn_cfg.rotary_emb_dim={given['rotary_emb_dim']!r} is not supported, only 1 to "
            f"head_dim={size} is: Bamba's attention always rotates."
        )
    rope = {
        "rope_type": "default",
        "rope_theta": float(given.get("rotary_emb_base", 10000.0)),
        "partial_rotary_factor": given["rotary_emb_dim"] / size,
    }
    return {
        "attn_layer_indices": layers, "num_attention_heads": heads, "head_dim": size, "rope_parameters": rope,
        "num_key_value_heads": given.get("num_heads_kv") or heads, "attention_bias": given["qkv_proj_bias"],
    }  # fmt: skip


def _bamba(config: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "hidden_act", "time_step_limit")
    width = whole("d_intermediate", config["d_intermediate"], where)
    mamba = {
        "mamba_n_heads": "num_heads", "mamba_d_head": "head_dim", "mamba_n_groups": "n_groups",
        "mamba_d_state": "state_size", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
        "mamba_chunk_size": "chunk_size", "mamba_conv_bias": "use_conv_bias", "mamba_proj_bias": "use_bias",
    }  # fmt: skip
    return (
        {name: fields[name] for name in same}
        | {name: fields[source] for name, source in mamba.items()}
        | {"intermediate_size": -(-width // _MULTIPLE) * _MULTIPLE, "rms_norm_eps": fields["layer_norm_epsilon"]}
        | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    )


def _renamed(config: Mapping[str, Any], made: Any, weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    attention = config.get("attn_layer_idx") or []
    size = made.head_dim if attention else 0
    rows = [made.num_attention_heads * size, made.num_key_value_heads * size, made.num_key_value_heads * size]
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        renamed |= _parts(name, tensor, attention, rows, where)
    return renamed


def _parts(name: str, tensor: Tensor, attention: list[int], rows: list[int], where: str) -> dict[str, Tensor]:
    """One tensor of the file under Bamba's names; a name that the table lacks stays, to be refused as it is."""
    found = re.fullmatch(r"backbone\.layers\.(\d+)\.((?:\w+\.)*)(\w+)", name)
    if found is None:
        return {_SINGLE.get(name, name): tensor}
    layer, module, leaf = f"model.layers.{found[1]}.", found[2].rstrip("."), found[3]
    if module.partition(".")[0] == "mixer" and int(found[1]) not in attention:
        return {f"{layer}mamba.{name.partition('.mixer.')[2]}": tensor}
    if module == "mlp.fc1":
        return _split(
            tensor, layer + "feed_forward.", ("up_proj", "gate_proj"), leaf, [tensor.shape[0] // 2] * 2, where
        )
    if module == "mixer.in_proj":
        return _split(tensor, layer + "self_attn.", ("q_proj", "k_proj", "v_proj"), leaf, rows, where)
    return {f"{layer}{_RENAMED[module]}.{leaf}" if module in _RENAMED else name: tensor}


def _split(
    tensor: Tensor, prefix: str, names: tuple[str, ...], leaf: str, rows: list[int], where: str
) -> dict[str, Tensor]:
    if tensor.shape[0] != sum(rows):
        raise ValueError(f"{where}: the rows of {names} must be {rows}, together {sum(rows)}; got {tensor.shape[0]}.")
    return {f"{prefix}{name}.{leaf}": part.clone() for name, part in zip(names, tensor.split(rows), strict=True)}
