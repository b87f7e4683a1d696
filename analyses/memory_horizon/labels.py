"""What each result is called, over which dimensions it stands, and in which unit."""

import numpy as np

from mamba_probe.analyses.common.result import Entry

__all__ = ["entry", "level_free"]

_KIND = {
    "forward": "tokens until the write of a token has decayed to the level",
    "backward": "tokens after which a step no longer sees a write",
    "null_shuffle": "forward horizon with delta shuffled in time (null)",
    "null_lti": "forward horizon with delta at its mean in each row, counted alike (null)",
}

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
    "gamma": "mean of exp(A delta) after the event less the mean up to and with it",
    "null_shuffle_gamma": "gamma with delta shuffled in time (null); with delta at its mean it is 0",
    "sigma": "-A times the sum of delta after the event: -ln of what is left of its write at the row's end",
    "geometric_decay_after": "geometric mean of exp(A delta) after the event",
    "needed_retention": "geometric mean of exp(A delta) after the event that leaves 1 - epsilon of its write",
    "retained_share": "share of channels and states that leave at least 1 - epsilon of the event's write",
    "decay_count": "number of steps by exp(A delta), before, at and after the event; over rows and states",
    "lyapunov": "mean over tokens of A delta",
    "half_life": "tokens until a write has halved at the mean delta: ln 2 / (|A| mean delta)",
    "mass_horizon": "mean distance of the weight |k_t| that a query puts on its sources",
    "null_lti_mass_horizon": "mass horizon with delta, B and C at their means over the row (null)",
    "jacobian_horizon": "tokens until |d out_t / d u_s| stays at or below the level times its peak",
    "source_forward_horizon": "forward horizon of a source token: quantiles over channels and states",
}

_ENDS = {
    "_at_least": ", lower bound",
    "_at_most": ", upper bound",
    "_low": ", lower end of the interval",
    "_high": ", upper end of the interval",
}

_FORMS = {
    "_censored_share": "share of censored: {}",
    "_km_horizon": "{}; Kaplan-Meier",
    "_restricted_mean": "{}; Kaplan-Meier mean, each counted up to `restricted_to` tokens",
    "_survival": "share of horizons longer than a lag, Kaplan-Meier; {}",
    "_horizon": "{}",
}

_LEVEL_FREE = (
    "mean_delta", "mean_decay", "mean_decay_event", "gamma", "null_shuffle_gamma", "sigma", "geometric_decay_after",
    "needed_retention", "retained_share", "decay_count", "lyapunov", "half_life", "mass_horizon",
    "null_lti_mass_horizon",
)  # fmt: skip
"""Results that no level enters, pooled ones alike."""


def level_free(name: str) -> bool:
    """Whether a result is the same at every level.

    >>> level_free("layer_gamma_low"), level_free("forward_horizon")
    (True, False)
    """
    return _split(name)[0] in _LEVEL_FREE


def entry(name: str, values: np.ndarray, head: str) -> Entry:
    """Dimensions, values, long name and unit of a result with the layer in front; `head` is channel or head."""
    base, pooled, suffix = _split(name)
    unit = "token" if base.endswith(("horizon", "restricted_mean", "half_life")) else "1"
    text = _long_name(base) + (", over channels and states of the layer" if pooled else "") + suffix
    if name.startswith("token_"):
        return ("layer", "batch", "query_token", head, "state"), np.moveaxis(values, 1, 3), text, unit
    return _dims(base, pooled, head)[: values.ndim], values, text, unit


def _split(name: str) -> tuple[str, bool, str]:
    """Name without prefix and ending; whether it is pooled over a layer; what the ending says."""
    suffix = ""
    for tail, text in _ENDS.items():
        if name.endswith(tail):
            name, suffix = name.removesuffix(tail), text
    pooled = name.startswith("layer_")
    return name.removeprefix("layer_").removeprefix("token_"), pooled, suffix


def _dims(base: str, pooled: bool, head: str) -> tuple[str, ...]:
    if pooled:
        return ("layer", *(("lag",) if base.endswith("_survival") else _POOLED.get(base, ("quantile",))))
    return ("layer", *(head if dim == "head" else dim for dim in _PLACES.get(base, ("head", "state", "quantile"))))


_POOLED = {"decay_count": ("event", "decay_bin"), "mean_decay_event": ("event",)}
_PLACES = {
    "decay_count": ("head", "event", "decay_bin"),
    "mean_decay_event": ("head", "state", "event"),
    "sigma": ("batch", "head", "state"),
    "geometric_decay_after": ("batch", "head", "state"),
    "needed_retention": ("batch",),
    "mass_horizon": ("batch", "query_token", "head"),
    "null_lti_mass_horizon": ("batch", "query_token", "head"),
    "jacobian_horizon": ("batch", "source_token"),
    "source_forward_horizon": ("batch", "source_token", "quantile"),
}


def _long_name(base: str) -> str:
    if base in _OTHER:
        return _OTHER[base]
    kind = next(kind for kind in _KIND if base.startswith(kind))
    return _FORMS[base.removeprefix(kind)].format(_KIND[kind])
