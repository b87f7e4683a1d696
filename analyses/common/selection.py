"""What one (layer, prompt) selects: B of every source as it is stored, C of the queries alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Inexact

from mamba_probe.analyses.common.canonical import Canonical
from mamba_probe.analyses.common.lazy import read
from mamba_probe.analyses.common.runs import runs

__all__ = ["RUN", "Selection"]

RUN = 2**21
"""Numbers of B or C read at once: only what is kept of them grows with the tokens."""


@dataclass(frozen=True)
class Selection:
    """B and C of one (layer, prompt); one token stands for all where they are constant (S4D).

    Attributes:
        B: of every token in the type it is stored in, which products with C promote exactly.
        C: of each query, by its index among the valid tokens.
        B_mean, C_mean: over all valid tokens.
    """

    B: Inexact[np.ndarray, "#token group state"]
    C: dict[int, Inexact[np.ndarray, "group state"]]
    B_mean: Inexact[np.ndarray, "group state"]
    C_mean: Inexact[np.ndarray, "group state"]

    @classmethod
    def of(
        cls, view: Canonical, layer: int, row: int, queries: Iterable[int], order: Literal["C", "F"] = "C"
    ) -> "Selection":
        """Read them; `order` says how B lies in memory: "F", with the tokens of a state side by side.

        Raises:
            ValueError: a number that is NaN or infinite.
        """
        if view.constant:
            B, C = (_constant(view, name, layer) for name in "BC")
            return cls(B[None], dict.fromkeys(queries, C), B, C)
        stored = _stored(view, "C", layer, row, order)
        C, C_mean = {at: _wide(stored[at]) for at in queries}, _mean(stored)
        del stored
        B = _stored(view, "B", layer, row, order)
        return cls(B, C, _mean(B), C_mean)


def _constant(view: Canonical, name: str, layer: int) -> Inexact[np.ndarray, "head state"]:
    values = _wide(read(view.trace[name].isel(layer=layer).transpose(view.head_dim, "state")).values)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"`{name}` is NaN or infinite in layer {view.layers[layer]}")
    return values


def _stored(
    view: Canonical, name: str, layer: int, row: int, order: Literal["C", "F"]
) -> Inexact[np.ndarray, "token group state"]:
    """Its valid tokens, checked, in the type that is stored; read in runs, of whole chunks of a store."""
    array, n_tokens = view.trace[name], len(view.positions(row))
    shape = array.isel(layer=layer, batch=row, token=0).shape
    found = np.empty((n_tokens, *shape), array.dtype, order)
    edges = np.cumsum([0, *array.chunksizes.get("token", ())])
    ends = [int(view.valid[row, :edge].sum()) for edge in edges[1:].tolist()]
    for tokens in runs(n_tokens, sorted(set(ends) - {0}), max(1, RUN // int(np.prod(shape)))):
        found[tokens] = view.load(name, layer, row, tokens=tokens)
    return found


def _wide(values: Inexact[np.ndarray, "*shape"]) -> Inexact[np.ndarray, "*shape"]:
    return values.astype(np.promote_types(values.dtype, np.float64))


def _mean(values: Inexact[np.ndarray, "token group state"]) -> Inexact[np.ndarray, "group state"]:
    """Over tokens, to the bit as if all were in float64: a state after another where its tokens lie side by side."""
    if values.flags.c_contiguous:
        return values.mean(axis=0, dtype=np.promote_types(values.dtype, np.float64))
    return np.apply_along_axis(lambda one: _wide(one).mean(), 0, values)
