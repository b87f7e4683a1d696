"""A language model around blocks with planted weights: embedding, norms, residual, head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mamba_probe.constructions.tables import Mamba2Table, MambaTable, Table, pour

__all__ = ["EPSILON", "as_ids", "language_model"]

EPSILON = 1e-5  # of the RMS norms


def language_model(
    blocks: Sequence[Table],
    embedding: Float[np.ndarray, "token model"],
    head: Float[np.ndarray, "token model"],
    dtype: torch.dtype,
) -> nn.Module:
    """Return the `MambaForCausalLM` or `Mamba2ForCausalLM` of these blocks, ours for S4D; all norms' scales are one."""
    ones = np.ones(embedding.shape[1])
    around = {"backbone.embeddings.weight": embedding, "backbone.norm_f.weight": ones, "lm_head.weight": head}
    weights: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        around[f"backbone.layers.{index}.norm.weight"] = ones
        inside = block.state_dict(dtype).items()
        weights |= {f"backbone.layers.{index}.mixer.{name}": weight for name, weight in inside}
    weights |= {name: torch.tensor(array, dtype=dtype) for name, array in around.items()}
    return pour(_config(blocks, len(embedding), dtype), weights)


def _config(blocks: Sequence[Table], vocab: int, dtype: torch.dtype) -> Any:
    first = blocks[0]
    if not isinstance(first, MambaTable | Mamba2Table):
        return {"mixers": [block.own for block in blocks], "vocab_size": vocab}
    name = "Mamba2ForCausalLM" if isinstance(first, Mamba2Table) else "MambaForCausalLM"
    layers: dict[str, Any] = {"num_hidden_layers": len(blocks)} if len(blocks) > 1 else {}
    return first.config(
        dtype,
        architectures=[name],
        vocab_size=vocab,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        **layers,
    )


def as_ids(input_ids: ArrayLike, *, name: str, vocab: int) -> Tensor:
    """Return the token ids (batch, token) as a tensor."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: input_ids must be integers (batch, token), got {ids.dtype} of shape {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise ValueError(f"{name}: input_ids must be in [0, {vocab}), got [{ids.min()}, {ids.max()}]")
    return torch.tensor(ids, dtype=torch.int64)
