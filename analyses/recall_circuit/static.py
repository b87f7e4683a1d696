"""The static weights of one layer, as arrays in one form for both families."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.recall_circuit.core import tap_mass

__all__ = ["LayerWeights", "check_weights", "layer_weights"]

NEEDED = {
    "mamba": ("conv", "x_proj_B", "x_proj_C", "out_proj", "D", "unembedding", "norm_f"),
    "mamba2": ("conv_x", "conv_B", "conv_C", "out_proj", "D", "unembedding", "norm_f"),
}


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's signatures need of `probe.weights()`.

    Attributes:
        out_proj: mixer output from the gated scan output; a gated norm's weight is multiplied in (its scale is frozen).
        skip: D.
        norm_groups: groups of the gated norm before `out_proj`, as many as B has; 0: no norm.
        taps: m_B, m_C, m_x, the shares of squared convolution weight by lag.
    """

    out_proj: Float[np.ndarray, "model head head_channel"]
    skip: Float[np.ndarray, " head"]
    norm_groups: int
    taps: Float[np.ndarray, "path=3 lag"]

    @property
    def out_energy(self) -> Float[np.ndarray, "head head_channel"]:
        """Squared norm of each column of `out_proj`."""
        return (self.out_proj**2).sum(axis=0)


def check_weights(weights: xr.Dataset | None, canonical: Canonical) -> xr.Dataset:
    """The weights, if they are those of the traced model.

    Raises:
        ValueError: none given, a weight is missing, or layers, channels or the model differ from the trace's.
    """
    if weights is None:
        raise ValueError("recall_circuit needs weights for S1, S3, S7, S9 and S10: pass weights=probe.weights()")
    missing = [name for name in NEEDED[canonical.trace.attrs["family"]] if name not in weights]
    if missing:
        raise ValueError(
            f"weights lack {', '.join(missing)}; they hold {sorted(map(str, weights.data_vars))}. "
            "Pass probe.weights() of a language model: `unembedding` and `norm_f` read the values out."
        )
    absent = sorted(set(canonical.layers.tolist()) - set(weights["layer"].values.tolist()))
    if absent:
        raise ValueError(f"weights lack layer {absent} of the trace; they hold {weights['layer'].values.tolist()}")
    head, hashes = canonical.head_dim, [data.attrs.get("model_hash") for data in (canonical.trace, weights)]
    if weights.sizes[head] != canonical.n_heads:
        raise ValueError(
            f"a contribution is a sum over all {weights.sizes[head]} of `{head}`; the trace holds {canonical.n_heads}. "
            "Record again with channels=None."
        )
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"weights are of another model: model_hash {hashes[1]}, the trace's is {hashes[0]}")
    return weights


def layer_weights(weights: xr.Dataset, layer: int, family: str) -> LayerWeights:
    """One layer of `probe.weights()`, by its label, in float64."""
    get = {str(name): array.values.astype(np.float64) for name, array in weights.sel(layer=layer).items()}
    out_proj = get["out_proj"][..., None] if family == "mamba" else get["out_proj"] * get.get("norm", 1.0)
    energy = (out_proj**2).sum(axis=0)
    if family == "mamba":
        read = ((get["x_proj_B"] ** 2).sum(axis=0), (get["x_proj_C"] ** 2).sum(axis=0), energy[:, 0])
        taps = [tap_mass(get["conv"], weight) for weight in read]
    else:
        conv = [get[name].reshape(-1, get[name].shape[-1]) for name in ("conv_B", "conv_C", "conv_x")]
        read = (np.ones(len(conv[0])), np.ones(len(conv[1])), energy.ravel())
        taps = [tap_mass(taps, weight) for taps, weight in zip(conv, read, strict=True)]
    return LayerWeights(out_proj, get["D"], weights.sizes["group"] if "norm" in get else 0, np.array(taps))
