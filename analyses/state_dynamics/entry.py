"""The state dynamics of a recorded run: how they are measured, said and drawn."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import FEW, Analysis, Panel, Row, listed, number, shown, span
from mamba_probe.analyses.state_dynamics.measure import measure
from mamba_probe.analyses.state_dynamics.plot import plot

__all__ = ["ANALYSIS"]


def _of_run(run: Any, seed: int) -> xr.Dataset:
    return measure(run.trace, baseline=run.twin[0] if run.twin else None, loss=_loss(run), seed=seed)


def _loss(run: Any) -> xr.Dataset | None:
    """Of a task its answers', of a text each next token's; None without logits or without the model."""
    if "prediction" not in run.trace.coords or run.lacks_model():
        return None
    ids, mask = run.inputs()
    with run.probe() as probe:
        return probe.losses(ids, mask, batch_size=16) if run.task is None else probe.losses(run.task, batch_size=16)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = [row for layer in shown(result) for row in _rows(result.sel(layer=layer), layer)]
    if "loss_trend" in result and np.isfinite(result["loss_trend"]):
        trend, low, high, null = (
            result[name].item()
            for name in ("loss_trend", "loss_trend_low", "loss_trend_high", "null_shuffle_loss_trend")
        )
        rows.append(Row("loss per doubling of the position, nats", number(trend), number(null), span(low, high)))
    half, size = (result[name].values for name in ("layer_half_life", "layer_ess_entropy"))
    median, layers, states = half[1], result["layer"].values, result.attrs["n_states"]
    ends = dict.fromkeys((int(np.argmin(median)), int(np.argmax(median))))
    longest = int(result.attrs["longest"])
    lives = " and ".join(f"{_life(median[i], longest)} in layer {layers[i]}" for i in ends)
    at, beside = int(np.argmax(size)), ""
    if "baseline_layer_ess_entropy" in result:
        beside = f", its untrained twin {number(result['baseline_layer_ess_entropy'].values[at])}"
    lti = number(result["layer_null_lti_ess_entropy"].values[at])
    most = f"{number(size[at])} of {states} states in layer {layers[at]} (time-invariant {lti}{beside})"
    said = f"At its mean step the median state halves after {lives}; what later tokens read of the past takes up to"
    return f"{said} {most}.{listed(result)}", rows


def _rows(one: xr.Dataset, layer: int) -> list[Row]:
    median = one.sel(quantile=0.5)
    rows = [
        _row("median half-life, tokens", "half_life", median, layer, {}, int(one.attrs["longest"])),
        _row(
            f"effective state size, of {one.attrs['n_states']}", "ess_entropy", one, layer,
            {"time-invariant": "null_lti_", "shuffled": "null_shuffle_"},
        ),
        _row("singular values above the tolerance", "ess_rank", one, layer, {"time-invariant": "null_lti_"}),
    ]  # fmt: skip
    if "layer_growth" in one:
        order = {"random order": "null_order_"} if "layer_null_order_growth" in one else {}
        rows.append(_row("growth of the state, exponent", "growth", median, layer, order))
    for name in ("closed", "held", "erased"):
        rows.append(_row(f"steps {name}", f"{name}_share", one, layer, {"time-invariant": "null_lti_"}))
    return rows


def _row(
    what: str, name: str, one: xr.Dataset, layer: int, nulls: dict[str, str], longest: int | float = np.inf
) -> Row:  # fmt: skip
    def value(of: str) -> float:
        return round(one[of].item(), 9) + 0.0

    def text(of: str) -> str:
        return _seen(value(of), longest)

    said = [f"{word} {text(f'layer_{null}{name}')}" for word, null in nulls.items()]
    if f"baseline_layer_{name}" in one:
        said.append(f"untrained twin {text(f'baseline_layer_{name}')}")
    low, high = (value(f"layer_{name}_{end}") for end in ("low", "high"))
    ends = (
        span(low, high) if high <= longest else " to ".join(dict.fromkeys(_seen(end, longest) for end in (low, high)))
    )
    rows = int(one.attrs["n_rows"])
    detail = f"; {rows} rows: the interval is too narrow" if 1 < rows < FEW else ""
    return Row(what, text(f"layer_{name}"), "; ".join(said), ends, layer, detail)


def _seen(value: float, longest: int | float) -> str:
    """A number of tokens; what lies beyond the longest row was not seen."""
    return f"more than {longest:g}" if value > longest else number(value)


def _life(value: float, longest: int) -> str:
    return f"more than the row's {longest} tokens" if value > longest else f"{number(value)} tokens"


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    kinds = [("decay", "y"), ("size", ""), ("saturation", "y")]
    if all("layer_rms" in one for one in results):
        kinds.append(("state", ""))
    return tuple(Panel(partial(plot, kind=kind), alike) for kind, alike in kinds)


ANALYSIS = Analysis(
    title="State dynamics",
    question="How fast does a layer forget, does its state keep growing, and how much of it is used?",
    reading=(
        "The half-life is ln 2 over the mean of |A| delta: of a state at its mean step; no write is followed, and what"
        " exceeds the longest row was not seen. The effective state size counts, in states, what the tokens from the"
        " middle of a row on can read of those before it, however weakly; its nulls are the same layer with delta, B"
        " and C at their means, and with delta shuffled. Growth is the exponent a of state size ~ tokens^a over the"
        " later half of a row: 0 where forgetting balances writing, 1/2 where unrelated writes add up, 1 where like"
        " ones do; its null reads the same tokens in random order. A step is closed where next to nothing is written,"
        " held where every state is kept, erased where none is."
    ),
    picture=(
        "From above, a mark a layer with its interval. The half-life of a state; above the dotted line it is longer"
        " than the rows, so it was not seen. How many states later tokens can read the past from, beside the nulls"
        " and the untrained twin. The shares of steps that write next to nothing, keep all, or erase all; hollow"
        " marks are the null. Where states were recorded: their size as tokens are read, dashed in random order"
        " (null)."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    notes=("states", "longest", "every", "sized", "tolerance", "saturation", "baseline"),
)
