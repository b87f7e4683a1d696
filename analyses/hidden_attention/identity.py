"""The sum identity: alpha . x + D x is the scan's output y before its gate, at every query."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.hidden_attention.stream import Block
from mamba_probe.trace.contract import check_same_direction

__all__ = ["TOLERANCE", "Identity"]

TOLERANCE = 1e-4
"""Of the largest sum of |terms| over heads: fp32 scans over long memories lose 1e-5 of it, a wrong alpha most of it."""


@dataclass(frozen=True)
class Identity:
    """What the identity needs besides alpha: D by layer and head, or why there is none.

    Attributes:
        skip: D (layer, head, head_channel or 1); None where the identity cannot be measured.
        absent: why not.
        tolerance: largest error accepted.
    """

    skip: Float[np.ndarray, "layer head skip"] | None
    absent: str
    tolerance: float

    @classmethod
    def of(cls, view: Canonical, weights: xr.Dataset | None, tolerance: float) -> "Identity":
        """Gather D where x and y were recorded.

        Raises:
            ValueError: a tolerance that is not above 0, or weights without D, of other layers, heads or another model.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance must be above 0; got {tolerance}")
        skip = None if weights is None else _skip(view, weights)
        lacking = [name for name in "xy" if name not in view.trace]
        if lacking:
            return cls(None, f"{' and '.join(lacking)} not recorded", tolerance)
        return cls(skip, "D unknown: pass weights=probe.weights()" if skip is None else "", tolerance)

    @property
    def names(self) -> tuple[str, ...]:
        """What it reads beside alpha."""
        return () if self.skip is None else ("x", "y")

    def parts(self, layer: int, block: Block, at: int, alpha: Float[np.ndarray, "source head"]) -> tuple[float, float]:
        """Largest |alpha . x + D x - y| over the heads of a block, and their largest |alpha| . |x| + |D x|."""
        if self.skip is None:
            return np.nan, np.nan
        x, row = np.moveaxis(block.values["x"][: at + 1], 1, 0), alpha.T[:, None]
        skip = self.skip[layer, block.heads] * x[:, -1]
        error = (row @ x)[:, 0] + skip - block.values["y"][at]
        size = (np.abs(row) @ np.abs(x))[:, 0] + np.abs(skip)
        return float(np.abs(error).max()), float(size.max())

    def check(
        self,
        error: Float[np.ndarray, "layer batch query_token"],
        view: Canonical,
        at: Int[np.ndarray, "batch query_token"],
    ) -> None:
        """Assert the identity.

        Raises:
            ValueError: where the error is largest, if it is above the tolerance.
        """
        if self.skip is None or np.all(error <= self.tolerance):
            return
        layer, row, query = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        raise ValueError(
            f"alpha . x + D x is not y: error {error[layer, row, query]:.2g} of the terms, above the tolerance "
            f"{self.tolerance:g}, in layer {view.layers[layer]}, row {row}, at valid token {at[row, query]}. The trace "
            "does not hold what the scan executed (an edit of the decay? attrs changed? a state carried in?), or "
            "memory is so long that fp32 loses this much: then pass tolerance="
        )


def _skip(view: Canonical, weights: xr.Dataset) -> Float[np.ndarray, "layer head skip"]:
    if "D" not in weights:
        raise ValueError(f"weights lack D; they hold {sorted(map(str, weights.data_vars))}: pass probe.weights()")
    check_same_direction(view.trace, weights)
    hashes = [data.attrs.get("model_hash") for data in (view.trace, weights)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"weights are of another model: model_hash {hashes[1]}, the trace's is {hashes[0]}")
    absent = sorted(set(view.layers.tolist()) - set(weights["layer"].values.tolist()))
    if absent:
        raise ValueError(f"weights lack layer {absent} of the trace; they hold {weights['layer'].values.tolist()}")
    if view.head_dim not in weights["D"].dims or view.heads.max() >= weights.sizes[view.head_dim]:
        raise ValueError(
            f"D needs `{view.head_dim}` up to {view.heads.max()}, as the trace; got {dict(weights['D'].sizes)}"
        )
    skip = weights["D"].sel(layer=view.layers).isel({view.head_dim: view.heads})
    return skip.values.astype(np.float64).reshape(view.n_layers, view.n_heads, -1)
