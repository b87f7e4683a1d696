"""Conservation: at every cut through the model, relevance and what biases after it add make the logit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

__all__ = ["asserted", "errors"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest error, in units of the sum of |terms|, by the type that the whole model computes in; of rows so long that
the rounding of a sum over their tokens, tokens x unit roundoff (Higham's gamma), is more: that."""


def errors(found: dict[str, np.ndarray], layers: Sequence[int], sites: Sequence[str]) -> dict[str, np.ndarray]:
    """How far each cut is from the logit: the inputs, the residual stream before each block, and each mixer.

    Args:
        found: logit (batch, query), bias (site, batch, query), relevance (batch, query, token), and by layer residual,
            mixer_in, mixer_out.
        layers: numbers of the layers.
        sites: of the biases, "layer 3 conv1d" or the head's name.
    """
    of = np.array([int(site.split()[1]) if site.startswith("layer ") else -1 for site in sites], dtype=int)
    bias, logit = found["bias"], found["logit"]
    residual, mixer = [], []
    for index, layer in enumerate(layers):
        passed = np.isin(of, [*layers[index:], -1])
        residual.append(_off(found["residual"][index], bias[passed], logit))
        target = np.nansum(found["mixer_out"][index], axis=-1)
        mixer.append(_off(found["mixer_in"][index], bias[of == layer], np.where(np.isnan(logit), np.nan, target)))
    whole = _off(found["relevance"], bias, logit)
    return {"conservation_error": whole, "residual_error": np.stack(residual), "mixer_error": np.stack(mixer)}


def _off(tokens: np.ndarray, bias: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """|tokens + bias - whole| over the sum of |terms|, or |whole| where that is more."""
    scale = np.maximum(np.nansum(np.abs(tokens), axis=-1) + np.abs(bias).sum(0), np.abs(whole))
    return np.abs(np.nansum(tokens, axis=-1) + bias.sum(0) - whole) / np.where(scale == 0, 1.0, scale)


def asserted(result: xr.Dataset, model: Any) -> xr.Dataset:
    """The result, with the tolerance that it meets.

    Raises:
        ValueError: relevance is not conserved: where, by how much.
    """
    tolerance = _tolerance(model, result.sizes["token"])
    for name in ("conservation_error", "residual_error", "mixer_error"):
        if float(result[name].fillna(0.0).max()) > tolerance:
            raise _refused(result, name, tolerance)
    return result.assign_attrs(conservation=f"asserted at every cut, tolerance {tolerance:g} of the sum of |terms|")


def _refused(result: xr.Dataset, name: str, tolerance: float) -> ValueError:
    error = result[name].fillna(0.0)
    at = {str(dim): int(index) for dim, index in error.argmax(list(error.dims)).items()}  # pyright: ignore
    named = [f"{dim} {result[dim].values[index] if dim in result.coords else index}" for dim, index in at.items()]
    row = result.isel({dim: index for dim, index in at.items() if dim != "layer"})
    return ValueError(
        f"relevance is not conserved ({name} at {', '.join(named)}): off by {float(error.max()):.2e} of the sum of"
        f" |terms|, tolerance {tolerance:g}; inputs {float(row['relevance'].sum()):.6g}, biases"
        f" {float(row['bias'].sum()):.6g}, logit {float(row['logit']):.6g}. A part of the model has no rule, or sums"
        " cancel beyond its precision: try model.double()"
    )


def _tolerance(model: Any, n_tokens: int) -> float:
    """Of the least precise part: transformers keeps the residual stream in float32 where the config says so."""
    narrow = getattr(getattr(model, "config", None), "residual_in_fp32", False)
    dtype = torch.float32 if narrow else next(model.parameters()).dtype
    return max(TOLERANCE[dtype], n_tokens * torch.finfo(dtype).eps / 2)
