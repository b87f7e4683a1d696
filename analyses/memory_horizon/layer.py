"""Horizons of one layer: its rows are loaded one block of channels at a time, each channel is measured whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, Row, interval
from mamba_probe.analyses.memory_horizon import core

__all__ = ["QUANTILES", "Options", "measure_layer"]

QUANTILES = (0.1, 0.5, 0.9)
"""Over (batch, token); a censored horizon counts as infinite."""

BLOCK_BYTES = 2**28
"""Most bytes of delta and its cumulative sum held at once: a layer above this is read in several blocks of channels."""

KINDS = ("forward", "backward", "null_shuffle", "null_lti")
GAINS = {"selectivity_gain": "forward", "null_shuffle_gain": "null_shuffle"}


@dataclass(frozen=True)
class Options:
    """What `measure` was asked for; tokens and events are positions among a row's valid tokens."""

    level: float
    tokens: tuple[int, ...]
    events: tuple[int, ...]
    n_bootstrap: int
    seed: int


@dataclass(frozen=True)
class Counts:
    """Horizons counted for each row and state; `least` puts a censored one at the least it can be."""

    exact: Int[np.ndarray, "*counted size"]
    least: Int[np.ndarray, "*counted size"]


def measure_layer(view: Canonical, layer: int, options: Options) -> dict[str, np.ndarray]:
    """Every result of one layer, by name; the leading axis of a per-channel result is the head."""
    threshold = core.reach(options.level, view.decay(layer))
    channels, totals, elapsed, tokens = [], {}, [], np.zeros(view.n_rows)
    for heads in _blocks(view):
        rows = [view.row(layer, row, heads) for row in range(view.n_rows)]
        spans = [core.elapsed(row.delta, row.cumulative, row.position) for row in rows]
        elapsed.append(np.stack([delta for delta, _ in spans]))
        tokens = np.array([count for _, count in spans])
        orders = _orders(rows, layer, options.seed)
        means = elapsed[-1] / tokens[:, None]
        for i, head in enumerate(range(view.n_heads)[heads]):
            tally = {kind: _tally(_path(rows, i, kind, orders, means), rows, threshold[head], kind) for kind in KINDS}
            channels.append(_channel(rows, i, view.decay(layer)[head], threshold[head], tally, options))
            _add(totals, tally)
    parts = {name: np.stack([channel[name] for channel in channels]) for name in channels[0]}
    parts |= _reference(parts, threshold, np.concatenate(elapsed, axis=1), tokens)
    parts["lyapunov"] = view.decay(layer) * parts["mean_delta"][:, None]
    return parts | _summary(parts, totals, threshold, np.concatenate(elapsed, axis=1), tokens, options)


def _blocks(view: Canonical) -> Iterator[slice]:
    bytes_each = 2 * 8 * max(1, int(view.valid.sum()))
    step = max(1, BLOCK_BYTES // bytes_each)
    for start in range(0, view.n_heads, step):
        yield slice(start, start + step)


def _orders(rows: list[Row], layer: int, seed: int) -> list[np.ndarray]:
    """One permutation of each row's tokens; none where tokens are missing, since what would be shuffled is unknown."""
    if not all(row.contiguous for row in rows):
        return []
    return [np.random.default_rng((seed, layer, i)).permutation(len(row.position)) for i, row in enumerate(rows)]


def _path(
    rows: list[Row], head: int, kind: str, orders: list[np.ndarray], means: Float[np.ndarray, "row head"]
) -> list[np.ndarray]:
    """Cumulative delta of a channel in each row: as executed, shuffled, or with delta at the row's mean."""
    if kind == "null_shuffle":
        return [np.cumsum(row.delta[order, head]) for row, order in zip(rows, orders, strict=False)]
    if kind == "null_lti":
        return [mean * (row.position - row.position[0] + 1.0) for row, mean in zip(rows, means[:, head], strict=True)]
    return [row.cumulative[:, head] for row in rows]


def _tally(paths: list[np.ndarray], rows: list[Row], threshold: Float[np.ndarray, " state"], kind: str) -> Counts:
    """Horizons counted, by the same rule for what was executed and for its nulls."""
    size = max(int(row.position[-1] - row.position[0]) for row in rows) + 3
    exact = np.zeros((len(rows), len(threshold), size), dtype=np.int64)
    least = np.zeros_like(exact)
    for i, (row, cumulative) in enumerate(zip(rows, paths, strict=False)):
        horizon = core.backward if kind == "backward" else core.forward
        steps, censored = horizon(cumulative, threshold, row.position)
        exact[i] = core.counts(steps, censored, size)
        least[i] = core.counts(steps, np.zeros_like(censored), size)
    return Counts(exact, least)


def _add(totals: dict[str, Counts], tally: dict[str, Counts]) -> None:
    """Add the counts of a channel, summed over its states, to those of the layer."""
    for kind, counts in tally.items():
        exact, least = counts.exact.sum(axis=1), counts.least.sum(axis=1)
        if kind in totals:
            exact, least = exact + totals[kind].exact, least + totals[kind].least
        totals[kind] = Counts(exact, least)


def _quantiles(count: Int[np.ndarray, "*shape size"]) -> Float[np.ndarray, "*shape quantile"]:
    """Quantiles along the last axis; NaN where nothing was counted."""
    found = core.quantiles(count, QUANTILES)
    return np.where(count.sum(axis=-1)[..., None] > 0, found, np.nan)


def _share(count: Int[np.ndarray, "*shape size"]) -> Float[np.ndarray, "*shape"]:
    total = count.sum(axis=-1).astype(float)
    return np.divide(count[..., -1], total, out=np.full(total.shape, np.nan), where=total > 0)


def _channel(
    rows: list[Row], head: int, A: np.ndarray, threshold: np.ndarray, tally: dict[str, Counts], options: Options
) -> dict[str, np.ndarray]:
    parts = {}
    for kind, counts in tally.items():
        parts[f"{kind}_horizon"] = _quantiles(counts.exact.sum(axis=0))
        parts[f"{kind}_horizon_at_least"] = _quantiles(counts.least.sum(axis=0))
        parts[f"{kind}_censored_share"] = _share(counts.exact.sum(axis=0))
    decay = [np.exp(np.outer(row.delta[:, head], A)) for row in rows]
    parts["mean_decay"] = np.concatenate(decay).mean(axis=0)
    if options.events:
        parts["mean_decay_event"] = _around(decay, [row.position for row in rows], options.events)
    if options.tokens:
        parts |= _at(rows, head, threshold, options.tokens)
    return parts


def _around(decay: list[np.ndarray], positions: list[np.ndarray], events: tuple[int, ...]) -> np.ndarray:
    """Mean decay before, at and after each row's event, pooled over rows: (state, event); NaN where no token is."""
    side = np.concatenate([np.sign(position - event) for position, event in zip(positions, events, strict=True)])
    pooled = np.concatenate(decay)
    none = np.full(pooled.shape[1], np.nan)
    return np.stack([pooled[side == s].mean(axis=0) if (side == s).any() else none for s in (-1, 0, 1)], axis=-1)


def _at(rows: list[Row], head: int, threshold: np.ndarray, tokens: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Horizons of the requested tokens: (batch, query_token, state)."""
    parts = {}
    for kind, horizon in (("forward", core.forward), ("backward", core.backward)):
        both = [horizon(row.cumulative[:, head], threshold, row.position) for row in rows]
        at = [[row.index(token) for token in tokens] for row in rows]
        steps = np.stack([steps[:, i].T for (steps, _), i in zip(both, at, strict=True)]).astype(float)
        censored = np.stack([censored[:, i].T for (_, censored), i in zip(both, at, strict=True)])
        parts[f"token_{kind}_horizon"] = np.where(censored, np.inf, steps)
        parts[f"token_{kind}_horizon_at_least"] = steps
    return parts


def _reference(parts: dict, threshold: np.ndarray, elapsed: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The layer with delta frozen to its mean, and what selectivity adds to it."""
    mean_delta = (elapsed.sum(axis=0) / tokens.sum())[:, None]
    frozen = parts["null_lti_horizon"][..., 1]
    forward, least = parts["forward_horizon"], parts["forward_horizon_at_least"]
    return {
        "mean_delta": mean_delta[:, 0],
        "lti_horizon": core.lti(threshold, mean_delta),
        "selectivity_gain": core.ratio(forward[..., 1], frozen),
        "selectivity_gain_at_least": core.ratio(least[..., 1], frozen),
        "log_spread": core.log_spread(forward),
        "log_spread_at_least": core.least_log_spread(forward, least),
        "null_shuffle_log_spread": core.log_spread(parts["null_shuffle_horizon"]),
        "null_lti_log_spread": core.log_spread(parts["null_lti_horizon"]),
    }


def _summary(
    parts: dict,
    totals: dict[str, Counts],
    threshold: np.ndarray,
    elapsed: np.ndarray,
    tokens: np.ndarray,
    options: Options,
) -> dict[str, np.ndarray]:
    """Quantiles pooled over (batch, token, channel, state), each with its bootstrap interval over rows."""

    def reference(draws: np.ndarray) -> np.ndarray:
        horizon = core.lti(threshold, ((draws @ elapsed) / (draws @ tokens))[:, None])
        return np.quantile(horizon, QUANTILES, method="inverted_cdf")

    def gain(draws: np.ndarray, kind: str) -> np.ndarray:
        median, frozen = (_quantiles(draws @ totals[which].exact)[1:2] for which in (kind, "null_lti"))
        return core.ratio(median, frozen).reshape(())

    statistics = {f"layer_{kind}_horizon": lambda draws, c=totals[kind]: _quantiles(draws @ c.exact) for kind in KINDS}
    statistics |= {"layer_lti_horizon": reference}
    statistics |= {f"layer_{name}": partial(gain, kind=kind) for name, kind in GAINS.items()}
    every = np.ones(len(tokens), dtype=int)
    found = {name: np.asarray(statistic(every)) for name, statistic in statistics.items()}
    for name, statistic in statistics.items():
        bounds = interval(statistic, len(tokens), options.n_bootstrap, options.seed)
        found |= {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
    for kind in KINDS:
        found[f"layer_{kind}_horizon_at_least"] = _quantiles(totals[kind].least.sum(axis=0))
        found[f"layer_{kind}_censored_share"] = _share(totals[kind].exact.sum(axis=0))
    for name, kind in GAINS.items():
        at_least = found[f"layer_{kind}_horizon_at_least"][1:2]
        found[f"layer_{name}_at_least"] = core.ratio(at_least, found["layer_null_lti_horizon"][1:2]).reshape(())
    for name in (
        "log_spread",
        "log_spread_at_least",
        "null_shuffle_log_spread",
        "null_lti_log_spread",
    ):
        found[f"layer_{name}"] = _median(parts[name])
    return found


def _median(values: np.ndarray) -> np.ndarray:
    """Median over channels and states of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return np.asarray(np.quantile(known, 0.5, method="inverted_cdf") if known.size else np.nan)
