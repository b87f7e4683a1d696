"""What is asked for, checked once: where states are sampled, where blocks are split, which heads are sized."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Int

from mamba_probe.analyses.common import Canonical

__all__ = ["Asked", "Splits", "losses"]

Splits = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | xr.DataArray | None
EVERY, SAMPLES = 128, 16
"""Tokens from one sample of the state to the next, as arXiv 2410.07145 samples, and samples of the shortest row where
that would give fewer."""
SIZED = 8
"""Heads of a layer whose effective state size is taken by default, evenly spread."""


@dataclass(frozen=True)
class Asked:
    """The settings of a measurement.

    Attributes:
        every: tokens from one sample of the state to the next.
        at: first token after the split, by row.
        sized: which heads are sized, on the head axis.
        loss: by row and valid token, or None.
    """

    every: int
    at: Int[np.ndarray, "batch query_token"]
    label: Int[np.ndarray, " query_token"]
    sized: Int[np.ndarray, " sized"]
    tolerance: float
    saturation: float
    loss: list[np.ndarray] | None
    n_bootstrap: int
    seed: int

    @classmethod
    def of(
        cls, view: Canonical, every: int | None, at: Splits, heads: Sequence[int] | np.ndarray | None, tolerance: float,
        saturation: float, loss: xr.Dataset | None, n_bootstrap: int, seed: int,
    ) -> "Asked":  # fmt: skip
        """Check them against a trace.

        Raises:
            ValueError: what cannot be, named.
        """
        for row in range(view.n_rows):
            _check_whole(view, row)
        n_valid = view.valid.sum(axis=1)
        longest = int(n_valid.max())
        every = min(EVERY, max(1, int(n_valid.min()) // SAMPLES)) if every is None else every
        if not 1 <= every <= longest:
            raise ValueError(f"every must be 1 to {longest} tokens, the longest row of this trace; got {every}")
        if not (0 < tolerance < 1 and 0 < saturation < 0.5):
            raise ValueError(
                f"tolerance must lie in (0, 1) and saturation in (0, 0.5); got {tolerance} and {saturation}"
            )
        splits, label = _splits(view, at)
        return cls(
            every, splits, label, _sized(view, heads), tolerance, saturation, losses(view, loss), n_bootstrap, seed
        )

    def samples(self, n_tokens: int) -> Int[np.ndarray, " sample"]:
        """Tokens after which a row's state is sampled."""
        return np.arange(self.every - 1, n_tokens, self.every)


def _check_whole(view: Canonical, row: int) -> None:
    first, n_tokens = int(view.positions(row)[0]), len(view.positions(row))
    if not view.contiguous(row) or first:
        what = f"begin at position {first}" if first else "are not contiguous"
        raise ValueError(f"the tokens of row {row} {what}: a state holds every token before it; record all tokens")
    if n_tokens < 2:
        raise ValueError(f"row {row} has 1 valid token: no token follows that could read its state; drop the row")


def _splits(view: Canonical, asked: Splits) -> tuple[Int[np.ndarray, "batch query_token"], np.ndarray]:
    n_valid = view.valid.sum(axis=1)
    if asked is None:
        return n_valid[:, None] // 2, np.arange(1)
    given = np.asarray(asked)
    shapes = given.ndim == 1 or (given.ndim == 2 and len(given) == view.n_rows)
    if not given.size or given.dtype.kind not in "iu" or not shapes:
        raise ValueError(
            f"at needs positions, integers (query_token,) or (batch = {view.n_rows}, query_token); got {given.dtype} "
            f"of shape {given.shape}"
        )
    at = np.broadcast_to(given, (view.n_rows, given.shape[-1])).astype(np.int64)
    for row, tokens in enumerate(at):
        if tokens.min() < 1 or tokens.max() >= n_valid[row] or len(np.unique(tokens)) < len(tokens):
            raise ValueError(
                f"at {tokens.tolist()} must be distinct positions 1 to {n_valid[row] - 1} of row {row}, which has "
                f"{n_valid[row]} valid tokens: the block is of the tokens from there on, and of those before"
            )
    return at, given if given.ndim == 1 else np.arange(given.shape[1])


def _sized(view: Canonical, asked: Sequence[int] | np.ndarray | None) -> Int[np.ndarray, " sized"]:
    if asked is None:
        return np.unique(np.linspace(0, view.n_heads - 1, min(SIZED, view.n_heads)).round().astype(int))
    given, known = np.asarray(asked), view.heads.tolist()
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or len(np.unique(given)) < len(given):
        raise ValueError(f"heads needs distinct integers, labels of `{view.head_dim}`; got {asked!r}")
    absent = sorted(set(given.tolist()) - set(known))
    if absent:
        raise ValueError(f"heads {absent} are not in `{view.head_dim}` of this trace: {min(known)} .. {max(known)}")
    return np.array([known.index(head) for head in given.tolist()])


def losses(view: Canonical, loss: xr.Dataset | None) -> list[np.ndarray] | None:
    """The loss of each row's valid tokens; NaN where a token has none.

    Raises:
        ValueError: no `loss` over (batch, token) of the trace's sizes, or an infinite one.
    """
    if loss is None:
        return None
    if not isinstance(loss, xr.Dataset) or "loss" not in loss or set(loss["loss"].dims) != {"batch", "token"}:
        raise ValueError('loss needs a Dataset with a variable "loss" over (batch, token)')
    values = loss["loss"].transpose("batch", "token").values.astype(float)
    if values.shape != view.valid.shape:
        raise ValueError(f"loss has shape {values.shape}; the trace has (batch, token) = {view.valid.shape}")
    if np.isinf(values).any():
        raise ValueError("loss is infinite at a token; NaN marks tokens without a loss")
    return [values[row, view.valid[row]] for row in range(view.n_rows)]
