"""Where kernels come from: a trace (`write`, `mixer`) or a Jacobian (`block`); blocks of heads, one (layer, row) each.

    write   k_t[s] = sum_n exp(A_n Cum(s, t)) delta_s                 the mixer with B and C at one
    mixer   k_t[s] = sum_n C_t[n] exp(A_n Cum(s, t)) delta_s B_s[n]   selection frozen at what was executed
    block   k_t[s] = d out_t / d u_s                                  selection moving

In zoh delta_s is delta_s phi1(delta_s A_n) throughout; complex states (S4D) stand for their conjugates too: twice the
real part. Three variants of the first two: as executed ("real"), the layer made time-invariant ("null"), and delta
shuffled in time ("null_shuffle").
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical, Row, attention_row
from mamba_probe.analyses.wavelet_alignment import core

__all__ = ["NULLS", "BlockKernels", "Kernels", "TraceKernels"]

NULLS = ("null", "null_shuffle")
AT_ONCE = 2**23
"""Numbers of a (token, head) array held at once: longer rows are taken in smaller blocks of heads."""


class TraceKernels:
    """Kernels that a trace's layers executed.

    Args:
        trace: delta and A, for `mixer` B and C too.
        kind: "write" or "mixer".
        read_out: (kernel, channel or head), or None.
        seed: of the permutation of the shuffled variant, one a row, the same in every layer and head.

    Raises:
        ValueError: a missing variable, another discretisation than euler and zoh, a read-out of another shape.
    """

    nulls = NULLS

    def __init__(self, trace: xr.Dataset, kind: str, read_out: object, seed: int) -> None:
        self.trace, self.kind, self.seed = trace, kind, seed
        self.view = view = Canonical(trace, *(("delta", "A") if kind == "write" else ("delta", "A", "B", "C")))
        rule = trace.attrs.get("discretization")
        if rule not in ("euler", "zoh"):
            raise ValueError(f"wavelet_alignment needs a trace of discretization 'euler' or 'zoh'; it says {rule!r}")
        self.read_out = _read_out(view, read_out)
        self.names = _names(view.heads, self.read_out, read_out)
        self.layers, self.batch = view.layers, view.coords()["batch"]
        self.n_rows, self.asked = view.n_rows, None
        self.positions, self.contiguous, self.head_dim = view.positions, view.contiguous, view.head_dim
        self._loaded = lru_cache(maxsize=1)(self._load)

    def kernels(
        self, layer: int, row: int, at: int, window: int, variant: str
    ) -> Iterator[Float[np.ndarray, "kernel window"]]:
        """Kernels of the token `at` over the `window` tokens that end there, a block of heads at a time.

        With a read-out there is one block: read_out @ (kernels of the heads).
        """
        size = max(1, AT_ONCE // len(self.positions(row)))
        heads = [slice(at, at + size) for at in range(0, self.view.n_heads, size)]
        blocks = (self._of_heads(layer, row, part, at, window, variant) for part in heads)
        if self.read_out is None:
            yield from blocks
        else:
            yield _read([(self.read_out[:, part], block) for part, block in zip(heads, blocks, strict=True)])

    def _of_heads(self, layer: int, row: int, heads: slice, at: int, window: int, variant: str) -> np.ndarray:
        rows, A, B, C, groups = self._loaded(layer, row, heads.start, heads.stop)
        seen, zoh = slice(at + 1 - window, at + 1), self.view.zoh
        if variant == "null":
            mean = rows["real"].delta.mean(axis=0)
            delta, elapsed = np.broadcast_to(mean, (window, len(mean))), mean * np.arange(window - 1, -1, -1.0)[:, None]
            return attention_row(delta, elapsed, A, B.mean(axis=0)[None], C.mean(axis=0), groups, zoh).T
        chosen = rows["shuffled" if variant == "null_shuffle" else "real"]
        elapsed = chosen.cumulative[at] - chosen.cumulative[seen]
        written, read = (values if len(values) == 1 else values[seen] for values in (B, C))
        return attention_row(chosen.delta[seen], elapsed, A, written, read[-1], groups, zoh).T

    def _load(
        self, layer: int, row: int, start: int, stop: int
    ) -> tuple[dict[str, Row], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One block of heads: delta as executed and shuffled, A, and B, C with one token where they are constant."""
        heads = slice(start, stop)
        real, A = self.view.row(layer, row, heads), self.view.matrix(layer)[heads]
        order = np.random.default_rng([self.seed, row]).permutation(len(real.delta))
        shuffled = Row(real.delta[order], real.position, np.cumsum(real.delta[order], axis=0), real.contiguous)
        B, C, groups = self._selection(layer, row, heads, A)
        return {"real": real, "shuffled": shuffled}, A, B, C, groups

    def _selection(
        self, layer: int, row: int, heads: slice, A: Inexact[np.ndarray, "head decay"]
    ) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, " head"]]:
        if self.kind == "write":
            one = np.ones((1, 1, A.shape[1]))
            return one, one, np.zeros(len(A), dtype=int)
        if not self.view.constant:
            return *self.view.selection(layer, row), self.view.groups()[heads]
        B, C = (self._constant(name, layer)[heads][None] for name in ("B", "C"))
        return B, C, np.arange(len(A))

    def _constant(self, name: str, layer: int) -> Inexact[np.ndarray, "head state"]:
        values = self.trace[name].isel(layer=layer).transpose(self.head_dim, "state").values
        if not np.all(np.isfinite(values)):
            raise ValueError(f"`{name}` is NaN or infinite in layer {self.layers[layer]}")
        return values.astype(np.promote_types(values.dtype, np.float64))


class BlockKernels:
    """Kernels of a whole block: signed derivatives of its read outputs along one direction of its input.

    Args:
        jacobian: what `probe.jacobian(query_tokens=..., direction=...)` returned.

    Raises:
        ValueError: another Dataset, derivatives of what a source moves, or norms, which have no sign.
    """

    nulls = ()
    head_dim = "kernel"

    def __init__(self, jacobian: xr.Dataset) -> None:
        found = jacobian.get("jacobian")
        if found is None or set(found.dims) != {"batch", "query_token", "kernel", "token"}:
            raise ValueError(
                "kernel 'block' needs probe.jacobian(..., query_tokens=..., direction=...), `jacobian` over (batch, "
                f"query_token, kernel, token); got {'none' if found is None else f'dims {found.dims}'}"
            )
        if not str(jacobian.attrs.get("estimator", "")).partition(";")[0].endswith("along direction"):
            raise ValueError(
                "this jacobian holds norms, which have no sign and so no wavelets: pass direction= to probe.jacobian"
            )
        self.values = found.transpose("batch", "query_token", "kernel", "token")
        self.valid = jacobian["valid"].transpose("batch", "token").values.astype(bool)
        self.position = jacobian["position"].transpose("batch", "token").values
        self.asked = jacobian["query_token"].values
        self.layers = np.array([jacobian.attrs["layer"]])
        self.n_rows = len(self.valid)
        self.batch = jacobian["batch"].values if "batch" in jacobian.coords else np.arange(self.n_rows)
        self.names = jacobian["kernel"].values if "kernel" in jacobian.coords else np.arange(found.sizes["kernel"])

    def positions(self, row: int) -> Int[np.ndarray, " token"]:
        """Positions of the valid tokens of a row."""
        return self.position[row, self.valid[row]]

    def contiguous(self, row: int) -> bool:
        """Whether no padding lies between a row's valid tokens."""
        return bool(np.all(np.diff(np.flatnonzero(self.valid[row])) == 1))

    def kernels(
        self, layer: int, row: int, at: int, window: int, variant: str
    ) -> Iterator[Float[np.ndarray, "kernel window"]]:
        """Kernels of the token `at` over the `window` tokens that end there, in one block."""
        query = int(np.flatnonzero(self.asked == self.positions(row)[at])[0])
        values = self.values.isel(batch=row, query_token=query).values[:, self.valid[row]][:, at + 1 - window : at + 1]
        if not np.all(np.isfinite(values)):
            raise ValueError(f"`jacobian` is NaN or infinite at a valid token of row {row}")
        yield values.astype(np.float64)


Kernels = TraceKernels | BlockKernels


def _read(parts: list[tuple[np.ndarray, np.ndarray]]) -> Float[np.ndarray, "kernel window"]:
    """Sum of read-outs; one that cancels to rounding (`RANK_TOLERANCE` of its terms) becomes exactly zero."""
    found: Any = sum(read_out @ block for read_out, block in parts)
    terms: Any = sum(np.abs(read_out) @ np.abs(block) for read_out, block in parts)
    dead = np.abs(found).max(axis=1) <= core.RANK_TOLERANCE * np.max(terms, axis=1)
    return np.where(dead[:, None], 0.0, found)


def _read_out(view: Canonical, read_out: object) -> Float[np.ndarray, "kernel head"] | None:
    if read_out is None:
        return None
    if isinstance(read_out, xr.DataArray):
        if set(read_out.dims) != {"kernel", view.head_dim}:
            raise ValueError(
                f"read_out needs dims (kernel, {view.head_dim}); got ({', '.join(map(str, read_out.dims))})"
            )
        read_out = read_out.transpose("kernel", view.head_dim).values
    values = np.asarray(read_out, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != view.n_heads or not len(values):
        raise ValueError(f"read_out needs shape (kernel, {view.n_heads}) over `{view.head_dim}`; got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("read_out holds NaN or infinity")
    return values


def _names(heads: np.ndarray, read: np.ndarray | None, given: object) -> np.ndarray:
    if read is None:
        return heads
    labelled = isinstance(given, xr.DataArray) and "kernel" in given.coords
    return given["kernel"].values if labelled else np.arange(len(read))  # pyright: ignore[reportIndexIssue]
