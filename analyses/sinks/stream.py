"""The sums that every number of the analysis is made of, one layer and one block of heads at a time."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mamba_probe.analyses.common import Canonical, runs
from mamba_probe.analyses.sinks import core

__all__ = ["Layer", "read"]

READ_BYTES = 2**26
"""Most bytes of one (token, head) array that is read at once, in float64."""
NULL_BYTES = 2**26
"""Most bytes of the sums of all shifts of a block of heads."""


@dataclass
class Layer:
    """Sums of one layer.

    Attributes:
        observed: of each row, at the class and as the rest would have it.
        null: mean log ratio over shifts, by class and head.
        layer_null: mean log ratio over heads of each shift.
        score: how many standard deviations the log ratio lies above the mean; 0 where no shift changes it.
        largest: largest such number of each shift, over classes and heads.
    """

    observed: Float[np.ndarray, "part=2 row class head"]
    null: Float[np.ndarray, "class head"]
    layer_null: Float[np.ndarray, "shift class"]
    score: Float[np.ndarray, "class head"]
    largest: Float[np.ndarray, " shift"]


def read(view: Canonical, member: Bool[np.ndarray, "class batch token"], layer: int, n: int, seed: int) -> Layer:
    """Sums of a layer, with `n` shifts of each row's labels, the same ones in every layer and head."""
    n_classes, shape = len(member), (len(member), view.n_heads)
    observed, null, score = np.zeros((2, view.n_rows, *shape)), np.zeros(shape), np.zeros(shape)
    total, count, largest = np.zeros((n, n_classes)), np.zeros((n, n_classes)), np.full(n, -np.inf)
    longest = int(view.valid.sum(axis=1).max())
    most = min(READ_BYTES // (8 * longest), NULL_BYTES // (16 * n * n_classes))
    chunks = np.cumsum(view.trace["delta"].chunksizes.get(view.head_dim, ()))
    for heads in runs(view.n_heads, chunks, max(1, most)):
        parts = np.zeros((2, n, n_classes, heads.stop - heads.start))
        for row in range(view.n_rows):
            delta, labels = view.row(layer, row, heads).delta, member[:, row, view.valid[row]]
            observed[:, row, :, heads] = core.sums(labels.astype(float), delta)
            if core.usable(labels).any():
                _shift(parts, labels, delta, (seed, row))
        log = core.logarithm(parts)
        null[:, heads] = core.mean(np.moveaxis(log, 0, -1))
        total += np.where(np.isfinite(log), log, 0.0).sum(axis=2)
        count += np.isfinite(log).sum(axis=2)
        scores = _standardised(np.concatenate([core.logarithm(observed[..., heads].sum(axis=1))[None], log]))
        score[:, heads] = scores[0]
        largest = np.maximum(largest, np.where(np.isnan(scores[1:]), -np.inf, scores[1:]).max(axis=(1, 2)))
    over = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return Layer(observed, null, over, score, largest)


def _shift(
    parts: Float[np.ndarray, "part=2 shift class head"], labels: Bool[np.ndarray, "class token"],
    delta: Float[np.ndarray, "token head"], seed: tuple[int, ...],
) -> None:  # fmt: skip
    for some, orders in core.shifted(labels, parts.shape[1], seed):
        parts[:, some] += np.swapaxes(np.stack(core.sums(orders, delta)), 1, 2)


def _standardised(log: Float[np.ndarray, "n class head"]) -> Float[np.ndarray, "n class head"]:
    """In standard deviations about the mean, over the observed and its shifts alike: so they are exchangeable."""
    away = log - core.mean(np.moveaxis(log, 0, -1))
    deviation = np.sqrt(core.mean(np.moveaxis(away**2, 0, -1)))
    spread = deviation > 1e-9  # rounding alone is no spread: a constant delta has no ratio but 1
    return np.where(spread, away / np.where(spread, deviation, 1.0), np.where(np.isfinite(log), 0.0, log))
