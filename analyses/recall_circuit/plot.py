"""One picture of a recall circuit: signatures against their nulls and ideals, and what each part causes."""

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.common import style
from mamba_probe.analyses.recall_circuit.diagram import diagram
from mamba_probe.trace.contract import unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

CAUSE = "#009E73"
"""What an edit of the model takes away (Okabe and Ito's green)."""
CHANCE: dict[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 2.5, "color": style.NULL, "zorder": 2}
TWIN: dict[str, Any] = {"marker": "o", "markersize": 7, "markerfacecolor": "white", "color": style.NULL, "zorder": 2.5}
IDEAL: dict[str, Any] = {"marker": "D", "markersize": 9, "markerfacecolor": "none", "color": "black", "zorder": 1}


KINDS = ("signatures", "diagram")


@style.names_as_they_are
def plot(result: xr.Dataset, ax: "Axes | None" = None, *, layer: int | None = None, kind: str = "signatures") -> "Axes":
    """Draw a result of `measure`: a row a signature, and below a row an edit; or the circuit's diagram.

    Dots are measured values with 95 % intervals, bars reach to them from chance, diamonds are the closed-form circuit.
    Without a circuit the axes say why. Not drawn: S8, which has another scale and no ideal, and what was not measured.

    Args:
        result: from `measure`.
        ax: where to draw; None: new axes.
        layer: the model's own layer number; None: the one with the largest S1.
        kind: "signatures", or "diagram" (see `diagram`).

    Raises:
        ValueError: another kind, `layer` is not in the result, or it is a result of another analysis.
    """
    style.check(result, "recall_circuit")
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind == "diagram":
        return diagram(result, ax, layer=layer)
    panel: Axes = style.axes(ax, (7.0, 5.4))  # room for a row each
    if layer is not None and layer not in result["layer"].values:
        raise ValueError(f"layer {layer} is not in the result; it holds {result['layer'].values.tolist()}")
    if not bool(result["solved"]):
        return _say(panel, result)
    shown = result.isel(layer=int(result["strongest"].values.argmax())) if layer is None else result.sel(layer=layer)
    shown = shown.isel(signature=np.isfinite(shown["ideal"].values) & np.isfinite(shown["value"].values))
    rows = np.arange(shown.sizes["signature"], dtype=float)
    names = [_name(*both) for both in zip(shown["signature"].values, shown["label"].values, strict=True)]
    _signatures(panel, rows, shown)
    if "causal_share" in shown and shown.sizes["intervention"]:
        edits = rows[-1] + 2 + np.arange(shown.sizes["intervention"])
        _causes(panel, edits, shown)
        rows, names = np.concatenate([rows, edits]), names + [str(name) for name in shown["intervention"].values]
    return _finish(panel, rows, names, shown)


def _name(signature: object, label: object) -> str:
    return f"{label}  {str(signature).replace('_', ' ')}"


def _signatures(ax: "Axes", rows: Float[np.ndarray, " row"], shown: xr.Dataset) -> None:
    value, low, high, null = (shown[name].values for name in ("value", "low", "high", "null"))
    _points(ax, rows, value, low, high, null, style.REAL, "measured, 95 % interval")
    ax.plot(null, rows, linestyle="none", label="chance", **CHANCE)
    if "baseline" in shown:
        ax.plot(shown["baseline"].values, rows, linestyle="none", label="randomised twin", **TWIN)
    ax.plot(shown["ideal"].values, rows, linestyle="none", label="closed-form circuit", **IDEAL)


def _points(
    ax: "Axes", rows: Float[np.ndarray, " row"], value: Float[np.ndarray, " row"], low: Float[np.ndarray, " row"],
    high: Float[np.ndarray, " row"], start: Float[np.ndarray, " row"], colour: str, label: str,
) -> None:  # fmt: skip
    """Bars from `start` to `value`, dots, and intervals where there are any."""
    ax.barh(rows, value - start, left=start, height=0.3, color=colour, alpha=0.2, linewidth=0)
    some = np.isfinite(low)
    ax.hlines(rows[some], low[some], high[some], color=colour, linewidth=2)
    ax.plot(value, rows, "o", color=colour, markersize=5, label=label, zorder=3)


def _causes(ax: "Axes", rows: Float[np.ndarray, " row"], shown: xr.Dataset) -> None:
    share, low, high = (shown[name].values for name in ("causal_share", "causal_low", "causal_high"))
    _points(ax, rows, share, low, high, np.zeros(len(rows)), CAUSE, "causal share, 95 % interval")
    ax.axhline(rows[0] - 1, color="0.6", linewidth=0.8)


def _finish(ax: "Axes", rows: Float[np.ndarray, " row"], names: list[str], shown: xr.Dataset) -> "Axes":
    ax.set_yticks(rows, names)
    ax.set_ylim(rows[-1] + 0.7, -0.7)
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0.0) - 0.05, max(right, 1.05))
    model = f" of {shown.attrs['model']}" if shown.attrs.get("model") else ""
    ax.set_xlabel(f"value in layer {int(shown['layer'])}{model}, write offset {int(shown['offset'])}")
    style.frame(ax)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    style.legend_outside(ax)
    return ax


def _say(ax: "Axes", result: xr.Dataset) -> "Axes":
    """A panel of text: there is nothing to draw, and why."""
    head, _, reason = result.attrs["verdict"].partition(": ")
    ax.set_axis_off()
    ax.text(0.5, 0.56, head.capitalize(), ha="center", va="bottom", fontsize="x-large", transform=ax.transAxes)
    ax.text(0.5, 0.5, fill(reason, 60), ha="center", va="top", color="0.35", transform=ax.transAxes)
    return ax
