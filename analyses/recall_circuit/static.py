"""The static weights of one layer, as arrays in one form for both families."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.recall_circuit.core import tap_mass
from mamba_probe.trace.contract import check_same_direction

__all__ = ["LayerWeights", "check_weights", "layer_weights"]

NEEDED = {
    "mamba": ("conv", "x_proj_B", "x_proj_C", "out_proj", "D", "unembedding", "norm_f"),
    "mamba2": ("conv_x", "conv_B", "conv_C", "out_proj", "D", "unembedding", "norm_f"),
    "s4d": ("conv", "out_proj", "D", "unembedding", "norm_f"),
}
INPUTS = {
    "mamba": ("in_proj_x",), "mamba2": ("in_proj_x", "in_proj_B", "in_proj_C"), "s4d": ("in_proj_x",),
}  # fmt: skip

BIASES = ("in_proj_bias", "out_proj_bias")
"""What the names of projections' biases begin with."""


@dataclass(frozen=True)
class Path:
    """From the mixer's input to B, C or x: features, their convolution, SiLU, and what reads them.

    Attributes:
        in_proj: feature from the mixer's input; None when the weights lack it.
        conv: taps of each feature.
        bias: of the convolution.
        read: rows of x_proj, or one weight a feature.
    """

    in_proj: Float[np.ndarray, "feature model"] | None
    conv: Float[np.ndarray, "feature lag"]
    bias: Float[np.ndarray, " feature"]
    read: Float[np.ndarray, "row feature"] | Float[np.ndarray, " feature"]

    @property
    def mass(self) -> Float[np.ndarray, " feature"]:
        """How much of each feature's square is read."""
        return self.read**2 if self.read.ndim == 1 else (self.read**2).sum(axis=0)

    @property
    def taps(self) -> Float[np.ndarray, " lag"]:
        """Share of squared convolution weight by lag."""
        return tap_mass(self.conv, self.mass)


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's signatures need of `probe.weights()`.

    Attributes:
        out_proj: mixer output from the gated scan output; a gated norm's weight is multiplied in (its scale is frozen).
        skip: D, by head or by head and head_channel.
        norm_groups: groups of the gated norm before `out_proj`, as many as B has; 0: no norm.
        paths: by what they feed: B, C and x; S4D: x.
    """

    out_proj: Float[np.ndarray, "model head head_channel"]
    skip: Float[np.ndarray, "head ..."]
    norm_groups: int
    paths: dict[str, Path]

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
    check_same_direction(canonical.trace, weights)
    missing = [name for name in NEEDED[canonical.trace.attrs["family"]] if name not in weights]
    if missing:
        raise ValueError(
            f"weights lack {', '.join(missing)}; they hold {sorted(map(str, weights.data_vars))}. "
            "Pass probe.weights() of a language model: `unembedding` and `norm_f` read the values out."
        )
    if "u" in canonical.trace:
        missing = [name for name in INPUTS[canonical.trace.attrs["family"]] if name not in weights]
        if missing:
            raise ValueError(f"the trace has the mixer's input `u`, and weights lack {', '.join(missing)} to follow it")
    if "norm_f_bias" in weights:
        raise ValueError(
            "recall_circuit reads values out through an RMS norm: expected `norm_f` alone, got `norm_f_bias`; a"
            " norm with a bias subtracts the mean. Measure a model that ends in an RMS norm"
        )
    if "norm_before_gate" in weights:
        raise ValueError(
            "recall_circuit freezes the norm that follows a mixer's gate: expected `norm` or none, got"
            " `norm_before_gate`, whose scale is that of what is not gated yet. Measure a model whose norm follows its"
            " gate"
        )
    biased = [name for name in map(str, weights) if name.startswith(BIASES) and bool((weights[name] != 0).any())]
    if biased:
        raise ValueError(
            f"recall_circuit follows what projections multiply: expected biases of zero, got {', '.join(biased)}, which"
            " add what no signature has. Measure a model without them"
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
    get = {
        str(name): array.values.astype(np.float64)
        for name, array in weights.sel(layer=layer).items()
        if not np.iscomplexobj(array)
    }
    out_proj = get["out_proj"] * get.get("norm", 1.0) if family == "mamba2" else get["out_proj"][..., None]
    read = np.sqrt((out_proj**2).sum(axis=0)).ravel()
    if family == "mamba2":
        paths = {name: _path(get, f"_{name}", read if name == "x" else None) for name in "BCx"}
    else:
        fed = {"x": read} | ({name: get[f"x_proj_{name}"] for name in "BC"} if family == "mamba" else {})
        paths = {name: _path(get, "", rows) for name, rows in fed.items()}
    return LayerWeights(out_proj, get["D"], weights.sizes["group"] if "norm" in get else 0, paths)


def _path(
    get: dict[str, np.ndarray],
    of: str,
    read: Float[np.ndarray, "row feature"] | Float[np.ndarray, " feature"] | None,
) -> Path:
    """The path whose weights are named conv`of`, in_proj`of` (x's: in_proj_x) and conv_bias`of`."""
    conv = get[f"conv{of}"].reshape(-1, get[f"conv{of}"].shape[-1])
    name, bias = f"in_proj{of or '_x'}", get.get(f"conv_bias{of}")
    in_proj = get[name].reshape(len(conv), -1) if name in get else None
    ones = np.ones(len(conv))
    return Path(in_proj, conv, 0 * ones if bias is None else bias.ravel(), ones if read is None else read)
