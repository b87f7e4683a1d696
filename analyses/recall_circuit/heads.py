"""Induction on repeated random tokens, by layer and head: does it read from what followed the token last time?"""

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, attention_row, by_layer, described, interval
from mamba_probe.analyses.common.proportion import wilson
from mamba_probe.analyses.recall_circuit.core import ratio, silu
from mamba_probe.analyses.recall_circuit.stream import selection
from mamba_probe.trace import require

__all__ = ["induction_heads"]

NEIGHBOURS = 8
"""Tokens on either side of the target that its share is compared with."""
AXES = ("layer", "offset", "head")


def induction_heads(
    trace: xr.Dataset, *, offsets: Sequence[int] = (0, 1, 2), n_bootstrap: int = 200, seed: int = 0
) -> xr.Dataset:
    """Score every head of every layer on the induction target (ours; after Olsson et al. 2022, arXiv 2209.11895).

    share = mean over queries t of |alpha_t[s* + offset]| / sum_{s<=t} |alpha_t[s]|, with alpha_t the row of hidden
    attention and s* the token after the last earlier occurrence of the query's. What a head writes and when its gate
    opens are not in alpha (S4D's is the same at every token): with x and z, given = sum_t |o_{t,s*+offset}| /
    sum_t sum_s |o_{t,s}|, o_{t,s} = SiLU(z_t) x_s alpha_t[s], norms over a head's channels. No accuracy is needed: it
    describes one layer at its own input. A head that only prefers recent tokens scores on the neighbours as well.

    Args:
        trace: of `mp.tasks.repeated_tokens(...)` (or another task with `source_token`), with delta, A, B, C;
            with x and z, also `given`.
        offsets: tokens between what followed and where it was written.
        n_bootstrap: draws of prompts for the 95 % intervals.
        seed: of the draws.

    Returns:
        share, low, high, neighbours [given] (layer, offset, channel or head): on the target, and the mean on each of
        the 8 tokens on either side of it, those of the offsets left out; [volume] (layer, channel or head); null: mean
        1 / (t + 1), every token alike; accuracy, accuracy_low, accuracy_high where the trace has
        predictions; n_query.

    Raises:
        ValueError: no sources, tokens missing, or something was not recorded.

    >>> import mamba_probe as mp
    >>> construction = mp.constructions.induction("special", n_tokens=8)
    >>> with mp.attach(construction.model) as probe:
    ...     trace = probe.record(mp.tasks.induction(batch=2, length=16, vocab=8))
    >>> induction_heads(trace).share.sel(offset=0).max().round(3).item()
    1.0
    """
    if list(offsets) != sorted(set(offsets)) or min(offsets, default=-1) < 0:
        raise ValueError(f"`offsets` must be distinct and grow from at least 0; got {tuple(offsets)}")
    require(trace, "source_token")
    canonical = Canonical(trace, "delta", "A", "B", "C")
    asked = {row: _asked(canonical, row) for row in range(canonical.n_rows)}
    asked = {row: each for row, each in asked.items() if len(each[0])}
    if not asked:
        raise ValueError("no token of the trace has a `source_token`: record mp.tasks.repeated_tokens(...)")
    tallies = np.array(
        by_layer(
            [canonical.trace],
            lambda layer: [_tally(canonical, layer, row, *each, tuple(offsets)) for row, each in asked.items()],
        )
    )
    found = ratio(*(tallies.sum(axis=1)[:, i] for i in (0, 1)))
    low, high = interval(lambda draws: _share(draws, tallies), len(asked), n_bootstrap, seed)
    beside, given = (ratio(*(tallies.sum(axis=1)[:, i] for i in pair)) for pair in ((2, 3), (4, 5)))
    axes = tuple(canonical.head_dim if name == "head" else name for name in AXES)
    entries = {
        "share": (axes, found, "share of absolute attention on the induction target", "1"),
        "low": (axes, low, "lower 95 % bound of share over prompts", "1"),
        "high": (axes, high, "upper 95 % bound of share over prompts", "1"),
        "neighbours": (axes, beside, f"mean share of each of {NEIGHBOURS} tokens on either side of the target", "1"),
        "null": ((), np.mean(np.concatenate([1 / (query + 1) for query, _ in asked.values()])), "1 / (t + 1)", "1"),
        "n_query": ((), np.array(sum(len(query) for query, _ in asked.values())), "queries", "1"),
    }
    if {"x", "z"} <= set(trace.data_vars):
        entries["given"] = (axes, given, "share of what the head gives its queries that is the target's", "1")
        volume = tallies.sum(axis=1)[:, 5, 0]
        text = "share of what the layer gives that is the head's, W_out left out"
        entries["volume"] = (axes[::2], ratio(volume, volume.sum(axis=1, keepdims=True)), text, "1")
    coords = {"layer": canonical.layers, "offset": list(offsets), canonical.head_dim: canonical.heads}
    attrs = {
        "analysis": "induction_heads",
        "model": str(trace.attrs.get("model", "")),
        "estimator": "mean over queries of |alpha_t[s* + offset]| / sum_{s<=t} |alpha_t[s]|, selection as executed",
        "null": "every token alike",
        "interval": "95 %, percentiles of a bootstrap over prompts" if len(asked) > 1 else "none: one prompt",
    }
    return described(entries | _accuracy(trace), coords, attrs)


def _asked(canonical: Canonical, row: int) -> tuple[Int[np.ndarray, " query"], Int[np.ndarray, " query"]]:
    """Queries and their sources, as indices among the row's tokens."""
    if not canonical.contiguous(row):
        raise ValueError(
            f"induction_heads needs every token up to a query; row {row} has gaps: record with tokens=None"
        )
    valid = canonical.valid[row]
    index = np.cumsum(valid) - 1
    source = canonical.trace["source_token"].transpose("batch", "token").values[row]
    query = np.flatnonzero((source >= 0) & valid)
    return index[query], index[source[query] - int(canonical.token[0])]


def _tally(
    canonical: Canonical, layer: int, row: int, queries: Int[np.ndarray, " query"], targets: Int[np.ndarray, " query"],
    offsets: tuple[int, ...],
) -> Float[np.ndarray, "part=6 offset head"]:  # fmt: skip
    """Sums over queries: share on the target, their number; on its neighbours, number; given by it, by all sources."""
    step = canonical.row(layer, row)
    B, C = (selection(canonical, layer, row, slice(None), name) for name in ("B", "C"))
    A, groups = canonical.matrix(layer), canonical.groups()
    spoken = _spoken(canonical, layer, row)
    total = np.zeros((6, len(offsets), canonical.n_heads))
    for t, target in zip(queries.tolist(), targets.tolist(), strict=True):
        until = slice(0, t + 1)
        elapsed = step.cumulative[t] - step.cumulative[until]
        weight = np.abs(
            attention_row(
                step.delta[until], elapsed, A, B[:1] if canonical.constant else B[until], C[t], groups, canonical.zoh
            )
        )
        alive = weight.sum(axis=0) > 0
        share = weight / np.where(alive, weight.sum(axis=0), 1.0)
        near = np.arange(max(target - NEIGHBOURS, 0), min(target + offsets[-1] + NEIGHBOURS, t) + 1)
        near = near[(near < target) | (near > target + offsets[-1])]
        given = weight * spoken(t) if spoken else weight * np.nan
        total[5] += given.sum(axis=0)
        for i, offset in enumerate(offsets):
            if target + offset <= t:
                total[:2, i] += share[target + offset], alive
                total[4, i] += given[target + offset]
        if len(near):
            total[2:4] += np.array([share[near].mean(axis=0), alive])[:, None]
    return total


def _spoken(canonical: Canonical, layer: int, row: int) -> Callable[[int], Float[np.ndarray, "source head"]] | None:
    """|SiLU(z_t) x_s| of the sources of a query, by head; None where x or z was not recorded."""
    if not {"x", "z"} <= set(canonical.trace.data_vars):
        return None
    x, z = (canonical.load(name, layer, row) for name in ("x", "z"))
    x, gate = (each.reshape(*each.shape[:2], -1) for each in (x, np.asarray(silu(z))))
    return lambda t: np.linalg.norm(gate[t] * x[: t + 1], axis=-1)


def _share(draws: Int[np.ndarray, " row"], tallies: Float[np.ndarray, "layer row part offset head"]) -> np.ndarray:
    """The share of a resample of prompts."""
    drawn = np.tensordot(draws, tallies[:, :, :2], axes=(0, 1))
    return ratio(drawn[:, 0], drawn[:, 1])


def _accuracy(trace: xr.Dataset) -> dict[str, tuple[tuple[str, ...], np.ndarray, str, str]]:
    """Whether the model goes on with the sequence, where it says what comes next."""
    if "prediction" not in trace.coords or "target" not in trace.coords:
        return {}
    asked = (trace["target"].values >= 0) & trace["valid"].values.astype(bool)
    right = int((trace["prediction"].values == trace["target"].values)[asked].sum())
    low, high = wilson(right, int(asked.sum()))
    named = {"accuracy": right / asked.sum(), "accuracy_low": low, "accuracy_high": high}
    return {name: ((), np.array(value), "share of queries answered, 95 % Wilson", "1") for name, value in named.items()}
