"""A layer's horizons pooled over (batch, token, channel, state), each with its bootstrap interval."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import interval
from mamba_probe.analyses.memory_horizon import core, survival
from mamba_probe.analyses.memory_horizon.options import QUANTILES, Options, lags

__all__ = ["GAINS", "Counts", "found_quantiles", "share", "summary", "with_interval"]

GAINS = {"selectivity_gain": "forward", "null_shuffle_gain": "null_shuffle"}
SPREADS = ("log_spread", "log_spread_at_least", "null_shuffle_log_spread", "null_lti_log_spread")

Draws = Int[np.ndarray, " unit"]


@dataclass(frozen=True)
class Counts:
    """Horizons counted for each unit and state; `least` puts a censored one at the least it can be."""

    exact: Int[np.ndarray, "*counted size"]
    least: Int[np.ndarray, "*counted size"]

    def add(self, channel: "Counts") -> None:
        """Add the counts of a channel (unit, state, size), summed over its states; its bins may end earlier."""
        for ours, theirs in ((self.exact, channel.exact), (self.least, channel.least)):
            more = theirs.sum(axis=1)
            ours[:, : more.shape[1] - 1] += more[:, :-1]
            ours[:, -1] += more[:, -1]


def found_quantiles(count: Int[np.ndarray, "*shape size"]) -> Float[np.ndarray, "*shape quantile"]:
    """Quantiles along the last axis; NaN where nothing was counted."""
    found = core.quantiles(count, QUANTILES)
    return np.where(count.sum(axis=-1)[..., None] > 0, found, np.nan)


def share(count: Int[np.ndarray, "*shape size"]) -> Float[np.ndarray, "*shape"]:
    """Share of the censored; NaN where nothing was counted."""
    total = count.sum(axis=-1).astype(float)
    return np.divide(count[..., -1], total, out=np.full(total.shape, np.nan), where=total > 0)


def summary(
    parts: dict[str, np.ndarray],
    totals: dict[str, Counts],
    threshold: Float[np.ndarray, "head state"],
    elapsed: Float[np.ndarray, "unit head"],
    tokens: Int[np.ndarray, " unit"],
    options: Options,
) -> dict[str, np.ndarray]:
    """Every `layer_*` result by name."""

    kinds = tuple(totals)
    counted = Counts(*(np.stack([getattr(totals[kind], of) for kind in kinds], 1) for of in ("exact", "least")))
    kept = lags(options.longest)

    def pooled(draws: Draws) -> dict[str, np.ndarray]:
        mean_delta = (draws @ elapsed) / (draws @ tokens)
        reference = np.quantile(core.lti(threshold, mean_delta[:, None]), QUANTILES, method="inverted_cdf")
        return _pooled(draws, kinds, counted, kept, options.within) | {"layer_lti_horizon": reference}

    found = with_interval(pooled, len(options.units), options) | _bounds(totals, options)
    for name, kind in GAINS.items():
        at_least = found[f"layer_{kind}_horizon_at_least"][1:2]
        found[f"layer_{name}_at_least"] = core.ratio(at_least, found["layer_null_lti_horizon"][1:2]).reshape(())
    return found | {f"layer_{name}": _median(parts[name]) for name in SPREADS}


def _pooled(
    draws: Draws, kinds: tuple[str, ...], counted: Counts, kept: Int[np.ndarray, " lag"], within: int
) -> dict[str, np.ndarray]:
    """Results with an interval; `counted` is (unit, kind, size)."""
    exact, least = (np.tensordot(draws, of, 1) for of in (counted.exact, counted.least))
    survived = survival.curve(exact, least)
    by_kind = {
        "horizon": found_quantiles(exact),
        "km_horizon": survival.curve_quantiles(survived, QUANTILES),
        "restricted_mean": survival.restricted_mean(survived, within),
        "survival": survived[:, kept],
    }
    found = {f"layer_{kind}_{name}": of[i] for name, of in by_kind.items() for i, kind in enumerate(kinds)}
    median = dict(zip(kinds, by_kind["horizon"][:, 1:2], strict=True))
    return found | {f"layer_{name}": core.ratio(median[kind], median["null_lti"])[0] for name, kind in GAINS.items()}


def _bounds(totals: dict[str, Counts], options: Options) -> dict[str, np.ndarray]:
    found = {}
    for kind, counts in totals.items():
        exact, least = counts.exact.sum(axis=0), counts.least.sum(axis=0)
        found[f"layer_{kind}_horizon_at_least"] = found_quantiles(least)
        found[f"layer_{kind}_censored_share"] = share(exact)
        low, high = survival.mean_bounds(exact, least, options.within)
        found |= {f"layer_{kind}_restricted_mean_at_least": low, f"layer_{kind}_restricted_mean_at_most": high}
        low, high = survival.share_bounds(exact, least)[:, lags(options.longest)]
        found |= {f"layer_{kind}_survival_at_least": low, f"layer_{kind}_survival_at_most": high}
    return found


def with_interval(
    statistics: Callable[[Draws], dict[str, np.ndarray]], n_units: int, options: Options
) -> dict[str, np.ndarray]:
    """Statistics of all units, and the ends of their intervals over draws of them, `*_low` and `*_high`."""

    def flat(draws: Draws) -> np.ndarray:
        return np.concatenate([np.ravel(values) for values in statistics(draws).values()])

    found = {name: np.asarray(values) for name, values in statistics(np.ones(n_units, dtype=int)).items()}
    ends = np.cumsum([values.size for values in found.values()])[:-1]
    for end, bound in zip(("low", "high"), interval(flat, n_units, options.n_bootstrap, options.seed), strict=True):
        cut = zip(list(found)[: len(ends) + 1], np.split(bound, ends), strict=True)
        found |= {f"{name}_{end}": values.reshape(found[name].shape) for name, values in cut}
    return found


def _median(values: np.ndarray) -> np.ndarray:
    """Median over channels and states of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return np.asarray(np.quantile(known, 0.5, method="inverted_cdf") if known.size else np.nan)
