"""Decay of single steps, exp(A delta_t): its mean, and how it lies before, at and after an event in each row."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, Row
from mamba_probe.analyses.memory_horizon.layer import blocks, columns, orders, state_slices
from mamba_probe.analyses.memory_horizon.options import Options
from mamba_probe.analyses.memory_horizon.summary import with_interval

__all__ = ["BINS", "measure_steps", "needed_retention"]

BINS = 20
"""Equal bins of exp(A delta) from 0 to 1; each holds its left end, the last both."""

Sums = Float[np.ndarray, "row head state event"]


def measure_steps(view: Canonical, place: int, options: Options) -> dict[str, np.ndarray]:
    """Mean decay of every head and state of the only layer of `view`, and what happens around the events.

    `place` is the layer's in the trace: a shuffle of its own.
    """
    A, rows = view.decay(0), range(view.n_rows)
    shape = (view.n_rows, *A.shape)
    sums, null = np.zeros((*shape, 3)), np.zeros((*shape, 3))
    count, sigma = np.zeros((view.n_heads, 3, BINS), dtype=np.int64), np.zeros(shape)
    sides = [_sides(view.positions(row), (options.events or (0,) * view.n_rows)[row]) for row in rows]
    n = np.array([[side.stop - side.start for side in of] for of in sides], dtype=float)
    for heads in blocks(view):
        held = [view.row(0, row, heads) for row in rows]
        shuffled = orders(held, place, options.seed)
        for row, i, head, states, decay in _decays(held, A[heads], range(view.n_heads)[heads]):
            sums[row, head, states] = _by_side(decay, sides[row])
            if options.events:
                count[head] += _binned(decay, sides[row])
                sigma[row, head, states] = -A[head, states] * _after(held[row], i, options.events[row])
                null[row, head, states] = _by_side(decay[:, shuffled[row]], sides[row]) if shuffled else np.nan
    found = {"mean_decay": sums.sum((0, -1)) / n.sum()}
    return found | (_events(sums, null, n, sigma, count, options) if options.events else {})


def needed_retention(n_after: Float[np.ndarray, " row"], epsilon: float) -> Float[np.ndarray, " row"]:
    """Geometric mean of exp(A delta) over the steps after an event that leaves 1 - epsilon: (1 - epsilon)^(1 / m).

    >>> needed_retention(np.array([59.0]), 0.1).round(5).tolist()
    [0.99822]
    """
    steps = np.where(n_after > 0, n_after, np.nan)
    return (1 - epsilon) ** (1 / steps)


def _sides(position: Int[np.ndarray, " token"], event: int) -> list[slice]:
    """Tokens before, at and after an event."""
    start, end = (int(np.searchsorted(position, event, side)) for side in ("left", "right"))
    return [slice(0, start), slice(start, end), slice(end, len(position))]


def _decays(
    rows: list[Row], A: Float[np.ndarray, "head state"], heads: range
) -> Iterator[tuple[int, int, int, slice, Float[np.ndarray, "state token"]]]:
    """exp(A delta), a few states at a time: (row, head in the block, head, states, decay)."""
    for row, held in enumerate(rows):
        for i, (head, delta) in enumerate(zip(heads, columns(held.delta), strict=True)):
            for states in state_slices([held.position], A.shape[1]):
                decay = np.outer(A[i, states], delta)
                yield row, i, head, states, np.exp(decay, out=decay)


def _after(row: Row, head: int, event: int) -> float:
    """Sum of delta over the tokens after the event; across gaps, from the cumulative sum."""
    at = row.index(event)
    if row.contiguous:
        return float(row.delta[at + 1 :, head].sum())
    return float(row.cumulative[-1, head] - row.cumulative[at, head])


def _by_side(decay: Float[np.ndarray, "state token"], sides: list[slice]) -> Float[np.ndarray, "state event"]:
    """Sum before, at and after the event."""
    return np.stack([decay[:, side].sum(axis=1) for side in sides], axis=-1)


def _binned(decay: Float[np.ndarray, "state token"], sides: list[slice]) -> Int[np.ndarray, "event bin"]:
    """Counts over all states."""
    return np.stack([np.histogram(decay[:, side], bins=BINS, range=(0.0, 1.0))[0] for side in sides])


def _mean(sums: np.ndarray, n: np.ndarray | np.floating) -> np.ndarray:
    """Sum over count; NaN where there is no token."""
    counted = np.broadcast_to(n, sums.shape)
    return np.divide(sums, counted, out=np.full(sums.shape, np.nan), where=counted > 0)


def _gamma(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Mean decay after the event less the mean up to and with it; the last axis is the event."""
    upto = _mean(np.asarray(sums[..., :2].sum(-1)), n[:2].sum())
    return np.asarray(_mean(np.asarray(sums[..., 2]), n[2]) - upto)


def _events(
    sums: Sums, null: Sums, n: Float[np.ndarray, "row event"], sigma: np.ndarray, count: np.ndarray, options: Options
) -> dict[str, np.ndarray]:
    after = n[:, 2]
    total = n.sum(0)
    found = {
        "mean_decay_event": _mean(sums.sum(0), total),
        "gamma": _gamma(sums.sum(0), total),
        "null_shuffle_gamma": _gamma(null.sum(0), total),
        "sigma": sigma,
        "geometric_decay_after": np.exp(-_mean(sigma, after[:, None, None])),
        "decay_count": count,
        "layer_decay_count": count.sum(0),
        "needed_retention": needed_retention(after, options.epsilon),
    }
    kept = (sigma <= -np.log1p(-options.epsilon)).mean((1, 2))

    def pooled(draws: Int[np.ndarray, " row"]) -> dict[str, np.ndarray]:
        drawn, shuffled, counts = (np.tensordot(draws, of, 1) for of in (sums.mean((1, 2)), null.mean((1, 2)), n))
        return {
            "layer_mean_decay_event": _mean(drawn, counts),
            "layer_gamma": _gamma(drawn, counts),
            "layer_null_shuffle_gamma": _gamma(shuffled, counts),
            "layer_retained_share": draws @ kept / draws.sum(),
        }

    return found | with_interval(pooled, len(n), options)
