"""Counts of values by the logarithm to base 2, exactly."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import described
from mamba_probe.reducing.reduction import Accumulating, bounded, n_units, parts
from mamba_probe.reducing.values import check, rest_dims, row_values

__all__ = ["Histogram"]

OUTSIDE = {"not_positive": "is 0 or negative", "below": "is positive and below the first bin",
           "above": "is at or above the end of the last bin"}  # fmt: skip


class Histogram(Accumulating):
    """See `histogram`."""

    def __init__(
        self,
        variable: str,
        bins: Sequence[float] | np.ndarray,
        *,
        name: str | None = None,
        n_bootstrap: int = 200,
        seed: int = 0,
    ):
        super().__init__(n_bootstrap, seed)
        self.variables, self.name, self.edges = (variable,), name or variable, _edges(bins)

    def __repr__(self) -> str:
        return f"Histogram({self.variables[0]!r}, bins={self.edges.tolist()}, name={self.name!r}, {self.drawn})"

    def update(self, trace: xr.Dataset) -> None:
        """Fold in the next rows."""
        variable = self.variables[0]
        check(trace, variable)
        self.keep(rest_dims(trace, variable) | {"n_units": n_units(trace)})
        for part in parts(trace):
            block = row_values(trace, variable, part)
            for of, member in part.members.items():
                values = block[:, member]
                count = counted(values, self.edges)
                shape = (values.shape[0], *values.shape[2:], count.shape[-1])
                self.held(of, "count", shape, np.int64)[...] += count.reshape(shape)
                pooled = self.held(of, "pooled", (int(self.constant("n_units")), shape[0], shape[-1]), np.int64)
                pooled[part.unit] += count.reshape(shape[0], -1, shape[-1]).sum(axis=1)

    def result(self) -> xr.Dataset:
        """Counts by class, layer, channel or head and bin, and shares by layer with intervals."""
        dims, name = self.constant("dims").tolist(), self.name
        over, bin_dim = ("class", "layer", *dims), f"{name}_bin"
        count = np.stack([self.arrays[of, "count"] for of in self.classes])
        what = f"of {self.variables[0]}"
        entries = {f"{name}_count": ((*over, bin_dim), count[..., 3:], f"values {what} in each bin of log2", "1")}
        for i, (end, text) in enumerate(OUTSIDE.items()):
            entries[f"{name}_{end}"] = (over, count[..., i], f"values where {self.variables[0]} {text}", "1")
        shares = [self._shares(of) for of in self.classes]
        for end in shares[0]:
            values = np.stack([one[end] for one in shares])
            text = f"share {what} in each bin of log2, of all values of the class{' (95 %)' if end else ''}"
            entries[f"layer_{name}_share{end}"] = (("class", "layer", bin_dim), values, text, "1")
        coords = {"class": np.array(self.classes, dtype=object), "layer": self.constant("layer"),
                  bin_dim: self.edges[:-1], f"{bin_dim}_end": (bin_dim, self.edges[1:])}  # fmt: skip
        return described(entries, coords | {dim: self.constant(dim) for dim in dims}, {})

    def _shares(self, of: str) -> dict[str, np.ndarray]:
        pooled = self.arrays[of, "pooled"]

        def statistic(draws: Int[np.ndarray, " unit"]) -> np.ndarray:
            drawn = np.tensordot(draws, pooled, 1).astype(float)
            total = drawn.sum(axis=-1, keepdims=True)
            return np.divide(drawn, total, out=np.full(drawn.shape, np.nan), where=total > 0)[..., 3:]

        return bounded(statistic, len(pooled), self.n_bootstrap, self.seed)


def counted(
    values: Float[np.ndarray, "layer token *rest"], edges: Float[np.ndarray, " edge"]
) -> Int[np.ndarray, "series bin"]:
    """How many tokens lie outside (the three of OUTSIDE) and in each bin [2^e, 2^e'), of each layer and channel.

    Values are compared with powers of 2, since a rounded logarithm would move those next to an edge.

    >>> counted(np.array([[[0.0], [0.5], [1.0], [1.9], [2.0]]]), np.array([0.0, 1.0])).tolist()
    [[1, 1, 1, 2]]
    """
    series = np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])
    n_bins = len(edges) - 1
    place = np.searchsorted(np.exp2(edges), series, side="right") + 2  # 2: below, 3.. the bins, n_bins + 3: above
    place = np.where(series <= 0, 0, np.where(place == 2, 1, np.where(place == n_bins + 3, 2, place)))
    flat = place + (n_bins + 3) * np.arange(len(series))[:, None]
    return np.bincount(flat.ravel(), minlength=len(series) * (n_bins + 3)).reshape(len(series), -1)


def _edges(bins: Sequence[float] | np.ndarray) -> Float[np.ndarray, " edge"]:
    edges = np.asarray(bins, dtype=float) if np.ndim(bins) == 1 else np.zeros(0)
    if len(edges) < 2 or not np.isfinite(edges).all() or np.any(np.diff(edges) <= 0):
        raise ValueError(
            "bins are edges of log2, at least two and increasing, such as np.arange(-12, 4): rows come one after"
            f" another, so no range can be read off them beforehand; got {bins!r}"
        )
    return edges
