"""One form for all families: delta (token, head), A (head, decay), B and C (token, group, state), one row at a time.

A channel of Mamba-1 or S4D is a head; `decay` is `state`, but of size 1 in Mamba-2, since all its states share one.
S4D's delta, B and C are the same at every token, and its channels are groups of their own; its A, B and C are complex.
Only valid tokens appear, in order, so a lag is a difference of `position`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from dask.base import is_dask_collection
from jaxtyping import Bool, Float, Inexact, Int

from mamba_probe.analyses.common.lazy import read
from mamba_probe.trace import require

__all__ = ["Canonical", "Row"]


@dataclass(frozen=True)
class Row:
    """The valid tokens of one prompt in one layer.

    Attributes:
        delta: step sizes as executed.
        position: index among the prompt's valid tokens; lags are its differences.
        cumulative: Cum, the sum of delta up to and with each token; Cum(s, t) = cumulative[t] - cumulative[s].
        contiguous: whether every token between the first and the last is here, and none of them is padding.
    """

    delta: Float[np.ndarray, "token head"]
    position: Int[np.ndarray, " token"]
    cumulative: Float[np.ndarray, "token head"]
    contiguous: bool

    def index(self, position: int) -> int:
        """Where `position` is among the tokens of this row.

        Raises:
            ValueError: the row does not hold that token.
        """
        found = np.flatnonzero(self.position == position)
        if not len(found):
            raise ValueError(
                f"token {position} is not among this row's valid tokens, which run from position {self.position[0]} "
                f"to {self.position[-1]}; tokens are counted by the `position` coordinate"
            )
        return int(found[0])


class Canonical:
    """Read-only view of a trace that loads one (layer, batch) block at a time, in float64.

    Args:
        trace: what `probe.record` returned, in memory or on dask.
        names: schema variables that the analysis needs.

    Raises:
        ValueError: a variable is missing, A is positive, a row has no valid token, `position` does not grow.

    >>> import numpy as np, xarray as xr
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), np.full((1, 1, 3, 1), 0.5, "float32")),
    ...      "A": (("layer", "channel", "state"), -np.ones((1, 1, 1), "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), [[False, True, True]]),
    ...      "position": (("batch", "token"), [[-1, 0, 1]])},
    ...     {"schema_version": 1, "family": "mamba"})
    >>> Canonical(trace, "delta", "A").row(0, 0).cumulative[:, 0].tolist()
    [0.5, 1.0]
    """

    def __init__(self, trace: xr.Dataset, *names: str):
        require(trace, *dict.fromkeys(("delta", "A", *names)), "valid", "position")  # what heads and states are
        self.trace = trace = _with_coords(trace)
        self.constant = trace.attrs["family"] == "s4d"
        self.zoh = trace.attrs.get("discretization") == "zoh"
        self.head_dim = str(trace["delta"].dims[-1])
        self.n_layers, self.n_rows = trace.sizes["layer"], trace.sizes["batch"]
        self.n_heads = trace.sizes[self.head_dim]
        self.n_states = trace.sizes["state"] if "state" in trace["A"].dims else 1
        self.valid: Bool[np.ndarray, "batch token"] = trace["valid"].transpose("batch", "token").values.astype(bool)
        self.position: Int[np.ndarray, "batch token"] = trace["position"].transpose("batch", "token").values
        self.token: Int[np.ndarray, " token"] = self._labels("token", trace.sizes["token"])
        for row in range(self.n_rows):
            self._check_row(row)

    def _check_row(self, row: int) -> None:
        position = self.position[row, self.valid[row]]
        if not len(position):
            raise ValueError(f"row {row} of `batch` has no valid token; drop it with trace.isel(batch=...)")
        if np.any(np.diff(position) < 1):
            raise ValueError(
                f"`position` must grow by at least 1 from each valid token to the next; not so in row {row}"
            )

    @property
    def layers(self) -> np.ndarray:
        """The model's own layer numbers."""
        return self._labels("layer", self.n_layers)

    @property
    def heads(self) -> np.ndarray:
        """Labels of the recorded heads (Mamba-1: channels)."""
        return self._labels(self.head_dim, self.n_heads)

    def _labels(self, dim: str, size: int) -> np.ndarray:
        return self.trace[dim].values if dim in self.trace.coords else np.arange(size)

    def coords(self) -> dict[str, np.ndarray]:
        """Coordinates of a result over (layer, batch, head)."""
        return {"layer": self.layers, "batch": self._labels("batch", self.n_rows), self.head_dim: self.heads}

    def positions(self, row: int) -> Int[np.ndarray, " token"]:
        """Positions of the valid tokens of a row."""
        return self.position[row, self.valid[row]]

    def contiguous(self, row: int) -> bool:
        """Whether a row's valid tokens follow one another: none is missing, and no padding lies between (it decays)."""
        token = self.token[self.valid[row]]
        return bool(np.all(np.diff(self.positions(row)) == 1) and np.all(np.diff(token) == 1))

    def groups(self) -> Int[np.ndarray, " head"]:
        """Group of each head: head i of H reads group i // (H / G); in S4D its own.

        Raises:
            ValueError: H is no multiple of G.
        """
        if self.constant:
            return np.arange(self.n_heads)
        n_heads, n_groups = int(self.trace.attrs.get("n_heads", self.n_heads)), self.trace.sizes["group"]
        if n_groups == 1:
            return np.zeros(self.n_heads, dtype=int)
        if n_heads % n_groups or np.max(self.heads) >= n_heads:
            raise ValueError(
                f"`{self.head_dim}` needs a multiple of the {n_groups} groups and indices below it; got {n_heads} with "
                f"indices up to {np.max(self.heads)}. A trace of some heads only needs attrs['n_heads']."
            )
        return self.heads // (n_heads // n_groups)

    def matrix(self, layer: int) -> Inexact[np.ndarray, "head decay"]:
        """A of a layer, by position on the layer axis: complex in S4D.

        Raises:
            ValueError: A is not finite, its real part positive, or complex in another family than S4D.
        """
        A: Any = read(self.trace["A"].isel(layer=layer)).values
        if np.iscomplexobj(A) and not self.constant:
            raise ValueError(f"`A` is complex in a trace of {self.trace.attrs['family']}; only S4D has complex A")
        if not np.all(np.isfinite(A) & (A.real <= 0)):
            raise ValueError(
                f"`A` of layer {self.layers[layer]} must be finite and at most 0; got {A.real.min()} .. {A.real.max()}"
            )
        return A.astype(np.promote_types(A.dtype, np.float64)).reshape(self.n_heads, -1)

    def decay(self, layer: int) -> Float[np.ndarray, "head decay"]:
        """Decay rates of a layer: A, or its real part.

        Raises:
            ValueError: A is not finite or positive.
        """
        return np.real(self.matrix(layer))

    def row(
        self, layer: int, row: int, heads: slice = slice(None), tokens: slice = slice(None),
        before: Float[np.ndarray, " head"] | float = 0.0,
    ) -> Row:  # fmt: skip
        """The block of one layer and prompt: delta and its cumulative sum over valid tokens.

        Tokens that are not contiguous take `delta_cumsum` from the trace, since the gaps' delta is unknown.

        Args:
            layer, row, heads: by position.
            tokens: which of the valid tokens.
            before: the cumulative sum up to these, of contiguous tokens: read in runs they have the sums of the whole.

        Raises:
            ValueError: delta is negative or not finite; tokens have gaps and the trace has no usable `delta_cumsum`.
        """
        delta, position = self.load("delta", layer, row, heads, tokens), self.positions(row)[tokens]
        if np.any(delta < 0):
            raise ValueError(
                f"`delta` of layer {self.layers[layer]} is negative in row {row}; a step size is at least 0"
            )
        if not self.contiguous(row):
            return Row(delta, position, self._across_gaps(layer, row, heads, tokens), False)
        cumulative = delta.copy()
        cumulative[:1] += before
        return Row(delta, position, np.cumsum(cumulative, axis=0, out=cumulative), True)

    def _across_gaps(self, layer: int, row: int, heads: slice, tokens: slice) -> Float[np.ndarray, "token head"]:
        if "delta_cumsum" not in self.trace:
            raise ValueError(
                f"the tokens of row {row} are not contiguous and the trace lacks `delta_cumsum`: decay across the gaps "
                "is unknown. Record all tokens, or name delta_cumsum in variables=."
            )
        cumulative = self.load("delta_cumsum", layer, row, heads, tokens)
        if np.any(np.diff(cumulative, axis=0) < 0):
            raise ValueError(f"`delta_cumsum` of layer {self.layers[layer]} falls along the tokens of row {row}")
        return cumulative

    def selection(
        self, layer: int, row: int
    ) -> tuple[Inexact[np.ndarray, "token group state"], Inexact[np.ndarray, "token group state"]]:
        """B and C of the valid tokens, as the scan received them."""
        return self.load("B", layer, row), self.load("C", layer, row)

    def load(
        self, name: str, layer: int, row: int, heads: slice = slice(None),
        tokens: slice | Int[np.ndarray, " token"] = slice(None),
    ) -> np.ndarray:  # fmt: skip
        """One variable of one (layer, batch) block, `tokens` of its valid ones; on dask nothing else is computed."""
        array, where = self.trace[name], {"layer": layer}
        if self.head_dim in array.dims:
            where |= {self.head_dim: heads}
        at = np.flatnonzero(self.valid[row])[tokens]
        if "token" in array.dims:
            run = isinstance(tokens, slice) and len(at) and len(at) == at[-1] + 1 - at[0]  # read as it lies
            where |= {"batch": row, "token": slice(at[0], at[-1] + 1) if run else at}
        values = read(array.isel(where)).values  # at once: of slices of slices dask reads all that the first takes
        if "token" not in array.dims:
            values = np.broadcast_to(values, (len(at), *values.shape))
        block = values.astype(np.promote_types(values.dtype, np.float64))
        bad = np.flatnonzero(~np.isfinite(block).all(axis=tuple(range(1, block.ndim))))
        if len(bad):
            raise ValueError(
                f"`{name}` is NaN or infinite in layer {self.layers[layer]}, row {row}, at valid token "
                f"{self.positions(row)[tokens][bad[0]]}; padding must be marked in `valid`"
            )
        return block


def _with_coords(trace: xr.Dataset) -> xr.Dataset:
    """Its coordinates in memory: they are small, and read often."""
    lazy = {name: read(coord) for name, coord in trace.coords.items() if is_dask_collection(coord.variable)}
    return trace.assign_coords(lazy) if lazy else trace
