"""Head and layer ablation of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.ablation.measure import QUANTITIES, measure
from mamba_probe.analyses.ablation.plot import plot
from mamba_probe.analyses.common.again import MOST_ROWS, given, lacks_predictions
from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, number, span
from mamba_probe.analyses.common.paired import FEWEST_ROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ANALYSIS"]

MOST_UNITS = 16
"""Parts of all layers together, beside the layers as wholes."""
MOST_PARTS = 8
"""Groups of channels of one layer, where it has more heads or channels than 16."""
WORK = 2**31
"""States that the sets of random channels of one size may step through, together: as many sets are drawn, up to what
ranks a unit among them with p = 0.05 over all units."""
FEWEST_DRAWS = 2
TOLD = 8
"""Units of the table: those that cost most."""


def _of_run(run: Any, seed: int) -> xr.Dataset:
    part = run.isel(batch=slice(MOST_ROWS))
    trace, (inputs, mask, batch_size) = part.trace, given(part)
    chosen, rule = _parts(trace.sizes[trace["delta"].dims[-1]], trace.sizes["layer"])
    draws = _draws(chosen, trace)
    with run.probe() as probe:
        ablated = probe.ablate_units(inputs, mask, n_random=draws, seed=seed, batch_size=batch_size, **chosen)
    rows = f"the first {trace.sizes['batch']} of {run.trace.sizes['batch']}"
    return measure(trace, ablated=ablated, seed=seed).assign_attrs(rows=rows, units=rule)


def _parts(n_heads: int, n_layers: int) -> tuple[dict[str, Any], str]:
    """What of each layer is ablated beside the whole."""
    most = MOST_UNITS // n_layers
    if most < 2:
        return {"heads": ()}, f"every layer as a whole; {n_layers} layers have too many parts for a report"
    if n_heads <= min(most, 2 * MOST_PARTS):
        return {"group": 1}, "every layer as a whole, and each of its heads (channels)"
    group = -(-n_heads // min(most, MOST_PARTS))
    return {"group": group}, f"every layer as a whole, and its channels (heads), {group} consecutive ones at a time"


def _draws(chosen: dict[str, Any], trace: xr.Dataset) -> int:
    """Random sets of each size: 20 for each unit that has such sets decide, where they are affordable; few where the
    rows cannot tell an effect from chance, whatever its rank."""
    if trace.sizes["batch"] < FEWEST_ROWS:
        return FEWEST_DRAWS
    n_heads, n_layers = trace.sizes[trace["delta"].dims[-1]], trace.sizes["layer"]
    parts = -(-n_heads // chosen["group"]) if "group" in chosen else 0
    units = n_layers * (parts + (n_layers > 1))
    states = n_layers * n_heads * trace.sizes.get("head_channel", 1) * trace.sizes.get("state", 1)
    return max(FEWEST_DRAWS, min(20 * units, WORK // (states * int(trace["valid"].sum()))))


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows = []
    if "accuracy" in result:
        value = f"{number(result['accuracy'].item())} ({result['n_correct'].item()}/{result['n_query'].item()})"
        rows.append(
            Row("task accuracy", value, "", span(result["accuracy_low"].item(), result["accuracy_high"].item()))
        )
    sentence = result.attrs["verdict"][0].upper() + result.attrs["verdict"][1:] + "."
    if not _solved(result):
        return sentence, rows
    name = result.attrs["scored"]
    what = f"{name} without" if name == "accuracy" else f"{name} without, nats,"
    harm = QUANTITIES[name][1] * result[f"effect_{name}"].values
    for index in np.argsort(-harm, kind="stable")[:TOLD]:
        one = result.isel(unit=int(index))
        ends = span(one[f"effect_{name}_low"].item(), one[f"effect_{name}_high"].item())
        null, detail = (
            number(one[f"random_{name}"].item()),
            f"; reads with entropy {number(one['entropy'].item())} nats",
        )
        unit = f"change of {what} {one['unit'].item()}"
        rows.append(Row(unit, number(one[f"effect_{name}"].item()), null, ends, detail=detail))
    if np.isfinite(result["correlation"].item()):
        null = f"{number(result['correlation_null_low'].item())} to {number(result['correlation_null_high'].item())}"
        ends = span(result["correlation_low"].item(), result["correlation_high"].item())
        rows.append(Row("rank correlation of harm and entropy", number(result["correlation"].item()), null, ends))
    return sentence, rows


def _solved(result: xr.Dataset) -> bool:
    return "solved" not in result or bool(result["solved"])


def _entropies(result: xr.Dataset, ax: "Axes") -> None:
    plot(result, ax, kind="entropy")


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    parts = any(_solved(one) and bool((one["kind"] != "layer").any()) for one in results)
    return (Panel(plot), Panel(_entropies)) if parts else (Panel(plot),)


ANALYSIS = Analysis(
    title="Head and layer ablation",
    question="What does the model lose without a layer, or without some of its heads or channels?",
    reading=(
        "Change of the accuracy (of a text: of the loss) on the same rows with a part taken out: a layer's mixer gives"
        " 0, or what the scan reads out for some heads (channels) is 0. Null: as many channels drawn at random."
        " Entropy: of the shares of |alpha| with which the part reads earlier tokens; 0 where it reads one. A model"
        " that does not solve its task has no effect to score."
    ),
    picture=(
        "Each point is a part taken out, named below it: a layer as a whole, then its parts. Its height is the"
        " change of the accuracy (where the rows are a text: of the loss) without it, the bar its interval. Grey is"
        " the null: as many channels drawn at random, and their range. A filled point differs from 0 by more than"
        " chance among the rows (p at most 0.05 over all parts); it says something of that part only where it lies"
        " beyond the grey too. Where parts were taken out, the lower panel sets that change against the entropy of"
        " what each part reads."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    lacks=lacks_predictions,
    drawn=_solved,
    notes=("rows", "units", "gate", "p_values", "correlation_rule"),
)
