"""The state sinks of a recorded run: how they are measured, said and drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from mamba_probe.analyses.common.again import MOST_ROWS, given, lacks_predictions
from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, listed, number, shown, span
from mamba_probe.analyses.common.paired import FEWEST_ROWS
from mamba_probe.analyses.sinks.classes import classes
from mamba_probe.analyses.sinks.effects import LEVEL
from mamba_probe.analyses.sinks.measure import measure
from mamba_probe.analyses.sinks.plot import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ANALYSIS"]

DRAWS = 3
"""Random sets of tokens a class."""


def _of_run(run: Any, seed: int) -> xr.Dataset:
    trace = run.trace.isel(batch=slice(MOST_ROWS))
    chosen = classes(trace)
    result = measure(trace, classes=chosen, ablated=_ablated(run, chosen, seed), seed=seed)
    return result.assign_attrs(rows=f"the first {trace.sizes['batch']} of {run.trace.sizes['batch']}")


def _ablated(run: Any, chosen: xr.DataArray, seed: int) -> xr.Dataset | None:
    """None where nothing can be scored: then the result says that its ratios are no function."""
    if lacks_predictions(run):
        return None
    inputs, mask, batch_size = given(run.isel(batch=slice(MOST_ROWS)))
    with run.probe() as probe:
        return probe.ablate_class(inputs, mask, classes=chosen, n_random=DRAWS, seed=seed, batch_size=batch_size)


def _lacks(run: Any) -> str:
    constant = run.trace.attrs["family"] == "s4d"
    return "step sizes that depend on the token: S4D's are constants of its channels" if constant else ""


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    rows, said = [], []
    for name in result["class"].values.tolist():
        one = result.sel({"class": name})
        for layer in shown(result):
            at = one.sel(layer=layer)
            null = f"{number(at['layer_null_low'].item())} to {number(at['layer_null_high'].item())}"
            ends = span(at["layer_ratio_low"].item(), at["layer_ratio_high"].item())
            value, share = number(at["layer_ratio"].item()), number(100 * at["specialist_share"].item())
            rows.append(Row(f"delta at {name} / rest", value, null, ends, layer, detail=f"; {share} % specialists"))
        if "effect_loss" not in result:
            continue
        loss, ends = one["effect_loss"].item(), span(one["effect_loss_low"].item(), one["effect_loss_high"].item())
        rows.append(
            Row(f"loss without the steps of {name}, nats", number(loss), number(one["random_loss"].item()), ends)
        )
        if one["excess_loss_p"].item() <= LEVEL and one["excess_loss"].item() > 0:
            said.append(f"{name} ({number(loss)} nats, random tokens {number(one['random_loss'].item())})")
    return _sentence(result, said) + listed(result), rows


def _sentence(result: xr.Dataset, said: list[str]) -> str:
    share = {name: result["share"].sel({"class": name}).item() for name in result["class"].values.tolist()}
    found = ", ".join(f"{name} ({number(100 * part)} %)" for name, part in share.items() if part > 0)
    head = f"Heads that specialise: in {found}." if found else "No head specialises in a class of tokens."
    if "effect_loss" not in result:
        return f"{head} A ratio, not a function: no ablation was given."
    if int(result.attrs["n_scored_rows"]) < FEWEST_ROWS:
        return f"{head} {result['verdict'].values[0]}.".replace("whether it matters", "whether their step sizes matter")
    if not said:
        none = "Of no class is it shown that levelling its step sizes costs more loss than of as many random tokens."
        return f"{head} {none}"
    return f"{head} Levelling a class's step sizes costs more loss than of as many random tokens: {', '.join(said)}."


def _effect(result: xr.Dataset, ax: "Axes") -> None:
    plot(result, ax, kind="effect")


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    measured = all("effect_loss" in one for one in results)
    return (Panel(plot, "y"), Panel(_effect, "y")) if measured else (Panel(plot, "y"),)


ANALYSIS = Analysis(
    title="State sinks",
    question="Are step sizes larger at some tokens, in which heads, and does it matter to the predictions?",
    reading=(
        "The ratio is the mean delta at a class of tokens over that of the rest of the same rows (of a layer: geometric"
        " mean over heads). Its null: labels shifted circularly within rows. A specialist has a ratio of 2 or more,"
        " above its shifts with all classes, layers and heads counted. A ratio is not a function: the loss is what the"
        " model loses when the class's step sizes are levelled: set to the mean of the rest, in every layer;"
        " its null: the same for as many random tokens."
    ),
    picture=(
        "Each small circle is a head or channel: above 1 its steps are larger at that class of tokens than"
        " elsewhere; orange ones are specialists. The black stroke is the layer's mean. Below, where it was"
        " measured: the change of the loss when a class's steps are levelled (blue) and when as many random tokens'"
        " are (grey, null); blue above grey, bars apart, matters."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    lacks=_lacks,
    notes=("rows", "specialist_rule", "ablation", "p_values"),
)
