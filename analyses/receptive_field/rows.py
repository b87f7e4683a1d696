"""What the trace alone says of each row: distances and sizes of hidden attention, retention, token distance."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, by_layer, runs, stacked
from mamba_probe.analyses.hidden_attention.core import statistics
from mamba_probe.analyses.hidden_attention.stream import KINDS, blocks
from mamba_probe.analyses.receptive_field import core

__all__ = ["KINDS", "Mixer", "distances", "mixer", "retentions"]

HELD_BYTES = 2**25
"""Most bytes of one array that is read at once, in float64."""


@dataclass(frozen=True)
class Mixer:
    """Rows of hidden attention, by kind (`KINDS`: executed, frozen to means, delta shuffled).

    Attributes:
        distance: mean distance read (layer, row, query), mean over the heads that read something; NaN at no token.
        head_distance: executed, by head (layer, query, head), mean over the rows where the head reads something.
        size: size of each source at one query, root of the sum of alpha^2 over heads (layer, row, source).
    """

    distance: dict[str, Float[np.ndarray, "layer row query"]]
    head_distance: Float[np.ndarray, "layer query head"]
    size: dict[str, Float[np.ndarray, "layer row source"]]


def mixer(view: Canonical, queries: Int[np.ndarray, "row query"], profiled: int, seed: int) -> Mixer:
    """Read every row at its `queries`, -1 for none; at one that all rows have, `profiled`, its sources' sizes too."""
    layers = by_layer([view.trace], lambda layer: _mixer(view, queries, profiled, seed, layer))
    distance, heads, size = zip(*layers, strict=True)
    return Mixer(stacked(list(distance)), np.stack(heads), stacked(list(size)))


def _mixer(
    view: Canonical, queries: Int[np.ndarray, "row query"], profiled: int, seed: int, layer: int
) -> tuple[dict[str, Float[np.ndarray, "row query"]], Float[np.ndarray, "query head"], dict[str, np.ndarray]]:
    """The same of one layer: distance and size by kind, head_distance between them."""
    sums = {kind: np.zeros((2, *queries.shape)) for kind in KINDS}
    heads = np.zeros((2, queries.shape[1], view.n_heads))
    size = {kind: np.zeros((len(queries), profiled + 1)) for kind in KINDS}
    for row in range(len(queries)):
        wanted = [at for at in np.unique(queries[row]).tolist() if at >= 0]
        for block in blocks(view, layer, row, wanted, seed):
            for kind in KINDS:
                for at in wanted:
                    alpha, here = block.alpha(kind, at), np.flatnonzero(queries[row] == at)
                    found = statistics(alpha)["mean_distance"]
                    parts = np.stack([np.nan_to_num(found), ~np.isnan(found)])
                    sums[kind][:, row, here] += parts.sum(axis=1)[:, None]
                    if kind == "executed":
                        heads[:, here, block.heads] += parts[:, None]
                    if at == profiled:
                        held = size[kind][row]
                        np.hypot(held, core.norm(alpha.T), out=held)
    return {kind: _ratio(both) for kind, both in sums.items()}, _ratio(heads), size


def _ratio(parts: np.ndarray) -> np.ndarray:
    """The first of two over the second; NaN where that is 0."""
    total, count = parts[0, ...], parts[1, ...]
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def retentions(view: Canonical, length: int, top: float) -> Float[np.ndarray, "both=2 layer row head"]:
    """What is left of a write after the first `length` tokens: delta clamped, and as it is."""
    return np.stack(by_layer([view.trace], lambda layer: _retentions(view, length, top, layer)), axis=1)


def _retentions(view: Canonical, length: int, top: float, layer: int) -> Float[np.ndarray, "both=2 row head"]:
    found, decay = np.zeros((2, view.n_rows, view.n_heads)), view.decay(layer)
    chunks = np.cumsum(view.trace["delta"].chunksizes.get(view.head_dim, ()))
    for heads in runs(view.n_heads, chunks, max(1, HELD_BYTES // (8 * length))):
        for row in range(view.n_rows):
            delta = view.load("delta", layer, row, heads, slice(length))
            for kind, steps in enumerate((core.clamped(delta, top), delta)):
                found[kind, row, heads] = core.retention(steps, decay[heads])
    return found


def distances(view: Canonical, name: str) -> Float[np.ndarray, "row layer"]:
    """Token distance of a variable over (layer, batch, token, model); a run of tokens at a time."""
    rows = range(view.n_rows)
    return np.array(by_layer([view.trace], lambda layer: [_distance(view, name, layer, row) for row in rows])).T


def _distance(view: Canonical, name: str, layer: int, row: int) -> float:
    n_tokens, width = len(view.positions(row)), view.trace.sizes["model"]
    edges: Int[np.ndarray, " chunk"] = np.cumsum([0, *view.trace[name].chunksizes.get("token", ())])
    ends = sorted({int(view.valid[row, :edge].sum()) for edge in edges[1:].tolist()} - {0})
    total, square = np.zeros(width), 0.0
    for tokens in runs(n_tokens, ends, max(1, HELD_BYTES // (8 * width))):
        values = view.load(name, layer, row, tokens=tokens)
        total, square = total + values.sum(axis=0), square + float(np.sum(values**2))
    return core.token_distance(n_tokens, total, square)
