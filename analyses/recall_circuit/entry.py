"""The recall circuit of a recorded run: how it is measured, said and drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, number, span
from mamba_probe.analyses.recall_circuit.distance import distance
from mamba_probe.analyses.recall_circuit.measure import measure
from mamba_probe.analyses.recall_circuit.plot import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ANALYSIS"]


def _of_run(run: Any, seed: int) -> xr.Dataset:
    return measure(run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin, seed=seed)


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    accuracy = Row(
        "task accuracy",
        f"{number(result['accuracy'].item())} ({result['n_correct'].item()}/{result['n_query'].item()})",
        number(result["chance"].item()),
        span(result["accuracy_low"].item(), result["accuracy_high"].item()),
    )
    if not bool(result["solved"]):
        return result.attrs["verdict"], [accuracy] if result["n_query"].item() else []
    layer = result.isel(layer=int(result["strongest"].values.argmax()))
    rows = []
    table = distance(result).sel(layer=layer["layer"])
    for signature in layer["signature"].values[layer["absent"].values == ""]:
        one = layer.sel(signature=signature)
        away = table["distance"].sel(signature=signature).item()
        ideal = f"; ideal {number(one['ideal'].item())}, distance {number(away)}" if np.isfinite(away) else ""
        twin = f" (twin {number(one['baseline'].item())})" if "baseline" in one else ""
        label, value = f"{signature}: {one['label'].item()}", number(one["value"].item())
        null = number(one["null"].item()) + twin
        rows.append(Row(label, value, null, span(one["low"].item(), one["high"].item()), detail=ideal))
    rows.append(accuracy)
    for name in result["intervention"].values if "causal_share" in result else ():
        one = result.sel(intervention=name)
        interval = span(one["causal_low"].item(), one["causal_high"].item())
        rows.append(Row(f"causal share of {name}", number(one["causal_share"].item()), "0", interval))
    return result.attrs["verdict"], rows


def _diagram(result: xr.Dataset, ax: "Axes") -> None:
    """The diagram of the circuit found; where none was, a line that says so."""
    if result["found"]:
        plot(result, ax, kind="diagram")
        return
    ax.set_axis_off()
    text = f"{result.attrs['model']}: no circuit found, so no diagram"
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.35", transform=ax.transAxes)


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    signatures = Panel(plot, "x")
    return (signatures, Panel(_diagram)) if any(one["found"] for one in results) else (signatures,)


def _solved(result: xr.Dataset) -> bool:
    return bool(result["solved"])


ANALYSIS = Analysis(
    title="Recall circuit",
    question="Does the model store pairs and read them back, and by which parts?",
    reading=(
        "A signature has its ideal where a layer does what the closed-form circuit does. Null: chance; the twin is"
        " the same architecture untrained. Distance: 0 at the ideal, 1 at the null. S1: of all pairs written, the right"
        " one adds most to its answer. S2: its share of all that speaks for or against the answer. S3: that pair"
        " alone names the right value. S4: what decay left of it. S5 and S6: the query's C matches the right B best"
        " (margin, accuracy). S7: share of the write energy at pairs. S9: share of the gate's energy on keys. S10: the"
        " convolution's taps shift the key by one token; S11: so does its effect. S12, S13: an S4D channel writes one"
        " key with one value, and reads it at that key. Causal share: what an edit takes away of the accuracy above"
        " chance (above 1: it fell below chance). Each layer by direct attribution: later layers are not followed."
        " The diagram is of the circuit found, drawn from these measurements; where none is found there is none."
    ),
    picture=(
        "Each line is one signature: the bar leads from its null (grey stroke) to what was measured (blue). An open"
        " diamond is what the closed-form circuit has, an open circle the untrained twin. The nearer blue is to its"
        " diamond and the further from the grey, the more the model does as the circuit. Green: the share of the"
        " accuracy that an edit takes away."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    drawn=_solved,
    notes=("verdict_rule", "offset_choice", "causal_estimator"),
)
