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
    rate, mean_delta = found.pop("rate"), found.pop("mean_delta")
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
        statistics |= _of_loss(asked, len(rows.samples))
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


def _of_loss(asked: Asked, n_samples: int) -> dict[str, Callable[[Draws], np.ndarray]]:
    generator = np.random.default_rng((asked.seed, asked.every))
    losses = asked.loss or []
    total, count = (np.zeros((len(losses), n_samples)) for _ in range(2))
    lines, shuffled = (np.zeros((len(losses), 2)) for _ in range(2))
    for row, values in enumerate(losses):
        known = np.flatnonzero(~np.isnan(values))
        inside = known[known // asked.every < n_samples]
        np.add.at(total[row], inside // asked.every, values[inside])
        np.add.at(count[row], inside // asked.every, 1)
        lines[row] = _line(values[known], known, len(values))
        shuffled[row] = _line(values[generator.permutation(known)], known, len(values))
    return {
        "loss_by_position": lambda draws: _ratio(draws @ total, draws @ count),
        "loss_trend": lambda draws: _slope(draws @ lines),
        "null_shuffle_loss_trend": lambda draws: _slope(draws @ shuffled),
    }


def _slope(line: Float[np.ndarray, " both=2"]) -> Float[np.ndarray, ""]:
    return np.asarray(line[0] / line[1] if line[1] > 0 else np.nan)


def _line(
    loss: Float[np.ndarray, " known"], token: Int[np.ndarray, " known"], n_tokens: int
) -> Float[np.ndarray, " both=2"]:
    """A row's part in the slope of the loss per doubling of the tokens read, over its later half: sums of products and
    of squares about the row's own means, so that rows of other lengths and losses tilt nothing.

    Zeros with fewer than three losses there.
    """
    late = token + 1 >= n_tokens / 2
    if late.sum() < core.LATEST:
        return np.zeros(2)
    x = np.log2(token[late] + 1)
    x -= x.mean()
    return np.array([x @ (loss[late] - loss[late].mean()), x @ x])


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
