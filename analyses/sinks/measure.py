"""Trace in, step sizes by token class out: ratios, nulls, specialists, and what an ablation says of them."""

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Shaped

from mamba_probe.analyses.common import Canonical, by_layer, described, interval, refuse
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.sinks import core
from mamba_probe.analyses.sinks.classes import classes as classes_of
from mamba_probe.analyses.sinks.effects import LEVEL, NO_ABLATION, P_VALUES, check, effects, verdicts
from mamba_probe.analyses.sinks.stream import Layer, read

__all__ = ["measure"]


def measure(
    trace: xr.Dataset, *, classes: xr.DataArray | Shaped[np.ndarray, "batch token"] | None = None,
    ablated: xr.Dataset | None = None, threshold: float = 2.0, n_shifts: int = 200, n_bootstrap: int = 200,
    seed: int = 0, weights: object = None, interventions: object = None, baseline: object = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure how much larger the step sizes are at a class of tokens than at the rest of the same rows.

    $$\rho_c = \frac{\sum_r \sum_{t \in c_r} \Delta_t}{\sum_r |c_r| \, \overline{\Delta}_{r \setminus c}}$$

    of each layer and head (Mamba-1: channel): the rest of a row weighs as many tokens as the class has there, so that
    a row of large steps favours neither. Source: the state sink of arXiv 2606.00930; this ratio, the test of
    specialists and the ablation against random tokens are ours. A ratio says what is detected, not what it does: pass
    `ablated`. Cost: O(token head class shift), one block of heads at a time.

    Args:
        trace: delta, with `valid` and `position`; `token_text` and task roles give more classes.
        classes: labels (batch, token), "" for none, in addition; or what `sinks.classes` returned, alone.
        ablated: of `ablate_class(probe, ..., classes=sinks.classes(trace))` on the same rows.
        threshold: least ratio of a specialist.
        n_shifts: of each row's labels, the same in every layer and head.
        n_bootstrap: replicates of the 95 % intervals, over rows; NaN with one row.
        seed: of shifts, replicates and signs.
        weights, interventions, baseline: not used; refused.

    Returns:
        ratio (class, layer, head) with interval, null_ratio and p_value; class_delta, rest_delta; specialist: ratio of
        `threshold` or more and p_value (over all classes, layers and heads) at most 0.05; layer_ratio (class, layer),
        the geometric mean over heads, with interval and null range; heads
        whose ratio is 0, infinite or NaN (0 / 0) left out; specialist_share (class, layer) and share (class). With
        `ablated`: effect_, random_ and excess_ loss and accuracy (class). `verdict` (class) in words.

    Raises:
        ValueError: S4D, whose steps are constant; no class; an ablation of other rows, classes or another model;
            n_shifts below 19, too few for any p-value of 0.05.

    >>> steps = np.ones((1, 2, 4, 1), "float32")
    >>> steps[:, :, 0] = 3
    >>> over = ("batch", "token")
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", *over, "channel"), steps), "A": (("layer", "channel", "state"), -np.ones((1, 1, 1)))},
    ...     {"valid": (over, np.ones((2, 4), bool)), "position": (over, np.tile(np.arange(4), (2, 1)))},
    ...     {"schema_version": 1, "family": "mamba"})
    >>> found = measure(trace)
    >>> round(found["ratio"].item(), 9), found["verdict"].item()
    (3.0, 'a ratio, not a function: no ablation was given')
    """
    refuse("sinks", weights=weights, interventions=interventions, baseline=baseline)
    _check(threshold, n_shifts, n_bootstrap)
    view = Canonical(trace, "delta", "A")
    if view.constant:
        raise ValueError(
            "S4D's step sizes are constants of its channels: no token has a larger one, and none is a sink"
        )
    chosen = classes if isinstance(classes, xr.DataArray) else classes_of(trace, classes)
    names, member = _member(chosen, view)
    if ablated is not None:
        check(ablated, view, member, names)
    layers = by_layer([view.trace], lambda layer: read(view, member, layer, n_shifts, seed))
    size, whole = member.sum(axis=2), member.sum(axis=2) == view.valid.sum(axis=1)
    count = np.where(whole, 0, size).sum(axis=1)
    found = _by_head(layers, threshold, count, (member.any(axis=2) & ~whole).sum(axis=1)) | _by_layer(
        layers, n_bootstrap, seed
    )
    found["specialist_share"] = found["specialist"].mean(axis=-1)
    found["share"] = found["specialist"].mean(axis=(1, 2))
    found["n_tokens"] = count
    changed = None if ablated is None else dict(effects(ablated, n_bootstrap, seed))
    said = np.array(verdicts(changed, len(names), _n_scored(view, ablated)), dtype=object)
    entries = {name: _entry(name, values, view.head_dim) for name, values in (found | (changed or {})).items()}
    entries["verdict"] = (("class",), said, "whether the ratio has a function", "words")
    coords = {key: values for key, values in view.coords().items() if key != "batch"} | {
        "class": np.array(names, object)
    }
    return described(entries, coords, _attributes(view, ablated, threshold, n_shifts, n_bootstrap, seed))


def _n_scored(view: Canonical, ablated: xr.Dataset | None) -> int:
    return view.n_rows if ablated is None else int((~np.isnan(ablated["loss"].values)).any(axis=1).sum())


def _check(threshold: float, n_shifts: int, n_bootstrap: int) -> None:
    if not threshold > 0:
        raise ValueError(f"threshold is a ratio above 0; got {threshold}")
    if n_shifts < 19:
        raise ValueError(f"n_shifts must be at least 19, since fewer allow no p-value of 0.05; got {n_shifts}")
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")


def _member(chosen: xr.DataArray, view: Canonical) -> tuple[list[str], Bool[np.ndarray, "class batch token"]]:
    if chosen.dims != ("class", "batch", "token") or chosen.dtype != bool or chosen.shape[1:] != view.valid.shape:
        raise ValueError(
            f"classes needs booleans ('class', 'batch', 'token') with (batch, token) = {view.valid.shape}, as "
            f"sinks.classes(trace) makes them; got {chosen.dtype} {dict(chosen.sizes)}"
        )
    member = chosen.values & view.valid
    names = [str(name) for name in chosen["class"].values]
    usable = (member.any(axis=2) & (member.sum(axis=2) < view.valid.sum(axis=1))).any(axis=1)
    if not len(names) or not usable.all():
        lacking = [name for name, one in zip(names, usable, strict=True) if not one]
        what = f"classes {lacking} have no row with tokens of the class and others" if names else "there is no class"
        raise ValueError(f"{what}: nothing to compare")
    return names, member


def _by_head(layers: list[Layer], threshold: float, count: np.ndarray, n_rows: np.ndarray) -> dict[str, np.ndarray]:
    """(class, layer, head): ratios, their nulls and p-values over everything that was looked at."""
    largest = np.max([layer.largest for layer in layers], axis=0)
    score = np.stack([layer.score for layer in layers], axis=1)
    parts = np.stack([layer.observed.sum(axis=1) for layer in layers], axis=2)
    ratio, p = np.exp(core.logarithm(parts)), core.adjusted(score, largest)
    return {
        "ratio": ratio,
        "null_ratio": np.exp(np.stack([layer.null for layer in layers], axis=1)),
        "p_value": p,
        "specialist": (ratio >= threshold) & (p <= LEVEL) & (n_rows >= 2)[:, None, None],
        "class_delta": parts[0] / count[:, None, None],
        "rest_delta": parts[1] / count[:, None, None],
    }


def _by_layer(layers: list[Layer], n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Intervals of heads, and the mean over heads with interval and null range."""
    found: dict[str, list[np.ndarray]] = {}
    for layer in layers:
        observed = layer.observed

        def statistic(draws: np.ndarray, observed: np.ndarray = observed) -> np.ndarray:
            log = core.logarithm(np.einsum("r,prch->pch", draws.astype(float), observed))
            return np.exp(np.concatenate([log, core.mean(log)[:, None]], axis=1))

        value = statistic(np.ones(observed.shape[1], dtype=int))
        low, high = interval(statistic, observed.shape[1], n_bootstrap, seed)
        null = np.exp([_range(each) for each in layer.layer_null.T])
        for name, values in {
            "ratio_low": low[:, :-1], "ratio_high": high[:, :-1], "layer_ratio": value[:, -1],
            "layer_ratio_low": low[:, -1], "layer_ratio_high": high[:, -1],
            "layer_null_ratio": np.exp(core.mean(layer.layer_null.T)),
            "layer_null_low": null[:, 0], "layer_null_high": null[:, 1],
        }.items():  # fmt: skip
            found.setdefault(name, []).append(values)
    return {name: np.stack(values, axis=1) for name, values in found.items()}


def _range(values: Float[np.ndarray, " shift"]) -> Float[np.ndarray, " bound=2"]:
    """Where 95 % of the shifts lie that have a number."""
    known = values[np.isfinite(values)]
    return np.quantile(known, [0.025, 0.975]) if len(known) else np.full(2, np.nan)


_TEXT = {
    "ratio": ("mean delta at the class over that of the rest of the same rows", "1"),
    "ratio_low": ("lower end of the interval of the ratio", "1"),
    "ratio_high": ("upper end of the interval of the ratio", "1"),
    "null_ratio": ("geometric mean of the ratio with labels shifted within rows", "1"),
    "p_value": ("family-wise p-value of the ratio, above chance", "1"),
    "specialist": ("whether the head is a specialist of the class", "1"),
    "class_delta": ("mean delta at the class", "1"),
    "rest_delta": ("mean delta of the rest of the rows, weighted as the class", "1"),
    "layer_ratio": ("geometric mean of the ratio over heads", "1"),
    "layer_ratio_low": ("lower end of the interval of the geometric mean over heads", "1"),
    "layer_ratio_high": ("upper end of the interval of the geometric mean over heads", "1"),
    "layer_null_ratio": ("geometric mean of the ratio over heads with labels shifted within rows", "1"),
    "layer_null_low": ("2.5 % quantile of the geometric mean over heads over shifts", "1"),
    "layer_null_high": ("97.5 % quantile of the geometric mean over heads over shifts", "1"),
    "specialist_share": ("share of the layer's heads that are specialists", "1"),
    "share": ("share of all heads that are specialists", "1"),
    "n_tokens": ("tokens of the class", "token"),
}
_CHANGE = {
    "effect": "change when delta of the class is set to the mean of the rest",
    "random": "the same for as many random tokens, mean over draws",
    "excess": "effect less that of random tokens, paired by row",
    "intact": "mean over rows, nothing ablated",
}
_END = {"_low": ", lower end of the interval", "_high": ", upper end of the interval", "_p": ", family-wise p-value"}


def _entry(name: str, values: np.ndarray, head_dim: str) -> Entry:
    dims = ("class", "layer", head_dim)[: np.ndim(values)]
    if name in _TEXT:
        return dims, values, *_TEXT[name]
    kind, quantity, *_ = name.split("_")
    end = next((text for end, text in _END.items() if name.endswith(end)), "")
    return (
        dims,
        values,
        f"{quantity}: {_CHANGE[kind]}{end}",
        "1" if quantity == "accuracy" or name.endswith("_p") else "nat",
    )


def _attributes(
    view: Canonical, ablated: xr.Dataset | None, threshold: float, n_shifts: int, n_bootstrap: int, seed: int
) -> dict[str, str]:
    several = view.n_rows > 1
    return {
        "analysis": "sinks",
        "model": str(view.trace.attrs.get("model", "unnamed model")),
        "estimator": "sum of delta at the class over what it would be were each of its tokens as the mean of the rest "
        "of its row (ours, after the state sink of arXiv 2606.00930)",
        "null": f"labels shifted circularly within rows, {n_shifts} times, the same in every layer and head",
        "specialist_rule": f"ratio >= {threshold:g}, and above the shifts at a family-wise level of {LEVEL:g} "
        "over all classes, layers and heads (max-T of the standardised log ratio), in at least 2 rows; assumes step "
        "sizes alike in distribution at every place of a row",
        "interval": "95 % percentile bootstrap over rows" if several else "NaN: one row, nothing to resample",
        "reduces_over": "ratio: batch, token; layer_*: heads too; share: layers too",
        "ablation": NO_ABLATION if ablated is None else f"{ablated.attrs['ablated']}; null: {ablated.attrs['null']}, "
        f"{ablated.attrs['n_random']} draws; scored: {ablated.attrs['scored']}; rows without the class "
        "count as unchanged",
        "p_values": P_VALUES if ablated is not None else "of ratios: see specialist_rule",
        "head_dim": view.head_dim,
        "n_rows": str(view.n_rows),
        "n_scored_rows": str(_n_scored(view, ablated)),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
    }  # fmt: skip
