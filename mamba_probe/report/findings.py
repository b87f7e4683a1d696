"""What a result says: one sentence and a short table, each number with its null and its interval."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from mamba_probe.analyses import recall_circuit

__all__ = ["Finding", "Row", "finding"]


@dataclass(frozen=True)
class Row:
    """One number: what it is, its value, its null and its 95 % interval, and the reference's value, as text."""

    quantity: str
    value: str
    null: str = ""
    interval: str = ""
    layer: int | None = None
    detail: str = ""
    beside: str = ""

    @property
    def what(self) -> str:
        """The quantity, of which layer, and what belongs to it."""
        return f"{'' if self.layer is None else f'layer {self.layer}: '}{self.quantity}{self.detail}"


@dataclass(frozen=True)
class Finding:
    """The answer of one analysis."""

    title: str
    question: str
    reading: str
    """How to read its numbers, in plain words."""
    sentence: str
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    """Estimator, null, interval and what is reduced over, as the result states them."""
    drawn: bool = True
    """Whether its picture shows numbers, and not only that there are none."""
    beside: str = ""
    """What the same analysis says of the reference."""


def finding(name: str, result: xr.Dataset, beside: xr.Dataset | None = None) -> Finding:
    """The finding of a result of the analysis `name`, with the reference's numbers where its result is given."""
    title, question, reading, say = _ANALYSES[name]
    sentence, rows = say(result)
    other, others = say(beside) if beside is not None else ("", [])
    if beside is not None:
        rows = _paired(rows, others)
    stated = (
        "estimator", "null", "baseline_estimator", "interval", "reduces_over", "queries", "window_rule", "censoring",
        "verdict_rule", "offset_choice", "path", "causal_estimator",
        "aggregation", "identity",
    )  # fmt: skip
    notes = tuple((key.replace("_", " "), str(result.attrs[key])) for key in stated if result.attrs.get(key))
    drawn = name != "recall_circuit" or bool(result["solved"])
    return Finding(title, question, reading, _capital(sentence), tuple(rows), notes, drawn, _capital(other))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _paired(rows: list[Row], others: list[Row]) -> list[Row]:
    """Each row with the reference's value: of its only layer, or of the layer of the same number."""
    values, layers = {(row.quantity, row.layer): row.value for row in others}, {row.layer for row in others}
    only = next(iter(layers)) if len(layers) == 1 else None
    return [
        replace(row, beside=values.get((row.quantity, row.layer if only is None else only), "not measured"))
        for row in rows
    ]


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
    table = recall_circuit.distance(result).sel(layer=layer["layer"])
    for signature in layer["signature"].values[layer["absent"].values == ""]:
        one = layer.sel(signature=signature)
        away = table["distance"].sel(signature=signature).item()
        ideal = f"; ideal {number(one['ideal'].item())}, distance {number(away)}" if np.isfinite(away) else ""
        twin = f" (twin {number(one['baseline'].item())})" if "baseline" in one else ""
        label, value = f"{signature}: {one['label'].item()}", number(one["value"].item())
        null = number(one["null"].item()) + twin
        rows.append(Row(label, value, null, span(one["low"].item(), one["high"].item()), detail=ideal))
    for name in result["intervention"].values if "causal_share" in result else ():
        one = result.sel(intervention=name)
        interval = span(one["causal_low"].item(), one["causal_high"].item())
        rows.append(Row(f"causal share of {name}", number(one["causal_share"].item()), "0", interval))
    return result.attrs["verdict"], rows


def _horizon(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in _shown(result):
        one = result.sel(layer=layer)
        lti, shuffled = (_median(result, layer, f"null_{which}") for which in ("lti", "shuffle"))
        ends = (one[f"layer_forward_horizon_{end}"].sel(quantile=0.5).item() for end in ("low", "high"))
        rows += [
            Row(
                "median horizon, tokens",
                _median(result, layer),
                f"time-invariant {lti}; shuffled {shuffled}",
                span(*ends),
                layer,
            ),
            Row(
                "horizons beyond the recording",
                f"{one['layer_forward_censored_share'].item():.0%}",
                f"time-invariant {one['layer_null_lti_censored_share'].item():.0%}",
                layer=layer,
            ),
            _gain(layer, one),
        ]
    if (result["layer_forward_censored_share"] == 1).all():
        return f"{_name_layers(result)} forgets nothing within the recording: every horizon is censored.", rows
    return f"{_horizon_sentence(result)}{_listed(result)}", rows


def _horizon_sentence(result: xr.Dataset) -> str:
    """The layers whose median write lives shortest and longest, each beside its own time-invariant null."""
    layers = result["layer"].values
    median, least = (result[f"layer_forward_horizon{end}"].sel(quantile=0.5).values for end in ("", "_at_least"))
    order = np.lexsort((least, median))
    said = [
        f"{_median(result, layer)} tokens in layer {layer} (time-invariant {_median(result, layer, 'null_lti')})"
        for layer in dict.fromkeys(layers[order[[0, -1]]].tolist())
    ]
    return f"The median write decays to 1/e after {' and '.join(said)}."


def _median(result: xr.Dataset, layer: int, which: str = "forward") -> str:
    """Median horizon of a layer; a bound where it is censored."""
    median = result.sel(layer=layer, quantile=0.5)
    horizon, least = (median[f"layer_{which}_horizon{end}"].item() for end in ("", "_at_least"))
    return f"at least {number(least)}" if np.isinf(horizon) else number(horizon)


def _gain(layer: int, one: xr.Dataset) -> Row:
    gain, shuffled = one["layer_selectivity_gain"].item(), one["layer_null_shuffle_gain"].item()
    interval = span(one["layer_selectivity_gain_low"].item(), one["layer_selectivity_gain_high"].item())
    what = "selectivity gain"
    if np.isnan(gain):
        return Row(what, "not measurable: the time-invariant median is censored", layer=layer)
    said = f"at least {number(one['layer_selectivity_gain_at_least'].item())}" if np.isinf(gain) else number(gain)
    beside = (
        f"at least {number(one['layer_null_shuffle_gain_at_least'].item())}" if np.isinf(shuffled) else number(shuffled)
    )
    return Row(what, said, f"time-invariant 1; shuffled {beside}", interval, layer)


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
            rows.append(Row(what, number(value), number(null), interval, layer))
        dead = f"{int(one['n_dead'].sum())} of {one['best_cosine'].size}"
        rows.append(Row("kernels without energy, left out", dead, layer=layer))
    cosine, null = (result[f"layer_{which}best_cosine"].values for which in ("", "null_"))
    live = np.flatnonzero(~np.isnan(cosine))
    if not live.size:
        return f"{_name_layers(result)}: no kernel has energy at the query, so nothing is measured.", rows
    ends = dict.fromkeys([live[cosine[live].argmin()], live[cosine[live].argmax()]])
    layers = result["layer"].values
    said = [f"{number(float(cosine[i]))} in layer {layers[i]} ({_frozen(float(null[i]))})" for i in ends]
    dead = f" {len(cosine) - live.size} layer(s) have no kernel with energy." if live.size < len(cosine) else ""
    spike = f" A kernel that is one single token scores {number(result['spike_best_cosine'].item())}."
    head = f"Mean |cos| of the executed kernels with their best single {result.attrs['wavelet']} wavelet"
    return f"{head}: {' to '.join(said)}.{spike}{dead}{_listed(result)}", rows


def _frozen(null: float) -> str:
    return "no energy once time-invariant" if np.isnan(null) else f"once time-invariant {number(null)}"


_ATTENTION = (
    ("mean_distance", "mean distance read, tokens"),
    ("entropy", "entropy of |alpha|, nats"),
    ("first_share", "share of |alpha| on the first token"),
    ("negative_share", "share of |alpha| that is negative"),
)


def _attention(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in _shown(result):
        one = result.sel(layer=layer)
        for name, what in _ATTENTION:
            lti, shuffled = (number(one[f"layer_null_{which}_{name}"].item()) for which in ("lti", "shuffle"))
            ends = (one[f"layer_{name}_{end}"].item() for end in ("low", "high"))
            value, nulls = number(one[f"layer_{name}"].item()), f"time-invariant {lti}; shuffled {shuffled}"
            rows.append(Row(what, value, nulls, span(*ends), layer))
    distance = result["layer_mean_distance"].values
    live = np.flatnonzero(~np.isnan(distance))
    if not live.size:
        return f"{_name_layers(result)}: no query reads anything.", rows
    said = []
    for i in dict.fromkeys([live[distance[live].argmin()], live[distance[live].argmax()]]):
        null = number(result["layer_null_lti_mean_distance"].values[i].item())
        said.append(f"{number(distance[i].item())} tokens in layer {result['layer'].values[i]} (time-invariant {null})")
    return f"Weighted by |alpha|, a query reads from a distance of {' to '.join(said)}.{_listed(result)}", rows


MOST_LAYERS = 6


def _shown(result: xr.Dataset) -> list[int]:
    """All layers, or some spread evenly where there are many; the stores hold all."""
    layers = result["layer"].values
    if len(layers) <= MOST_LAYERS:
        return layers.tolist()
    return layers[np.linspace(0, len(layers) - 1, MOST_LAYERS).round().astype(int)].tolist()


def _listed(result: xr.Dataset) -> str:
    n, shown = result.sizes["layer"], len(_shown(result))
    if n == 1:
        return ""
    if shown == n:
        return f" The table has all {n} layers."
    return f" The table has {shown} of {n} layers; the figure and the stored result have all."


def _name_layers(result: xr.Dataset) -> str:
    return (
        f"Layer {result['layer'].item()}" if result.sizes["layer"] == 1 else f"Each of {result.sizes['layer']} layers"
    )


_Say = Callable[[xr.Dataset], tuple[str, list[Row]]]
_ANALYSES: dict[str, tuple[str, str, str, _Say]] = {
    "recall_circuit": (
        "Recall circuit",
        "Does the model store pairs and read them back, and by which parts?",
        "A signature has its ideal where a layer does what the closed-form circuit does. Null: chance; the twin is"
        " the same architecture untrained. Distance: 0 at the ideal, 1 at the null. S1: of all pairs written, the right"
        " one adds most to its answer. S2: its share of all that speaks for or against the answer. S3: that pair"
        " alone names the right value. S4: what decay left of it. S5 and S6: the query's C matches the right B best"
        " (margin, accuracy). S7: share of the write energy at pairs. S9: share of the gate's energy on keys. S10: the"
        " convolution's taps shift the key by one token; S11: so does its effect. S12, S13: an S4D channel writes one"
        " key with one value, and reads it at that key. Causal share: what an edit takes away of the accuracy above"
        " chance (above 1: it fell below chance). Each layer by direct attribution: later layers are not followed."
        " The diagram is of the circuit found, drawn from these measurements; where none is found there is none.",
        _recall,
    ),
    "memory_horizon": (
        "Memory horizon",
        "For how many tokens does a write survive along the path executed?",
        "The horizon of a write is the number of tokens until it has decayed to 1/e. Time-invariant: the same layer"
        " with delta at its mean, counted alike; shuffled: the same deltas in random order. Gain: median horizon over"
        " the time-invariant one. A horizon that the recording does not reach is censored: only a bound is known.",
        _horizon,
    ),
    "wavelet_alignment": (
        "Wavelet alignment",
        "Are the kernels that a layer executed wavelet-like?",
        "A kernel says how much a query reads from each earlier token. |cos| is 1 where it is a single wavelet; a"
        " kernel that is merely short scores high too, so compare it with that of one single token. Time-invariant: the"
        " same layer with delta, B and C at their means. Where that decays slowly it is nearly constant: one"
        " coefficient, of the scaling function, which is no wavelet.",
        _wavelet,
    ),
    "hidden_attention": (
        "Hidden attention",
        "From which tokens does a query's scan output read, and with which sign?",
        "alpha is the weight of a source token in the scan's output at a query, selection as executed; alpha . x + D x"
        " is that output. Shares are of |alpha|. Time-invariant: the same layer with delta, B and C at their means;"
        " shuffled: the same deltas in random order.",
        _attention,
    ),
}
