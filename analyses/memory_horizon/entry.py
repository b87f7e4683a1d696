"""The memory horizon of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, listed, name_layers, number, shown, span
from mamba_probe.analyses.memory_horizon.measure import measure
from mamba_probe.analyses.memory_horizon.plot import plot

__all__ = ["ANALYSIS"]


def _of_run(run: Any, seed: int) -> xr.Dataset:
    return measure(run.trace, seed=seed)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    for layer in shown(result):
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
        return f"{name_layers(result)} forgets nothing within the recording: every horizon is censored.", rows
    return f"{_sentence(result)}{listed(result)}", rows


def _sentence(result: xr.Dataset) -> str:
    """The layers whose median write lives shortest and longest, each beside its own time-invariant null."""
    layers = result["layer"].values
    median, least = (result[f"layer_forward_horizon{end}"].sel(quantile=0.5).values for end in ("", "_at_least"))
    order = np.lexsort((least, median))
    ends = dict.fromkeys(layers[order[[0, -1]]].tolist())
    return " ".join(_told(result, layer) for layer in ends)


def _told(result: xr.Dataset, layer: int) -> str:
    """Of one layer: its median beside both nulls, or that its rows are too short for one."""
    lti, shuffled = (_median(result, layer, f"null_{which}") for which in ("lti", "shuffle"))
    one, nulls = result.sel(layer=layer, quantile=0.5), f"time-invariant {lti}, steps shuffled {shuffled}"
    if np.isfinite(one["layer_forward_horizon"].item()):
        return f"Layer {layer}: the median write decays to 1/e after {_median(result, layer)} tokens ({nulls})."
    outlast = f"{one['layer_forward_censored_share'].item():.0%} of its writes outlast their rows"
    if lti.startswith("at least"):
        return f"Layer {layer}: cannot be told on rows this short: {outlast}, and time-invariant the median does too."
    return f"Layer {layer}: {outlast}: the median write lives {_median(result, layer)} tokens ({nulls})."


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


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    share = Panel(partial(plot, kind="share"), "xy")
    several = any(one.sizes["layer"] > 1 for one in results)
    return (share, Panel(partial(plot, kind="horizon"), "y")) if several else (share,)


ANALYSIS = Analysis(
    title="Memory horizon",
    question="For how many tokens does a write survive along the path executed?",
    reading=(
        "The horizon of a write is the number of tokens until it has decayed to 1/e. Time-invariant: the same layer"
        " with delta at its mean, counted alike; shuffled: the same deltas in random order. Gain: median horizon over"
        " the time-invariant one. A horizon that the recording does not reach is censored: only a bound is known."
    ),
    picture=(
        "The curves fall where writes are forgotten: their height is the share of channels and states that still"
        " hold a write after so many tokens. Blue is what the model executed, orange dashes and grey are the nulls;"
        " where the three lie on one another the input's selection changes nothing. Of several layers, below: the"
        " median of each, a bar from the 10 % to the 90 % quantile; a triangle was not reached, so it is at least"
        " that."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    notes=("censoring", "path"),
)
