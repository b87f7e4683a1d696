"""Trace in, horizons out: labels, validation and what each number means."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import Canonical, described, refuse
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.memory_horizon.layer import QUANTILES, Options, measure_layer

__all__ = ["measure"]

EVENTS = ("before", "at", "after")

_POOLED = "over (batch, token), a censored horizon counting as infinite"
_KIND = {
    "forward": "tokens until the write of a token has decayed to the level",
    "backward": "tokens after which a step no longer sees a write",
    "null_shuffle": "forward horizon with delta shuffled in time (null)",
    "null_lti": "forward horizon with delta at its mean in each row, counted alike (null)",
}


def measure(
    trace: xr.Dataset,
    *,
    level: float = float(np.exp(-1)),
    tokens: Sequence[int] | None = None,
    event_tokens: object = None,
    n_bootstrap: int = 200,
    seed: int = 0,
    weights: xr.Dataset | None = None,
    interventions: xr.Dataset | None = None,
    baseline: xr.Dataset | None = None,
) -> xr.Dataset:
    r"""Measure how many tokens a write survives along the path that was executed (selection frozen).

    $H(s) = \min\{k \ge 1 : |A| \sum_{j=1}^{k} \Delta_{s+j} \ge -\ln(\mathrm{level})\}$ forward, its mirror backward;
    the time-invariant equivalent is $H_{eq} = -\ln(\mathrm{level}) / (|A|\, \overline{\Delta})$, real-valued. The
    selectivity gain is the median H over that of the same layer with delta at each row's mean, both in whole tokens and
    censored alike, so that a time-invariant layer has gain 1. A horizon that the recording does not reach is censored:
    it counts as infinite in a quantile, the share of censored ones stands beside, and `*_at_least` holds the same
    quantile with each censored horizon at the least it can be. Nulls: delta frozen to its mean, and delta
    shuffled in time. Estimators: ours.

    Args:
        trace: delta (layer, batch, token, channel or head) and A, with `valid` and `position`; in memory or on dask.
        level: retention below which a write counts as forgotten, in (0, 1).
        tokens: positions among a row's valid tokens whose horizons are returned in full, for every row.
        event_tokens: position of an event, an integer for all rows or one a row: mean decay before, at and after it.
        n_bootstrap: replicates of the interval over rows (95 %, percentile); NaN where there is one row.
        seed: seed of the replicates and of the shuffle.
        weights: not used; refused.
        interventions: not used; refused.
        baseline: not used; refused: both nulls come from the trace.

    Returns:
        Dataset over layer, channel or head, state, quantile; `layer_*` summaries pool over channel and state too.

    Raises:
        ValueError: a missing variable, a level outside (0, 1), a token that a row does not hold, gaps between tokens
            without `delta_cumsum`, negative or non-finite delta, positive or complex A, an argument that is not used.

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
    if not 0 < level < 1:
        raise ValueError(f"level is a retention and must be above 0 and below 1; got {level}")
    view = Canonical(trace, "delta", "A")
    options = Options(level, _tokens(view, tokens), _events(view, event_tokens), n_bootstrap, seed)
    layers = [measure_layer(view, layer, options) for layer in range(view.n_layers)]
    found = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    coords = view.coords() | {"quantile": list(QUANTILES), "state": np.arange(view.n_states)}
    coords |= {"query_token": list(options.tokens)} if options.tokens else {}
    coords |= {"event": list(EVENTS)} if options.events else {}
    return described({name: _entry(view, name, found[name]) for name in sorted(found)}, coords, _attrs(view, options))


def _tokens(view: Canonical, tokens: Sequence[int] | None) -> tuple[int, ...]:
    given = np.asarray(() if tokens is None else tokens)
    if given.size and (given.dtype.kind not in "iu" or given.ndim != 1):
        raise ValueError(f"tokens needs integers, positions among a row's valid tokens; got {tokens!r}")
    asked = tuple(given.tolist())
    for row in range(view.n_rows):
        missing = sorted(set(asked) - set(view.positions(row).tolist()))
        if missing:
            raise ValueError(f"tokens {missing} are not among the valid tokens of row {row}: {_range(view, row)}")
    return asked


def _events(view: Canonical, event_tokens: object) -> tuple[int, ...]:
    if event_tokens is None:
        return ()
    events = np.atleast_1d(np.asarray(event_tokens))
    if not np.issubdtype(events.dtype, np.integer) or events.ndim != 1 or len(events) not in (1, view.n_rows):
        raise ValueError(
            f"event_tokens needs one position, or one for each of the {view.n_rows} rows; got {event_tokens!r}"
        )
    events = np.broadcast_to(events, view.n_rows)
    for row, event in enumerate(events):
        if event not in view.positions(row):
            raise ValueError(f"event_tokens: {event} is not among the valid tokens of row {row}: {_range(view, row)}")
    return tuple(int(event) for event in events)


def _range(view: Canonical, row: int) -> str:
    position = view.positions(row)
    return f"{len(position)} tokens at positions {position[0]} to {position[-1]}"


def _entry(view: Canonical, name: str, values: np.ndarray) -> Entry:
    head = view.head_dim
    if name.startswith("layer_"):
        dims = ("layer", "quantile")[: values.ndim]
    elif name.startswith("token_"):
        values, dims = np.moveaxis(values, 1, 3), ("layer", "batch", "query_token", head, "state")
    elif name == "mean_decay_event":
        dims = ("layer", head, "state", "event")
    else:
        dims = ("layer", head, "state", "quantile")[: values.ndim]
    return dims, values, _long_name(name), "token" if "horizon" in name else "1"


_OTHER = {
    "mean_delta": "mean step size over valid tokens of all rows",
    "lti_horizon": "time-invariant equivalent of the horizon, delta at its mean, real-valued",
    "selectivity_gain": "median forward horizon over that of the time-invariant layer, counted alike",
    "null_shuffle_gain": "the same gain with delta shuffled in time (null)",
    "log_spread": "ln of the 0.9 over the 0.1 quantile of the forward horizon over tokens",
    "null_shuffle_log_spread": "the same spread with delta shuffled in time (null)",
    "null_lti_log_spread": "the same spread of the time-invariant layer (null)",
    "mean_decay": "mean over tokens of exp(A delta)",
    "mean_decay_event": "mean of exp(A delta) before, at and after the event",
    "lyapunov": "mean over tokens of A delta",
}


_ENDS = {
    "_at_least": ", lower bound",
    "_low": ", lower end of the interval",
    "_high": ", upper end of the interval",
}


def _long_name(name: str) -> str:
    base, suffix = name, ""
    for tail, text in _ENDS.items():
        if base.endswith(tail):
            base, suffix = base.removesuffix(tail), text
    pooled = base.startswith("layer_")
    base = base.removeprefix("layer_").removeprefix("token_")
    if base in _OTHER:
        text = _OTHER[base]
    else:
        kind = next(kind for kind in _KIND if base.startswith(kind))
        text = f"share of censored: {_KIND[kind]}" if base.endswith("censored_share") else _KIND[kind]
    return text + (", over channels and states of the layer" if pooled else "") + suffix


def _attrs(view: Canonical, options: Options) -> dict[str, str]:
    gaps = not all(view.contiguous(row) for row in range(view.n_rows))
    return {
        "analysis": "memory_horizon",
        "estimator": f"first token at which exp(A Cum) is at most {options.level:.6g}; quantiles {_POOLED} (ours)",
        "level": f"{options.level:.17g}",
        "censoring": "inf = not reached in the recording; *_at_least holds the quantile with censored horizons at the "
        "least they can be; *_censored_share the share of them",
        "null": "in each row; null_lti: delta frozen to its mean; null_shuffle: delta permuted over the valid tokens"
        + (" (NaN: tokens are not contiguous)" if gaps else ""),
        "interval": "95 % percentile bootstrap over rows" if view.n_rows > 1 else "NaN: one row, nothing to resample",
        "reduces_over": "batch, token; layer_*: also channel or head, and state",
        "gaps": "horizons rounded up to the next recorded token; mean_decay over recorded tokens" if gaps else "none",
        "longest_row": str(max(len(view.positions(row)) for row in range(view.n_rows))),
        "n_rows": str(view.n_rows),
        "n_bootstrap": str(options.n_bootstrap),
        "seed": str(options.seed),
    }
