"""What a result says: one sentence and a short table, each number with its null and its interval."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

__all__ = ["Finding", "Row", "finding"]


@dataclass(frozen=True)
class Row:
    """One number: what it is, its value, its null and its 95 % interval, as text."""

    what: str
    value: str
    null: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Finding:
    """The answer of one analysis."""

    title: str
    question: str
    sentence: str
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    """Estimator, null, interval and what is reduced over, as the result states them."""
    drawn: bool = True
    """Whether its picture shows numbers, and not only that there are none."""


def finding(name: str, result: xr.Dataset) -> Finding:
    """The finding of a result of the analysis `name`."""
    title, question, say = _ANALYSES[name]
    sentence, rows = say(result)
    stated = (
        "estimator", "null", "baseline_estimator", "interval", "reduces_over", "queries", "window_rule", "censoring",
        "verdict_rule", "offset_choice", "path", "causal_estimator",
    )  # fmt: skip
    notes = tuple((key.replace("_", " "), str(result.attrs[key])) for key in stated if result.attrs.get(key))
    drawn = name != "recall_circuit" or bool(result["solved"])
    return Finding(title, question, sentence[0].upper() + sentence[1:], tuple(rows), notes, drawn)


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: few digits, plain words for what cannot be stated.

    >>> number(0.12345), number(float("nan")), number(float("inf")), number(1.9e18)
    ('0.123', 'none', 'beyond the recording', '1.9e+18')
    """
    if np.isnan(value):
        return "none"
    if np.isinf(value):
        return "beyond the recording"
    return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:.1e}"


def span(low: float, high: float) -> str:
    """A 95 % interval, or nothing where there is none."""
    if np.isnan(low) or np.isnan(high):
        return ""
    return number(low) if np.isinf(low) and np.isinf(high) else f"{number(low)} to {number(high)}"


def _recall(result: xr.Dataset) -> tuple[str, list[Row]]:
    accuracy = Row(
        "task accuracy",
        f"{number(result['accuracy'].item())} ({result['n_correct'].item()}/{result['n_query'].item()})",
        number(result["chance"].item()),
        span(result["accuracy_low"].item(), result["accuracy_high"].item()),
    )
    if not bool(result["solved"]):
        return result.attrs["verdict"], [accuracy] if result["n_query"].item() else []
    layer = result.isel(layer=int(result["strongest"].values.argmax()))
    rows = [accuracy]
    for signature in layer["signature"].values:
        one = layer.sel(signature=signature)
        twin = f" (twin {number(one['baseline'].item())})" if "baseline" in one else ""
        label = f"{signature}: {one['label'].item()}"
        null = number(one["null"].item()) + twin
        rows.append(Row(label, number(one["value"].item()), null, span(one["low"].item(), one["high"].item())))
    for name in result["intervention"].values if "causal_share" in result else ():
        one = result.sel(intervention=name)
        interval = span(one["causal_low"].item(), one["causal_high"].item())
        rows.append(Row(f"causal share of {name}", number(one["causal_share"].item()), "0", interval))
    return result.attrs["verdict"], rows


def _horizon(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in _shown(result):
        one = result.sel(layer=layer)
        median, censored = one.sel(quantile=0.5), one["layer_forward_censored_share"].item()
        lti, shuffled = number(median["layer_lti_horizon"].item()), _median(result, layer, "null_shuffle")
        interval = span(*(median[f"layer_forward_horizon_{end}"].item() for end in ("low", "high")))
        null = f"time-invariant {lti}; shuffled {shuffled}"
        rows += [
            Row(f"layer {layer}: median horizon, tokens", _median(result, layer), null, interval),
            Row(f"layer {layer}: horizons beyond the recording", f"{censored:.0%}"),
            _gain(layer, one),
        ]
    share = result["layer_forward_censored_share"].values
    if (share == 1).all():
        where = _name_layers(result)
        return f"{where} forgets nothing within the recording: every horizon is censored.", rows
    seen = result["layer_forward_horizon"].sel(quantile=0.5).values
    low, high = (result["layer"].values[index] for index in (seen.argmin(), seen.argmax()))
    if low == high:
        lti = number(result["layer_lti_horizon"].sel(quantile=0.5, layer=low).item())
        said = f"half of all writes decay to 1/e within {_median(result, low)} tokens; with delta at its mean, {lti}"
        return f"Layer {low}: {said} ({share.max():.0%} outlast the recording).", rows
    ends = f"{_median(result, low)} tokens in layer {low} and {_median(result, high)} in layer {high}"
    return f"The median write decays to 1/e between {ends}{_listed(result)}", rows


def _median(result: xr.Dataset, layer: int, which: str = "forward") -> str:
    """Median horizon of a layer; a bound where it is censored."""
    median = result.sel(layer=layer, quantile=0.5)
    horizon, least = (median[f"layer_{which}_horizon{end}"].item() for end in ("", "_at_least"))
    return f"at least {number(least)}" if np.isinf(horizon) else number(horizon)


def _gain(layer: int, one: xr.Dataset) -> Row:
    gain, shuffled = one["layer_selectivity_gain"].item(), one["layer_null_shuffle_gain"].item()
    interval = span(one["layer_selectivity_gain_low"].item(), one["layer_selectivity_gain_high"].item())
    what = f"layer {layer}: selectivity gain"
    if np.isinf(gain) or np.isnan(gain):
        return Row(what, "not measurable: the median horizon is censored")
    return Row(what, number(gain), f"time-invariant 1; shuffled {number(shuffled)}", interval)


_ALIGNMENT = (
    ("best_cosine", "|cos| with the best single wavelet"),
    ("effective_rank", "effective number of coefficients (1: a single one)"),
    ("wavelet_capture", "energy in the coarse wavelets"),
)


def _wavelet(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in _shown(result):
        one = result.sel(layer=layer)
        for name, what in _ALIGNMENT:
            value, null = one[f"layer_{name}"].item(), one[f"layer_null_{name}"].item()
            interval = span(one[f"layer_{name}_low"].item(), one[f"layer_{name}_high"].item())
            rows.append(Row(f"layer {layer}: {what}", number(value), number(null), interval))
        dead = int(one["n_dead"].sum())
        rows.append(Row(f"layer {layer}: kernels without energy, left out", f"{dead} of {one['best_cosine'].size}"))
    cosine, null = (result[f"layer_{which}best_cosine"].values for which in ("", "null_"))
    if np.isnan(cosine).all():
        return f"{_name_layers(result)}: no kernel has energy at the query, so nothing is measured.", rows
    low, high = np.nanargmin(cosine), np.nanargmax(cosine)
    layers, wavelet = result["layer"].values, result.attrs["wavelet"]
    said = f"Mean |cos| of the executed kernels with their best single {wavelet} wavelet"
    if low == high:
        return f"{said}: {number(cosine[low])}, against {number(null[low])} once time-invariant.", rows
    ends = f"{number(cosine[low])} (layer {layers[low]}) to {number(cosine[high])} (layer {layers[high]})"
    frozen = f"{number(np.nanmin(null))} to {number(np.nanmax(null))}"
    return f"{said}: {ends}; once time-invariant {frozen}{_listed(result)}", rows


MOST_LAYERS = 6


def _shown(result: xr.Dataset) -> list[int]:
    """All layers, or some spread evenly where there are many; the stores hold all."""
    layers = result["layer"].values
    if len(layers) <= MOST_LAYERS:
        return layers.tolist()
    return layers[np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)].tolist()


def _listed(result: xr.Dataset) -> str:
    n, shown = result.sizes["layer"], len(_shown(result))
    if shown == n:
        return f". The table has all {n} layers."
    return f". The table has {shown} of {n} layers; the figure and the stored result have all."


def _name_layers(result: xr.Dataset) -> str:
    return (
        f"Layer {result['layer'].item()}" if result.sizes["layer"] == 1 else f"Each of {result.sizes['layer']} layers"
    )


_Say = Callable[[xr.Dataset], tuple[str, list[Row]]]
_ANALYSES: dict[str, tuple[str, str, _Say]] = {
    "recall_circuit": ("Recall circuit", "Does the model store pairs and read them back, and by which parts?", _recall),
    "memory_horizon": ("Memory horizon", "For how many tokens does a write survive along the path executed?", _horizon),
    "wavelet_alignment": ("Wavelet alignment", "Are the kernels that a layer executed wavelet-like?", _wavelet),
}  # fmt: skip
