"""Horizons of one layer at one level: read one block of channels at a time, measured one channel at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, Row
from mamba_probe.analyses.memory_horizon import core, survival
from mamba_probe.analyses.memory_horizon.options import QUANTILES, Options
from mamba_probe.analyses.memory_horizon.summary import GAINS, Counts, found_quantiles, share, summary

__all__ = ["blocks", "measure_layer", "orders", "state_slices"]

BLOCK_BYTES = 2**28
"""Most bytes of delta and its cumulative sum held at once: a layer above this is read in several blocks of channels."""

STATE_ELEMENTS = 2**21
"""Most (token, state) elements worked on at once: of long rows, few states are measured at a time."""

KINDS = ("forward", "backward", "null_shuffle", "null_lti")


def measure_layer(view: Canonical, layer: int, level: float, options: Options) -> dict[str, np.ndarray]:
    """Every horizon of one layer, by name; the leading axis of a per-channel result is the head."""
    threshold = core.reach(level, view.decay(layer))
    channels, totals, spans, tokens = [], {}, [], np.zeros(len(options.units))
    for heads in blocks(view):
        rows = [view.row(layer, row, heads) for row in range(view.n_rows)]
        parts = [_part(rows[row], part) for row, part in options.units]
        spans.append(np.stack([delta for delta, _ in parts]))
        tokens = np.array([count for _, count in parts])
        shuffled, means = orders(rows, layer, options.seed), [np.divide(*_part(row, slice(None))) for row in rows]
        for i, head in enumerate(range(view.n_heads)[heads]):
            pieces = []
            for states in state_slices(rows, threshold.shape[1]):
                reach = threshold[head, states]
                tally = {
                    kind: _tally(_path(rows, i, kind, shuffled, means), rows, reach, kind, options) for kind in KINDS
                }
                pieces.append(_channel(tally, options) | _at(rows, i, reach, options.tokens))
                _add(totals, tally)
            channels.append({name: np.concatenate([piece[name] for piece in pieces], -1) for name in pieces[0]})
    parts = {name: np.stack([channel[name] for channel in channels]) for name in channels[0]}
    parts = {name: values if name.startswith("token_") else _state_first(values) for name, values in parts.items()}
    elapsed = np.concatenate(spans, axis=1)
    parts |= _reference(parts, view.decay(layer), threshold, elapsed, tokens)
    return parts | summary(parts, totals, threshold, elapsed, tokens, options)


def blocks(view: Canonical) -> Iterator[slice]:
    """Blocks of channels whose delta fits in `BLOCK_BYTES`."""
    bytes_each = 2 * 8 * max(1, int(view.valid.sum()))
    step = max(1, BLOCK_BYTES // bytes_each)
    for start in range(0, view.n_heads, step):
        yield slice(start, start + step)


def state_slices(rows: list[Row], n_states: int) -> list[slice]:
    """Slices of the states, few at a time where rows are long."""
    step = max(1, STATE_ELEMENTS // sum(len(row.position) for row in rows))
    return [slice(start, start + step) for start in range(0, n_states, step)]


def orders(rows: list[Row], layer: int, seed: int) -> list[np.ndarray]:
    """One permutation of each row's tokens; none where tokens are missing, since what would be shuffled is unknown."""
    if not all(row.contiguous for row in rows):
        return []
    return [np.random.default_rng((seed, layer, i)).permutation(len(row.position)) for i, row in enumerate(rows)]


def _part(row: Row, part: slice) -> tuple[Float[np.ndarray, " head"], int]:
    return core.elapsed(row.delta[part], row.cumulative[part], row.position[part])


def _state_first(values: np.ndarray) -> np.ndarray:
    """(head, quantile, state) -> (head, state, quantile); (head, state) as it is."""
    return np.moveaxis(values, -1, 1)


def _path(
    rows: list[Row], head: int, kind: str, shuffled: list[np.ndarray], means: list[np.ndarray]
) -> list[np.ndarray]:
    """Cumulative delta of a channel in each row: as executed, shuffled, or with delta at the row's mean."""
    if kind == "null_shuffle":
        return [np.cumsum(row.delta[order, head]) for row, order in zip(rows, shuffled, strict=False)]
    if kind == "null_lti":
        return [mean[head] * (row.position - row.position[0] + 1.0) for row, mean in zip(rows, means, strict=True)]
    return [row.cumulative[:, head] for row in rows]


def _tally(
    paths: list[np.ndarray], rows: list[Row], threshold: Float[np.ndarray, " state"], kind: str, options: Options
) -> Counts:
    """Horizons counted by unit of resampling, by the same rule for what was executed and for its nulls."""
    size = max(int(row.position[-1] - row.position[0]) for row in rows) + 3
    exact = np.zeros((len(options.units), len(threshold), size), dtype=np.int64)
    least = np.zeros_like(exact)
    horizon = core.backward if kind == "backward" else core.forward
    for i, (row, cumulative) in enumerate(zip(rows, paths, strict=False)):
        steps, censored = horizon(cumulative, threshold, row.position)
        for unit, (of, part) in enumerate(options.units):
            if of == i:
                exact[unit] = core.counts(steps[:, part], censored[:, part], size)
                least[unit] = core.counts(steps[:, part], np.zeros_like(censored[:, part]), size)
    return Counts(exact, least)


def _add(totals: dict[str, Counts], tally: dict[str, Counts]) -> None:
    """Add the counts of a channel, summed over its states, to those of the layer."""
    for kind, counts in tally.items():
        exact, least = counts.exact.sum(axis=1), counts.least.sum(axis=1)
        if kind in totals:
            exact, least = exact + totals[kind].exact, least + totals[kind].least
        totals[kind] = Counts(exact, least)


def _channel(tally: dict[str, Counts], options: Options) -> dict[str, np.ndarray]:
    """Statistics of each state, state last."""
    parts = {}
    for kind, counts in tally.items():
        exact, least = counts.exact.sum(axis=0), counts.least.sum(axis=0)
        parts[f"{kind}_horizon"] = found_quantiles(exact).T
        parts[f"{kind}_horizon_at_least"] = found_quantiles(least).T
        parts[f"{kind}_censored_share"] = share(exact)
        if kind in ("forward", "backward"):
            survived = survival.curve(exact, least)
            parts[f"{kind}_km_horizon"] = survival.curve_quantiles(survived, QUANTILES).T
            parts[f"{kind}_restricted_mean"] = survival.restricted_mean(survived, options.within)
    return parts


def _at(
    rows: list[Row], head: int, threshold: Float[np.ndarray, " state"], tokens: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Horizons of the requested tokens: (batch, query_token, state)."""
    parts = {}
    for kind, horizon in (("forward", core.forward), ("backward", core.backward)) if tokens else ():
        both = [horizon(row.cumulative[:, head], threshold, row.position) for row in rows]
        at = [[row.index(token) for token in tokens] for row in rows]
        steps = np.stack([steps[:, i].T for (steps, _), i in zip(both, at, strict=True)]).astype(float)
        censored = np.stack([censored[:, i].T for (_, censored), i in zip(both, at, strict=True)])
        parts[f"token_{kind}_horizon"] = np.where(censored, np.inf, steps)
        parts[f"token_{kind}_horizon_at_least"] = steps
    return parts


def _reference(
    parts: dict[str, np.ndarray],
    decay: Float[np.ndarray, "head state"],
    threshold: Float[np.ndarray, "head state"],
    elapsed: Float[np.ndarray, "unit head"],
    tokens: Int[np.ndarray, " unit"],
) -> dict[str, np.ndarray]:
    """The layer with delta frozen to its mean, and what selectivity adds to it."""
    mean_delta = (elapsed.sum(axis=0) / tokens.sum())[:, None]
    forward, least = parts["forward_horizon"], parts["forward_horizon_at_least"]
    found = {
        "mean_delta": mean_delta[:, 0],
        "lyapunov": decay * mean_delta,
        "half_life": core.lti(core.reach(0.5, decay), mean_delta),
        "lti_horizon": core.lti(threshold, mean_delta),
        "log_spread": core.log_spread(forward),
        "log_spread_at_least": core.least_log_spread(forward, least),
        "null_shuffle_log_spread": core.log_spread(parts["null_shuffle_horizon"]),
        "null_lti_log_spread": core.log_spread(parts["null_lti_horizon"]),
    }
    for end in ("", "_at_least"):
        gained = parts[f"{GAINS['selectivity_gain']}_horizon{end}"][..., 1]
        found[f"selectivity_gain{end}"] = core.ratio(gained, parts["null_lti_horizon"][..., 1])
    return found
