"""Static weights as data: what signatures need besides a trace, by our names."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.mixers import MixerAdapter

__all__ = ["read_statics", "read_weights"]


def read_statics(adapters: Sequence[MixerAdapter], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of `names` that are constant, each stacked over the layers of `adapters`, which have equal sizes."""
    each = [adapter.statics() for adapter in adapters]
    return {name: np.stack([_host(layer[name][1]) for layer in each]) for name in each[0] if name in names}


def read_weights(
    model: nn.Module, adapters: Sequence[MixerAdapter], groups: Mapping[str, tuple[int, ...]],
    *, layers: Sequence[int] | None = None,
) -> xr.Dataset:  # fmt: skip
    """Weights of `layers` (None: all) stacked over `layer`, fp32 at least, with the model's unembedding and last norm.

    Raises:
        ValueError: layers of different sizes.
    """
    chosen = [adapter for adapter in adapters if layers is None or adapter.layer in layers]
    if len({adapter.sizes for adapter in chosen}) > 1:
        listing = "; ".join(f"layers {list(numbers)}: {sizes}" for sizes, numbers in groups.items())
        raise ValueError(f"layers of different sizes cannot share one Dataset. Pass layers= of one group: {listing}")
    each = [adapter.weights() for adapter in chosen]
    data = {
        name: (("layer", *dims), np.stack([_host(layer[name][1]) for layer in each]))
        for name, (dims, _) in each[0].items()
    }
    sizes = chosen[0].sizes
    attrs = provenance.of_model(model, "weights") | {
        "family": sizes.family,
        "n_heads": sizes.n_heads,
        "n_groups": sizes.n_groups,
    }
    return xr.Dataset(data | _readout(model), {"layer": [adapter.layer for adapter in chosen]}, attrs)


def _readout(model: nn.Module) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Unembedding and final norm of a language model; nothing for a bare mixer or a backbone."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    norm = getattr(getattr(model, "backbone", model), "norm_f", None)
    found = {}
    if head is not None:
        found["unembedding"] = (("vocab", "model"), _host(head.weight))
    if norm is not None:
        found["norm_f"] = (("model",), _host(norm.weight))
    return found


def _host(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy().copy()
