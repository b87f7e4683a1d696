"""What a token is to a query: of the pair that it asks for, itself, or something else. Every token is of one class."""

import numpy as np
import xarray as xr
from jaxtyping import Bool

__all__ = ["NEAR", "PAIR", "classes", "reach"]

PAIR = ("asked value", "asked key")
NEAR = 8
"""Tokens before the query that are near."""


def reach(relevance: xr.Dataset) -> Bool[np.ndarray, "batch query token"]:
    """The valid tokens up to the query."""
    at = relevance["query_token"].values[..., None]
    return (np.arange(relevance.sizes["token"]) <= at) & relevance["valid"].values[:, None]


def classes(relevance: xr.Dataset) -> dict[str, Bool[np.ndarray, "batch query token"]]:
    """Tokens of each class, by its name: of a task by what they are there for, else by where they are."""
    at = relevance["query_token"].values[..., None]
    own = np.arange(relevance.sizes["token"]) == at
    found = {"own": own} | (_of_task(relevance) if "role" in relevance.coords else _of_text(relevance))
    taken, left = np.zeros_like(own), {}
    for name in (*PAIR, *(name for name in found if name not in PAIR)):
        if name in found:
            left[name] = found[name] & reach(relevance) & ~taken
            taken |= left[name]
    return {name: member for name, member in left.items() if member.any()}


def _of_task(relevance: xr.Dataset) -> dict[str, Bool[np.ndarray, "batch query token"]]:
    at, role = np.maximum(relevance["query_token"].values, 0), relevance["role"].values.astype(str)
    source = np.take_along_axis(relevance["source_token"].values, at, axis=1)[..., None]
    token = np.arange(relevance.sizes["token"])
    asked = {"asked value": token == source, "asked key": (token == source - 1) & (role == "key")[:, None]}
    others = {f"other {name}": (role == name)[:, None] & (at >= 0)[..., None] for name in np.unique(role)}
    return asked | {name.replace("other filler", "filler"): member for name, member in others.items()}


def _of_text(relevance: xr.Dataset) -> dict[str, Bool[np.ndarray, "batch query token"]]:
    position = relevance["position"].values
    at = np.take_along_axis(position, np.maximum(relevance["query_token"].values, 0), axis=1)[..., None]
    away = at - position[:, None]
    return {f"the {NEAR} before": away <= NEAR, "first": position[:, None] + 0 * away == 0, "earlier": away > NEAR}
