"""zoology's LanguageModel with MambaBlock or Mamba2Block, dumped by its users with the ModelConfig as config.json.

| key in the file | key in the module |
|---|---|
| backbone.embeddings.word_embeddings.weight | backbone.embeddings.weight |
| backbone.layers.N.norm.weight, backbone.layers.N.mixer.* | the same |
| backbone.ln_f.weight, backbone.ln_f.bias | backbone.norm_f.weight, backbone.norm_f.bias |
| lm_head.weight, always the embedding | lm_head.weight, shared |
| backbone.layers.N.{norm1, norm2, sequence_mixer, state_mixer}.* (TransformerBlock) | refused |
| backbone.embeddings.position_embeddings.weight | refused |

Source of names and fields: HazyResearch/zoology, `zoology/model.py`, `zoology/config.py` (ModelConfig),
`zoology/mixers/mamba.py` and `zoology/mixers/mamba2.py`. The module is transformers' MambaForCausalLM or
Mamba2ForCausalLM whose last norm is replaced by zoology's, a LayerNorm with a bias: it computes the same, but
`save_pretrained` of it makes a directory that only a class with that norm can read. `sequence_mixer.kwargs` are
mamba_ssm's options.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_probe.formats import state_spaces
from mamba_probe.formats.build import configure, language_model
from mamba_probe.formats.fields import refuse_unknown, refuse_values, whole
from mamba_probe.formats.recipe import Recipe

__all__ = ["EMBEDDING", "NAME", "convert", "matches"]

NAME = "zoology"
EMBEDDING = "backbone.embeddings.word_embeddings.weight"

_RENAMED = {
    EMBEDDING: "backbone.embeddings.weight",
    "backbone.ln_f.weight": "backbone.norm_f.weight",
    "backbone.ln_f.bias": "backbone.norm_f.bias",
}
_LAYERS = {"MambaBlock": "Mamba1", "Mamba2Block": "Mamba2"}
_MIXERS = {"Mamba1": "zoology.mixers.mamba.Mamba", "Mamba2": "zoology.mixers.mamba2.Mamba2"}
_ABSORBED = ("use_fast_path", "num_feature_maps")  # taken by zoology's mixers, without effect on the function
_ONLY = {"max_position_embeddings": (0,), "block_type": tuple(_LAYERS)}
_OTHER = (
    *("sequence_mixer", "state_mixer", "d_model", "n_layers", "vocab_size", "pad_vocab_size_multiple"),
    *("learnable_word_embeddings", "embedding_init_type", "resid_dropout", "embed_dropout", "drop_path"),
    *("layer_norm_epsilon", "name"),
)


class LastNorm(nn.LayerNorm):
    """The LayerNorm at the end, of a residual that is wider than its weights where `residual_in_fp32` says so."""

    def forward(self, input: Tensor) -> Tensor:
        """In float32 at least, given back in the weights' dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        made = F.layer_norm(input.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return made.to(self.weight.dtype)


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether the embedding has zoology's name.

    Source: ours.

    Example:
        >>> matches({}, ["backbone.embeddings.word_embeddings.weight"]), matches({}, ["backbone.embeddings.weight"])
        (True, False)
    """
    return "model_type" not in config and EMBEDDING in keys


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of transformers' language model with zoology's last norm.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field is unknown, or has a value that transformers' class cannot represent (named).

    Example:
        >>> mixer = {"name": "zoology.mixers.mamba.Mamba", "kwargs": {}}
        >>> config = {"d_model": 8, "n_layers": 1, "vocab_size": 8, "max_position_embeddings": 0,
        ...           "block_type": "MambaBlock", "sequence_mixer": mixer}
        >>> type(convert(config, {}, "here").module.backbone.norm_f).__name__
        'LastNorm'
    """
    refuse_unknown(config, (*_ONLY, *_OTHER), where)
    full = {"max_position_embeddings": 64, "block_type": "TransformerBlock", "n_layers": 2, "d_model": 128, **config}
    refuse_values(full, _ONLY, where)
    layer = _LAYERS[full["block_type"]]
    original = {
        "d_model": whole("d_model", full["d_model"], where),
        "n_layer": full["n_layers"],
        "vocab_size": full.get("vocab_size", 8192),
        "pad_vocab_size_multiple": full.get("pad_vocab_size_multiple", 1),
        "residual_in_fp32": layer == "Mamba1",
        "ssm_cfg": {"layer": layer} | _options(full, layer, where),
    }
    family, fields = state_spaces.translate(original, where)
    named = {_RENAMED.get(name, name): tensor for name, tensor in weights.items()}
    recipe = language_model(configure(family, fields, where), named, where)
    with torch.device("meta"):
        norm = LastNorm(original["d_model"], eps=full.get("layer_norm_epsilon", 1e-5))
    recipe.module.backbone.norm_f = norm  # type: ignore[union-attr]
    return recipe


def _options(config: Mapping[str, Any], layer: str, where: str) -> dict[str, Any]:
    mixer = config.get("sequence_mixer")
    if not isinstance(mixer, Mapping) or mixer.get("name") != _MIXERS[layer]:
        raise ValueError(
            f"{where}: config.json: sequence_mixer of a {config['block_type']} must be {_MIXERS[layer]!r} with its "
            f"kwargs, got {mixer!r}."
        )
    options = mixer.get("kwargs") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: config.json: kwargs of the sequence_mixer must be a dictionary, got {options!r}.")
    return {name: value for name, value in options.items() if name not in _ABSORBED}
