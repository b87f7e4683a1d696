"""Values of a variable at the tokens of a row, in float64."""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.reducing.reduction import Part
from mamba_probe.trace.contract import check_held

__all__ = ["check", "rest_dims", "row_values"]


def check(trace: xr.Dataset, variable: str) -> None:
    """Check that a variable can be reduced over tokens.

    Raises:
        ValueError: it was not recorded, has no tokens, or is complex.
    """
    check_held(trace, variable, "valid")
    if "token" not in trace[variable].dims:
        raise ValueError(
            f"`{variable}` is constant in {trace.attrs['family']} layers, so there is nothing to reduce over tokens:"
            " read it from probe.record"
        )
    if trace[variable].dtype.kind == "c":
        raise ValueError(f"`{variable}` is complex in {trace.attrs['family']} layers; real variables are reduced")


def rest_dims(trace: xr.Dataset, variable: str) -> dict[str, Any]:
    """Labels of the layers and of every other dimension than batch and token, and the names of these."""
    dims = [str(dim) for dim in trace[variable].dims if dim not in ("layer", "batch", "token")]
    labels = {dim: trace[dim].values if dim in trace.coords else np.arange(trace.sizes[dim]) for dim in dims}
    return {"layer": trace["layer"].values, "dims": np.array(dims, dtype=str)} | labels


def row_values(trace: xr.Dataset, variable: str, part: Part) -> Float[np.ndarray, "layer token *rest"]:
    """One row's valid tokens.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    block = trace[variable].isel(batch=part.row).transpose("layer", "token", ...).values[:, part.valid]
    if not np.isfinite(block).all():
        raise ValueError(f"`{variable}` is NaN or infinite at a valid token of row {part.row} of this piece")
    return block.astype(np.float64)
