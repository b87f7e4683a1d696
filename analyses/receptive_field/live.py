"""What needed the running model, and comes as data: derivatives of the block, predictions without the first tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.receptive_field import core

__all__ = ["Block", "block", "check_remembrance"]


@dataclass(frozen=True)
class Block:
    """Derivatives of some layers' mixers.

    Attributes:
        slope, used: of each layer and row, mean over what was asked; and the share of sources that the fits used.
        size: of the latest query, its sources (layer, row, source); None where sources were asked instead.
        asked: in words.
    """

    slope: Float[np.ndarray, "layer row"]
    used: Float[np.ndarray, "layer row"]
    size: Float[np.ndarray, "layer row source"] | None
    asked: str


def block(
    jacobian: xr.Dataset | Sequence[xr.Dataset], layers: np.ndarray, model_hash: str | None,
    lags: tuple[int, int | None],
) -> Block:  # fmt: skip
    """Sizes of derivatives, root of the sum of squares over read-outs, for the trace's layers; NaN where not given.

    Raises:
        ValueError: not what `probe.jacobian` returned, of another model or rows, or of a layer that the trace lacks.
    """
    held, dim = _held(jacobian, layers, model_hash)
    position, asked = held["position"].values, held[dim].values
    slopes = np.full((2, len(asked), len(layers), held.sizes["batch"]), np.nan)
    latest, by_query = int(asked.max()), dim == "query_token"
    size = np.full((len(layers), held.sizes["batch"], latest + 1), np.nan)
    for number in held["layer"].values.tolist():
        layer = int(np.flatnonzero(layers == number)[0])
        for at, row in np.ndindex(len(asked), held.sizes["batch"]):
            valid = position[row] >= 0
            lag = ((asked[at] - position[row]) * (1 if by_query else -1))[valid]
            values = (
                held["jacobian"].sel(layer=number).isel({"batch": row, dim: at}).transpose("kernel", "token").values
            )
            found = core.norm(values[:, valid].astype(np.float64))
            slopes[:, at, layer, row] = core.slope(found[lag >= 0], lag[lag >= 0], *lags)
            if asked[at] == latest and by_query:
                size[layer, row] = found[: latest + 1]
    slope, used = (core.mean(part, np.ones(len(asked), dtype=int)) for part in slopes)
    return Block(slope, used, size if by_query else None, _said(held, dim, layers))


def _said(held: xr.Dataset, dim: str, layers: np.ndarray) -> str:
    missing = sorted(set(layers.tolist()) - set(held["layer"].values.tolist()))
    rows = f"{held.sizes['batch']} row(s), {dim} {held[dim].values.tolist()}, {held.sizes['kernel']} read-out(s)"
    said = f"{rows}: {held.attrs.get('estimator', 'estimator not stated')}"
    return said + (f"; not of layer(s) {missing}" if missing else "")


def _held(
    jacobian: xr.Dataset | Sequence[xr.Dataset], layers: np.ndarray, model_hash: str | None
) -> tuple[xr.Dataset, str]:
    """Checked, joined along `layer`, with a kernel axis; and which tokens were asked for."""
    given = [jacobian] if isinstance(jacobian, xr.Dataset) else list(jacobian)
    if not given:
        raise ValueError("jacobian is an empty list; leave it None")
    parts = [_one(each, model_hash) for each in given]
    held, dims = parts[0], {dim for each in parts for dim in ("query_token", "source_token") if dim in each.dims}
    for each in parts[1:]:
        if len(dims) > 1 or any(not each[name].equals(held[name]) for name in ("position", *dims)):
            raise ValueError(
                "jacobian: its layers differ in their rows or in the tokens asked for; use the same inputs"
            )
    arrays = [each["jacobian"].reset_coords(drop=True) for each in parts]
    joined = xr.concat(arrays, "layer", join="exact", combine_attrs="override")
    known, found = layers.tolist(), joined["layer"].values.tolist()
    if len(set(found)) < len(found) or not set(found) <= set(known):
        raise ValueError(f"jacobian is of layers {found}; the trace holds {known}, each once")
    return held.drop_vars(["jacobian", "layer"]).assign(jacobian=joined), dims.pop()


def _one(jacobian: Any, model_hash: str | None) -> xr.Dataset:
    """One Dataset, checked, with a layer axis and a kernel axis."""
    if not isinstance(jacobian, xr.Dataset) or "jacobian" not in jacobian:
        raise ValueError(f"jacobian needs what probe.jacobian returned; got {_named(jacobian)}")
    dims = [str(dim) for dim in jacobian["jacobian"].dims]
    asked = [dim for dim in ("query_token", "source_token") if dim in dims]
    if len(asked) != 1 or not {"batch", "token"} <= set(dims) or "position" not in jacobian.coords:
        raise ValueError(
            "jacobian needs dims (batch, query_token, kernel, token) or (batch, source_token, token) and the "
            f"coordinate `position`; got {tuple(dims)}"
        )
    _check_model("jacobian", jacobian, model_hash)
    if "layer" not in jacobian.coords and "layer" not in jacobian.attrs:
        raise ValueError("jacobian does not say its layer: attrs['layer'], as probe.jacobian wrote it, or a coordinate")
    held = jacobian if "kernel" in dims else jacobian.assign(jacobian=jacobian["jacobian"].expand_dims("kernel"))
    if "layer" in dims:
        return held
    number = int(held["layer"] if "layer" in held.coords else held.attrs["layer"])
    return held.assign(jacobian=held["jacobian"].expand_dims(layer=[number]))


def check_remembrance(found: xr.Dataset, model_hash: str | None) -> xr.Dataset:
    """The distances (batch, start), checked.

    Raises:
        ValueError: not what `probe.remembrance` returned, or of another model.
    """
    names = ("remembrance", "null_other_row")
    if not isinstance(found, xr.Dataset) or any(
        name not in found or found[name].dims != ("batch", "start") for name in names
    ):
        raise ValueError(f"remembrance needs what probe.remembrance returned, over (batch, start); got {_named(found)}")
    _check_model("remembrance", found, model_hash)
    return found.sortby("start")


def _check_model(what: str, found: xr.Dataset, model_hash: str | None) -> None:
    other = found.attrs.get("model_hash")
    if None not in (other, model_hash) and other != model_hash:
        raise ValueError(f"{what} is of another model: model_hash {other}, the trace's is {model_hash}")


def _named(what: object) -> str:
    return f"a Dataset of {sorted(map(str, what.data_vars))}" if isinstance(what, xr.Dataset) else type(what).__name__
