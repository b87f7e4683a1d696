"""Horizons of one layer at one level: read one block of channels at a time, measured one channel at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, Row, read, runs
from mamba_probe.analyses.memory_horizon import core
from mamba_probe.analyses.memory_horizon.channel import KINDS, Channel, at, statistics, tally
from mamba_probe.analyses.memory_horizon.options import Options
from mamba_probe.analyses.memory_horizon.path import Path
from mamba_probe.analyses.memory_horizon.summary import GAINS, Counts, summary

__all__ = ["blocks", "columns", "held", "measure_layer", "orders", "state_slices"]

LAYER_BYTES = 2**27
"""Most bytes of a layer that is read once and held; of a larger one blocks of channels are read, of as many bytes of
delta and its cumulative sum, for each level and for the decay of single steps."""

BLOCK_BYTES = 2**25
"""Most bytes of delta and its cumulative sum worked on at once, of channels that are in memory."""

COLUMNS = 16
"""Channels copied at once to lie side by side: whole cache lines."""

STATE_ELEMENTS = 2**17
"""Most (token, state) elements worked on at once: few enough to stay in a cache."""


def measure_layer(view: Canonical, place: int, level: float, options: Options) -> dict[str, np.ndarray]:
    """Every horizon of the only layer of `view`, by name; the leading axis of a per-channel result is the head.

    `place` is the layer's in the trace: a shuffle of its own.
    """
    threshold = core.reach(level, view.decay(0))
    size = options.longest + 3
    totals = {kind: Counts(*np.zeros((2, len(options.units), size), dtype=np.int64)) for kind in KINDS}
    indices = [
        [int(np.searchsorted(view.positions(row), token)) for token in options.tokens] for row in range(view.n_rows)
    ]
    channels, spans, tokens = [], [], np.zeros(len(options.units))
    for heads in blocks(view):
        rows = [view.row(0, row, heads) for row in range(view.n_rows)]
        parts = [_part(rows[row], part) for row, part in options.units]
        spans.append(np.stack([delta for delta, _ in parts]))
        tokens = np.array([count for _, count in parts])
        shuffled, means = orders(rows, place, options.seed), [np.divide(*_part(row, slice(None))) for row in rows]
        for channel, reach in zip(_channels(rows, shuffled, means), threshold[heads], strict=True):
            channels.append(_measure(channel, reach, indices, totals, options))
    parts = {name: np.stack([channel[name] for channel in channels]) for name in channels[0]}
    parts = {name: values if name.startswith("token_") else _state_first(values) for name, values in parts.items()}
    elapsed = np.concatenate(spans, axis=1)
    parts |= _reference(parts, view.decay(0), threshold, elapsed, tokens)
    return parts | summary(parts, totals, threshold, elapsed, tokens, options)


def held(view: Canonical, layer: int, names: list[str]) -> Canonical:
    """One layer alone, read once into memory if it fits in `LAYER_BYTES`, otherwise read as its blocks are."""
    if not all(view.contiguous(row) for row in range(view.n_rows)):
        names = [*names, *({"delta_cumsum"} & set(view.trace.data_vars))]
    trace = (
        view.trace[[*names, "valid", "position"]]
        .isel(layer=slice(layer, layer + 1))
        .assign_coords(layer=view.layers[layer : layer + 1])
    )
    return Canonical(read(trace) if trace.nbytes <= LAYER_BYTES else trace, "delta", "A")


def blocks(view: Canonical) -> Iterator[slice]:
    """Blocks of channels whose delta and cumulative sum fit in `BLOCK_BYTES`; larger ones, of whole chunks of the store
    as long as these are no wider, where a block is read."""
    chunks = view.trace["delta"].chunksizes.get(view.head_dim, ())
    limit = max(BLOCK_BYTES, LAYER_BYTES) if chunks else BLOCK_BYTES
    bytes_each = 2 * 8 * max(1, int(view.valid.sum()))
    yield from runs(view.n_heads, np.cumsum(chunks), max(1, limit // bytes_each))


def state_slices(positions: list[np.ndarray], n_states: int) -> list[slice]:
    """Slices of the states, few at a time where rows are long."""
    step = max(1, STATE_ELEMENTS // sum(map(len, positions)))
    return [slice(start, start + step) for start in range(0, n_states, step)]


def orders(rows: list[Row], layer: int, seed: int) -> list[np.ndarray]:
    """One permutation of each row's tokens; none where tokens are missing, since what would be shuffled is unknown."""
    if not all(row.contiguous for row in rows):
        return []
    return [np.random.default_rng((seed, layer, i)).permutation(len(row.position)) for i, row in enumerate(rows)]


def columns(values: Float[np.ndarray, "token head"]) -> Iterator[Float[np.ndarray, " token"]]:
    """Each head's tokens side by side in memory, `COLUMNS` heads copied at a time."""
    for start in range(0, values.shape[1], COLUMNS):
        yield from np.ascontiguousarray(values[:, start : start + COLUMNS].T)


def _part(row: Row, part: slice) -> tuple[Float[np.ndarray, " head"], int]:
    return core.elapsed(row.delta[part], row.cumulative[part], row.position[part])


def _state_first(values: np.ndarray) -> np.ndarray:
    """(head, quantile, state) -> (head, state, quantile); (head, state) as it is."""
    return np.moveaxis(values, -1, 1)


def _channels(rows: list[Row], shuffled: list[np.ndarray], means: list[np.ndarray]) -> Iterator[Channel]:
    """Each channel of a block."""
    positions = [row.position for row in rows]
    delta, cumulative = (
        zip(*(columns(of) for of in each), strict=True)
        for each in ([row.delta for row in rows], [row.cumulative for row in rows])
    )
    for steps, sums, mean in zip(delta, cumulative, zip(*means, strict=True), strict=True):
        nulls = [Path(np.cumsum(of.take(order))) for of, order in zip(steps, shuffled, strict=False)]
        yield Channel(positions, [Path(of) for of in sums], nulls, np.array(mean))


def _measure(
    channel: Channel, threshold: Float[np.ndarray, " state"], indices: list[list[int]], totals: dict[str, Counts],
    options: Options,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Statistics of a channel, state last; its counts are added to those of the layer."""
    pieces = []
    whole = channel.contiguous and not options.tokens and all(part == slice(None) for _, part in options.units)
    kinds = [kind for kind in KINDS if kind != "backward" or not whole]
    for states in state_slices(channel.positions, len(threshold)):
        horizons = channel.horizons(threshold[states], kinds)
        tallies = {kind: tally(of, len(threshold[states]), options) for kind, of in horizons.items()}
        if "backward" not in kinds:
            least = tallies["forward"].least
            first = np.stack([steps[:, 0] for steps, _ in horizons["forward"]])
            tallies["backward"] = Counts(core.mirrored(least, first), least)
        pieces.append(statistics(tallies, options.within) | (at(horizons, indices) if options.tokens else {}))
        for kind, counts in tallies.items():
            totals[kind].add(counts)
    return {name: np.concatenate([piece[name] for piece in pieces], -1) for name in pieces[0]}


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
