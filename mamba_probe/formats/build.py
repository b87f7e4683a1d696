"""Build transformers' Mamba classes without data: checked configuration -> module on the meta device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.formats.fields import whole
from mamba_probe.formats.recipe import Recipe

__all__ = ["EMBEDDING", "HEAD", "agree", "build", "class_names", "configure", "language_model"]

EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"

_STEM = {"mamba": "Mamba", "mamba2": "Mamba2"}
_SIZES = {
    "mamba": ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel"),
    "mamba2": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel"),
        *("num_heads", "head_dim", "n_groups", "chunk_size"),
    ),
}


def class_names(model_type: str) -> dict[str, str]:
    """Names of transformers' classes for `model_type`, by role.

    Source: ours.

    Example:
        >>> class_names("mamba2")["language_model"]
        'Mamba2ForCausalLM'
    """
    stem = _STEM[model_type]
    return {"language_model": f"{stem}ForCausalLM", "backbone": f"{stem}Model", "mixer": f"{stem}Mixer"}


def agree(config: Mapping[str, Any], role: str, where: str) -> None:
    """Refuse a config that names another class than its weights belong to.

    Source: ours. Names that transformers does not have are not compared: the weights decide, strictly.

    Raises:
        ValueError: `architectures` holds a class of the family, but not that of `role`.

    Example:
        >>> agree({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "language_model", "here")
    """
    known = class_names(config["model_type"])
    named = [name for name in config.get("architectures") or () if name in known.values()]
    if named and known[role] not in named:
        raise ValueError(
            f"{where}: config.json names architectures {named}, but the weights are those of {known[role]}; "
            "correct `architectures` or the weights."
        )


def configure(model_type: str, values: Mapping[str, Any], where: str) -> Any:
    """Make transformers' configuration from checked values.

    Source: ours.

    Args:
        model_type: "mamba" or "mamba2".
        values: fields of MambaConfig or Mamba2Config.
        where: the checkpoint's place, for error messages.

    Raises:
        ValueError: a field has a wrong type or value, or sizes contradict each other.

    Example:
        >>> configure("mamba", {"hidden_size": 8}, "here").intermediate_size
        16
        >>> configure("mamba", {"hidden_size": 0}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: config.json: hidden_size must be a whole number >= 1, got 0.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    for name in _SIZES[model_type]:
        whole(name, values.get(name, 1), where)
    try:
        config = getattr(transformers, f"{_STEM[model_type]}Config")(**values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: config.json is not a valid {model_type} configuration: {error}") from error
    _refuse_contradictions(model_type, config, where)
    return config


def _refuse_contradictions(model_type: str, config: Any, where: str) -> None:
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise ValueError(f"{where}: config.json: hidden_act {config.hidden_act!r} is no activation of transformers.")
    whole("time_step_rank", config.time_step_rank, where)
    whole("expand * hidden_size", config.expand * config.hidden_size, where)
    if model_type == "mamba2" and config.num_heads % config.n_groups:
        raise ValueError(
            f"{where}: config.json: num_heads must be a multiple of n_groups, got {config.num_heads} heads "
            f"and {config.n_groups} groups."
        )


def build(config: Any, role: str) -> nn.Module:
    """Build one of transformers' classes on the meta device: shapes without data.

    Source: ours.

    Args:
        config: MambaConfig or Mamba2Config.
        role: "language_model", "backbone" or "mixer".

    Example:
        >>> mixer = build(configure("mamba", {"hidden_size": 8}, "here"), "mixer")
        >>> mixer.A_log.device.type
        'meta'
    """
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    source = {"mamba": modeling_mamba, "mamba2": modeling_mamba2}[config.model_type]
    cls = getattr(source, class_names(config.model_type)[role])
    with torch.device("meta"):
        return cls(config, layer_idx=0) if role == "mixer" else cls(config)


def language_model(config: Any, weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of a language model, whose head may share the embedding.

    Source: ours. A tied head may be left out of the file; if it is there it must equal the embedding.

    Args:
        config: MambaConfig or Mamba2Config.
        weights: tensors by the names of MambaForCausalLM or Mamba2ForCausalLM.
        where: the checkpoint's place, for error messages.

    Raises:
        ValueError: the config ties the head to the embedding, but the file holds different ones.

    Example:
        >>> config = configure("mamba", {"hidden_size": 8, "vocab_size": 4, "num_hidden_layers": 1}, "here")
        >>> dict(language_model(config, {}, "here").tied)
        {'lm_head.weight': 'backbone.embeddings.weight'}
    """
    module = build(config, "language_model")
    if not config.tie_word_embeddings:
        return Recipe(module, weights)
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{where}: the config ties {HEAD} to {EMBEDDING}, but the file holds different tensors for them; "
            "set `tie_word_embeddings` (state-spaces: `tie_embeddings`) to false, or drop the head from the file."
        )
    return Recipe(module, {name: tensor for name, tensor in weights.items() if name != HEAD}, {HEAD: EMBEDDING})
