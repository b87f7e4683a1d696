"""Trace in, horizons out: labels, validation and what each number means."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import Canonical, by_layer, described, refuse, stacked
from mamba_probe.analyses.memory_horizon.asked import asked, asked_levels
from mamba_probe.analyses.memory_horizon.labels import entry, level_free
from mamba_probe.analyses.memory_horizon.layer import held, measure_layer
from mamba_probe.analyses.memory_horizon.mass import measure_mass
from mamba_probe.analyses.memory_horizon.options import EVENTS, QUANTILES, Options, lags
from mamba_probe.analyses.memory_horizon.sources import checked, measure_sources
from mamba_probe.analyses.memory_horizon.steps import BINS, measure_steps

__all__ = ["measure"]

_POOLED = "over (batch, token), a censored horizon counting as infinite"


def measure(
    trace: xr.Dataset, *, level: float | str | Sequence[float | str] = "1/e", tokens: Sequence[int] | None = None,
    event_tokens: object = None, epsilon: float = 0.1, mass: bool = False,
    jacobian: xr.Dataset | Sequence[xr.Dataset] | None = None, token_blocks: int | None = None,
    n_bootstrap: int = 200, seed: int = 0, weights: xr.Dataset | None = None,
    interventions: xr.Dataset | None = None, baseline: xr.Dataset | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure how many tokens a write survives along the path that was executed (selection frozen).

    $H(s) = \min\{k \ge 1 : |A| \sum_{j=1}^{k} \Delta_{s+j} \ge -\ln(\mathrm{level})\}$ forward, its mirror backward;
    the time-invariant equivalent is $H_{eq} = -\ln(\mathrm{level}) / (|A|\, \overline{\Delta})$, real-valued. The
    selectivity gain is the median H over that of the same layer with delta at each row's mean, both in whole tokens and
    censored alike, so that a time-invariant layer has gain 1. A horizon that the recording does not reach is censored:
    it counts as infinite in a quantile, the share of censored ones stands beside, and `*_at_least` holds the same
    quantile with each censored horizon at the least it can be. Between the two lie the `*_km_*` results, by the
    Kaplan-Meier curve, which assumes that horizons do not depend on where in a row a token stands. Nulls: delta frozen
    to its mean, and delta shuffled in time. Estimators: ours.

    Args:
        trace: delta (layer, batch, token, channel or head) and A, with `valid` and `position`; in memory or on dask.
            Of S4D, delta is one number a channel, and A is complex: its real part decays.
        level: retention below which a write counts as forgotten: "1/e", "1/2", a number in (0, 1), or several of these,
            which then stand on a dimension `level`.
        tokens: positions among a row's valid tokens whose horizons are returned in full, for every row.
        event_tokens: position of an event, an integer for all rows or one a row: exp(A delta) before, at and after it,
            gamma (mean after less mean up to it), sigma (-A times the sum of delta after it), counts over fixed bins.
        epsilon: with events: what may be lost of the event's write by the end of its row, in (0, 1).
        mass: also the mass horizon of `tokens` as queries; needs B, C and every token.
        jacobian: what `probe.jacobian(..., source_tokens=...)` returned for the same prompts, or a list, one a layer:
            the horizon of those tokens with selection moving, beside their frozen ones.
        token_blocks: of a trace with one row: bootstrap over so many blocks of its tokens, instead of NaN.
        n_bootstrap: replicates of the interval over rows (95 %, percentile); NaN where there is one row.
        seed: seed of the replicates and of the shuffle.
        weights: not used; refused.
        interventions: not used; refused.
        baseline: not used; refused: both nulls come from the trace.

    Returns:
        Dataset over layer, channel or head, state, quantile; `layer_*` summaries pool over channel and state too.

    Raises:
        ValueError: a missing variable, a level outside (0, 1), a token that a row does not hold, gaps between tokens
            without `delta_cumsum`, negative or non-finite delta, positive or complex A, a Jacobian of something else,
            an argument that is not used.

    >>> import numpy as np, xarray as xr
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), np.full((1, 1, 64, 1), 0.3, "float32")),
    ...      "A": (("layer", "channel", "state"), -np.ones((1, 1, 1), "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 64), bool)),
    ...      "position": (("batch", "token"), np.arange(64)[None])},
    ...     {"schema_version": 1, "family": "mamba"})
    >>> float(measure(trace).forward_horizon.sel(quantile=0.5).item())
    4.0
    """
    refuse("memory_horizon", weights=weights, interventions=interventions, baseline=baseline)
    levels = asked_levels(level)
    names = ["delta", "A", *(("B", "C") if mass else ())]
    view = Canonical(trace, *names)
    options = asked(view, tokens, event_tokens, epsilon, token_blocks, mass, n_bootstrap, seed)
    placed = checked(view, jacobian)
    sources = next(iter(placed.values()))["source_token"].values.tolist() if placed else []
    layers = by_layer(
        [view.trace],
        lambda place, jacobian: _at_levels(view, place, names, list(levels.values()), options, sources, jacobian),
        [placed.get(place) for place in range(view.n_layers)],
    )
    found = [stacked(list(level)) for level in zip(*layers, strict=True)]
    attrs = _attrs(view, options, levels) | _jacobian_attrs(placed)
    coords = view.coords() | _coords(view, options, sources)
    return _joined(
        [described(_entries(view, one), coords, attrs) for one in found], levels, isinstance(level, float | str)
    )


def _at_levels(
    view: Canonical, place: int, names: list[str], levels: list[float], options: Options, sources: list[int],
    jacobian: xr.Dataset | None,
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    """What one layer gives at each level; the first holds what no level enters."""
    layer = held(view, place, names)
    found = [measure_layer(layer, place, level, options) for level in levels]
    if sources:
        for one, level in zip(found, levels, strict=True):
            one |= measure_sources(layer, jacobian, sources, level)
    found[0] |= measure_steps(layer, place, options) | (measure_mass(layer, options) if options.mass else {})
    return found


def _entries(view: Canonical, found: dict[str, np.ndarray]) -> dict:
    return {name: entry(name, found[name], view.head_dim) for name in sorted(found)}


def _joined(found: list[xr.Dataset], levels: dict[str, float], single: bool) -> xr.Dataset:
    """Results at several levels, stacked where a level enters; the first holds what none enters."""
    if single:
        return found[0]
    along = [name for name in found[0].data_vars if not level_free(str(name))]
    stacked = xr.concat([one[along] for one in found], dim="level", join="exact", coords="minimal", compat="equals")
    stacked = stacked.assign_coords(level=list(levels), retention=("level", list(levels.values())))
    return stacked.assign({name: found[0][name] for name in found[0].data_vars if name not in along})


def _coords(view: Canonical, options: Options, sources: list[int]) -> dict:
    coords: dict = {"quantile": list(QUANTILES), "state": np.arange(view.n_states), "lag": lags(options.longest)}
    coords |= {"query_token": list(options.tokens)} if options.tokens else {}
    coords |= {"source_token": sources} if sources else {}
    if options.events:
        left = np.arange(BINS) / BINS
        coords |= {"event": list(EVENTS), "decay_bin": left, "decay_bin_end": ("decay_bin", left + 1 / BINS)}
        coords |= {"event_token": ("batch", list(options.events))}
    return coords


def _attrs(view: Canonical, options: Options, levels: dict[str, float]) -> dict[str, str]:
    gaps = not all(view.contiguous(row) for row in range(view.n_rows))
    at = ", ".join(f"{level:.6g}" for level in levels.values())
    return {
        "analysis": "memory_horizon",
        "model": str(view.trace.attrs.get("model", "")),
        "estimator": f"first token at which exp(A Cum) is at most {at}; quantiles {_POOLED} (ours)",
        "level": ", ".join(f"{level:.17g}" for level in levels.values()),
        "level_name": ", ".join(levels),
        "censoring": "inf = not reached in the recording; *_at_least holds the quantile with censored horizons at the "
        "least they can be; *_censored_share the share of them; *_km_horizon and *_survival are Kaplan-Meier's, for "
        "horizons that do not depend on where in its row a token stands (rows censor by position)",
        "restricted_to": str(options.within),
        "null": "in each row; null_lti: delta frozen to its mean; null_shuffle: delta permuted over the valid tokens"
        + (" (NaN: tokens are not contiguous)" if gaps else ""),
        "interval": _interval_text(view, options),
        "reduces_over": "batch, token; layer_*: also channel or head, and state",
        "gaps": "horizons rounded up to the next recorded token; mean_decay over recorded tokens" if gaps else "none",
        "longest_row": str(max(len(view.positions(row)) for row in range(view.n_rows))),
        "n_rows": str(view.n_rows),
        "n_bootstrap": str(options.n_bootstrap),
        "epsilon": f"{options.epsilon:g}",
        "seed": str(options.seed),
    }


def _interval_text(view: Canonical, options: Options) -> str:
    if view.n_rows > 1:
        return "95 % percentile bootstrap over rows"
    if len(options.units) > 1:
        return (
            f"95 % percentile bootstrap over {len(options.units)} blocks of one row's tokens, as if independent; "
            "NaN for results of events and queries"
        )
    return "NaN: one row, nothing to resample"


def _jacobian_attrs(placed: dict[int, xr.Dataset]) -> dict[str, str]:
    if not placed:
        return {}
    estimators = sorted({str(one.attrs.get("estimator", "")) for one in placed.values()})
    return {
        "jacobian_estimator": f"tokens until {'; '.join(estimators)} stays at or below level x its peak, for the rest "
        "of the recording; inf: still above at its end; NaN: it moves nothing, or no Jacobian of that layer (ours)"
    }
