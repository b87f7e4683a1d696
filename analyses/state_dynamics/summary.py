"""Layers in numbers: over heads, states and rows, each with its interval over rows."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, interval
from mamba_probe.analyses.state_dynamics import core
from mamba_probe.analyses.state_dynamics.asked import Asked
from mamba_probe.analyses.state_dynamics.rows import SATURATED, SIZES, Rows

__all__ = ["QUANTILES", "summaries"]

QUANTILES = (0.1, 0.5, 0.9)
NULLS = ("", "null_lti_", "null_shuffle_")
"""Of the effective sizes."""
Draws = Int[np.ndarray, " row"]


def summaries(view: Canonical, rows: Rows) -> dict[str, np.ndarray]:
    """Every number of a result by name; the sums over prompts in `rows` become means."""
    asked, found = rows.asked, dict(rows.found)
    n_tokens = view.valid.sum(axis=1)
    rate = np.stack([view.decay(layer) for layer in range(view.n_layers)])
    mean_delta = found.pop("mean_delta")
    statistics: dict[str, Callable[[Draws], np.ndarray]] = {
        "layer_lyapunov": lambda draws: _quantiles(_exponent(rate, mean_delta, draws * n_tokens))
    }
    summary = {"lyapunov": _exponent(rate, mean_delta, n_tokens)}
    summary["half_life"] = _half_life(summary["lyapunov"])
    for name in (f"{null}{name}_share" for null in ("", "null_lti_") for name in SATURATED):
        values = found.pop(name)
        summary[name] = np.average(values, axis=1, weights=n_tokens)
        statistics[f"layer_{name}"] = _mean_over_rows(values.mean(axis=2))
    for null in NULLS:
        for name in SIZES:
            statistics[f"layer_{null}{name}"] = _mean_over_rows(found[f"{null}{name}"].mean(axis=(2, 3)))
    if rows.source:
        counted = np.array([np.sum(n_tokens >= end) for end in rows.samples + 1])
        summary |= {name: found.pop(name) / counted[:, None] for name in ("state_mean", "state_variance", "state_rms")}
        summary |= _of_states(found, rows.kinds, statistics)
    if asked.loss is not None:
        statistics |= _of_loss(asked, rows.samples)
    summary |= found
    for name, statistic in statistics.items():
        summary |= _with_ends(name, statistic, view.n_rows, asked)
    for end in ("", "_low", "_high"):
        for null in NULLS:
            summary[f"layer_{null}ess_share{end}"] = summary[f"layer_{null}ess_entropy{end}"] / rows.n_states
        summary[f"layer_half_life{end}"] = _half_life(summary[f"layer_lyapunov{end}"])
    return summary


def _of_states(
    found: dict[str, np.ndarray], kinds: tuple[str, ...], statistics: dict[str, Callable[[Draws], np.ndarray]]
) -> dict[str, np.ndarray]:
    """Adds the statistics of the states; gives the growth of each head."""
    summary = {}
    for null in kinds:
        growth, square = found.pop(f"{null}growth"), found.pop(f"{null}layer_mean_square")
        summary[f"{null}growth"] = _known_mean(growth, np.ones(growth.shape[1], dtype=int))
        statistics[f"layer_{null}growth"] = lambda draws, of=growth: _quantiles(_known_mean(of, draws)[..., None])
        statistics[f"layer_{null}rms"] = lambda draws, of=square: np.sqrt(_known_mean(of, draws))
    return summary


def _of_loss(asked: Asked, samples: Int[np.ndarray, " sample"]) -> dict[str, Callable[[Draws], np.ndarray]]:
    generator = np.random.default_rng((asked.seed, asked.every))
    statistics: dict[str, Callable[[Draws], np.ndarray]] = {}
    for null in ("", "null_shuffle_"):
        total, count = (np.zeros((len(asked.loss or ()), len(samples))) for _ in range(2))
        for row, values in enumerate(asked.loss or ()):
            known = np.flatnonzero(~np.isnan(values))
            taken = values[generator.permutation(known) if null else known]
            bucket = known // asked.every
            inside = bucket < len(samples)
            np.add.at(total[row], bucket[inside], taken[inside])
            np.add.at(count[row], bucket[inside], 1)

        def by_position(draws: Draws, total: np.ndarray = total, count: np.ndarray = count) -> np.ndarray:
            return _ratio(draws @ total, draws @ count)

        def trend(draws: Draws, of: Callable[[Draws], np.ndarray] = by_position) -> np.ndarray:
            return _trend(of(draws), samples + 1 - (asked.every - 1) / 2)

        statistics |= {f"{null}loss_trend": trend} | ({} if null else {"loss_by_position": by_position})
    return statistics


def _trend(loss: Float[np.ndarray, " sample"], count: Float[np.ndarray, " sample"]) -> np.ndarray:
    """Slope of the loss per doubling of the tokens read, at the middle of each bucket, over the later half of them.

    NaN with fewer than three buckets there.
    """
    late = count >= count[-1] / 2
    return core.slope(loss[late], np.log2(count[late])) if late.sum() >= core.LATEST else np.asarray(np.nan)


def _exponent(
    rate: Float[np.ndarray, "layer head decay"], mean_delta: Float[np.ndarray, "layer batch head"], weight: np.ndarray
) -> Float[np.ndarray, "layer head decay"]:
    return rate * np.average(mean_delta, axis=1, weights=weight)[..., None]


def _half_life(exponent: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.divide(np.log(2), -exponent, out=np.full(exponent.shape, np.inf), where=exponent != 0)


def _quantiles(values: Float[np.ndarray, "layer head state"]) -> Float[np.ndarray, "quantile layer"]:
    """Over heads and states, of what is known."""
    found = np.full((len(QUANTILES), len(values)), np.nan)
    for layer, of in enumerate(values):
        known = of[~np.isnan(of)]
        if known.size:
            found[:, layer] = np.quantile(known, QUANTILES, method="inverted_cdf")
    return found


def _mean_over_rows(values: Float[np.ndarray, "layer batch"]) -> Callable[[Draws], np.ndarray]:
    return lambda draws: values @ draws / draws.sum()


def _known_mean(values: Float[np.ndarray, "layer batch series"], draws: Draws) -> Float[np.ndarray, "layer series"]:
    """Mean over the rows drawn, of those that have a value."""
    known = ~np.isnan(values)
    total = np.einsum("b,lbs->ls", draws.astype(float), np.where(known, values, 0.0))
    return _ratio(total, np.einsum("b,lbs->ls", draws.astype(float), known.astype(float)))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _with_ends(name: str, statistic: Callable[[Draws], np.ndarray], n_rows: int, asked: Asked) -> dict[str, np.ndarray]:
    low, high = interval(statistic, n_rows, asked.n_bootstrap, asked.seed)
    ends = {"": statistic(np.ones(n_rows, dtype=int)), "_low": low, "_high": high}
    return {f"{name}{end}": np.asarray(values) for end, values in ends.items()}
