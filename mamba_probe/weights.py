"""Static weights as data: what signatures need besides a trace, by our names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.mixers import MixerAdapter
from mamba_probe.mixers.base import Labelled
from mamba_probe.mixers.offload import held

__all__ = ["read_statics", "read_weights"]

FINAL_NORMS = ("norm_f", "final_layernorm", "norm")
"""What the last norm is called: in Mamba, Mamba-2 and Nemotron-H; in Bamba, Jamba, Zamba, Falcon-H1; in Granite."""


def read_statics(adapters: Sequence[MixerAdapter], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of `names` that are constant, each stacked over the layers of `adapters`, which have equal sizes.

    Raises:
        ValueError: one that is NaN or infinite, as A = -exp(A_log) is in float32 from A_log = 88.8 on.
    """
    each = [_of(adapter, adapter.statics) for adapter in adapters]
    found = {name: np.stack([_host(layer[name][1]) for layer in each]) for name in each[0] if name in names}
    for name, values in found.items():
        for adapter, value in zip(adapters, values, strict=True):
            if not np.isfinite(value).all():
                bad = int((~np.isfinite(value)).sum())
                raise ValueError(
                    f"`{name}` of layer {adapter.layer} holds {bad} NaN or infinite values: the weights that it is made"
                    " of (A = -exp(A_log)) are too large for its type"
                )
    return found


def read_weights(
    model: nn.Module, adapters: Sequence[MixerAdapter], groups: Mapping[str, tuple[int, ...]],
    *, layers: Sequence[int] | None = None,
) -> xr.Dataset:  # fmt: skip
    """Weights of `layers` (None: all) stacked over `layer`, fp32 at least, with the model's unembedding and last norm.

    Raises:
        ValueError: layers of different sizes.
    """
    if layers is not None and not len(layers):
        raise ValueError("layers is empty; pass None for all")
    chosen = [adapter for adapter in adapters if layers is None or adapter.layer in layers]
    if len({adapter.sizes for adapter in chosen}) > 1:
        listing = "; ".join(f"layers {list(numbers)}: {sizes}" for sizes, numbers in groups.items())
        raise ValueError(f"layers of different sizes cannot share one Dataset. Pass layers= of one group: {listing}")
    each = [_of(adapter, adapter.weights) for adapter in chosen]
    data = {
        name: (("layer", *dims), np.stack([_host(layer[name][1]) for layer in each]))
        for name, (dims, _) in each[0].items()
    }
    sizes = chosen[0].sizes
    index: dict[str, Any] = {"layer": [adapter.layer for adapter in chosen]}
    if sizes.directions:
        index["direction"] = np.array(sizes.directions, dtype=object)
    attrs = provenance.of_model(model, "weights") | {
        "family": sizes.family,
        "n_heads": sizes.n_heads,
        "n_groups": sizes.n_groups,
    }
    return xr.Dataset(data | _readout(model, sizes.width), index, attrs)


def _readout(model: nn.Module, width: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Unembedding, with the logits' own multiplier, and final norm of a language model; nothing for a bare mixer.

    Those that act on other features than a mixer's `width` are left out: Caduceus' with reverse complements.
    """
    head = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    core = getattr(model, getattr(model, "base_model_prefix", "backbone"), model)
    core = getattr(core, "backbone", core)
    norms = [getattr(core, name, None) for name in FINAL_NORMS if hasattr(core, "layers")]
    norm = next((norm for norm in norms if hasattr(norm, "weight")), None)
    found = {}
    if head is not None:
        config = getattr(model, "config", None)
        with held(head):
            rows = _host(head.weight)
        rows *= getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
        found["unembedding"] = (("vocab", "model"), rows)
    if norm is not None:
        with held(norm):
            found["norm_f"] = (("model",), _host(norm.weight))
            if getattr(norm, "bias", None) is not None:  # no RMS norm
                found["norm_f_bias"] = (("model",), _host(norm.bias))
    return {name: labelled for name, labelled in found.items() if labelled[1].shape[-1] == width}


def _of(adapter: MixerAdapter, read: Callable[[], dict[str, Labelled]]) -> dict[str, Labelled]:
    with held(adapter.mixer):
        return read()


def _host(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy().copy()
