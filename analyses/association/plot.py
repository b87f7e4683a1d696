"""Pictures of a result: what each place gives back, as a map of sites and tokens, or token by token with its nulls."""

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.common.style import LTI, NULL, REAL, axes, check, names_as_they_are

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KINDS", "plot"]

KINDS = ("map", "bars")
WORDS = {
    "mixer_in": "mixer input (before conv)", "scan": "all the scan receives", "x": "x (after conv)",
    "B": "B (after conv)", "delta": "delta", "mixer_out": "mixer output",
}  # fmt: skip
MOST_LINES = 24
"""Lines of a map; of more layers than fit, some spread evenly are drawn."""


@names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "map", layer: int | None = None) -> "Axes":
    """Draw a result of `measure`.

    Args:
        result: what `association.measure` returned.
        ax: axes; None makes new ones.
        kind: "map": the share of the answer that comes back, site by token; "bars": of one layer, what the mixer's
            input and the scan give back token by token, with the row null and the twin.
        layer: for "bars": the model's own number; None is the first.

    Raises:
        ValueError: another analysis's result, another kind, a layer that it does not hold.
    """
    check(result, "association")
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}; got {kind!r}")
    if layer is not None and layer not in result["layer"].values:
        raise ValueError(f"layer {layer} is not in this result, which has {result['layer'].values.tolist()}")
    ax = axes(ax)
    style.title(ax, f"{result.attrs['model']}:\n{_heading(result)}")
    if not int(result["n_counted"]) or not bool(result["solved"]):
        ax.set_axis_off()
        words = f"{int(result['n_correct'])} of {int(result['n_query'])} queries answered: nothing to give back"
        ax.text(0.5, 0.5, words, ha="center", va="center", color="0.35", transform=ax.transAxes)
        return ax
    if kind == "map":
        _map(result, ax)
    else:
        _bars(result, ax, int(result["layer"].values[0] if layer is None else layer))
    return ax


def _heading(result: xr.Dataset) -> str:
    said = {
        "convolution": "key and value joined by the convolution",
        "earlier layer": "key and value joined by an earlier layer",
        "at the query": "key and value not joined before the query",
        "unseen": "no one place holds the pair",
        "none": "no mechanism reported",
    }
    return said[result.attrs["mechanism"]]


def _map(result: xr.Dataset, ax: "Axes") -> None:
    layers, sites, roles = (result[dim].values.tolist() for dim in ("layer", "site", "role"))
    kept = max(1, MOST_LINES // len(sites))
    if len(layers) > kept:
        layers = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, kept).round().astype(int))]
    lines = [(layer, site) for layer in layers for site in sites]
    values = np.array([result["recovered"].sel(layer=layer, site=site).values for layer, site in lines])
    image = ax.imshow(np.clip(values, -1, 1), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for y, x in np.argwhere(~np.isnan(values)):
        light = abs(values[y, x]) > 0.6
        ax.text(
            x,
            y,
            f"{round(float(values[y, x]), 2) + 0.0:.2f}",
            ha="center",
            va="center",
            color="w" if light else "0.2",
            fontsize="small",
        )
    single = result.sizes["layer"] == 1
    ax.set_yticks(
        range(len(lines)), [WORDS[s] if single else f"{i}: {WORDS[s]}" for i, s in lines], fontsize=style.dense("y")
    )
    ax.set_xticks(range(len(roles)), roles, fontsize=style.dense("x"))
    ax.set_xlabel("token at which the clean run is put back")
    for edge in np.arange(len(sites), len(lines), len(sites)):
        ax.axhline(edge - 0.5, color="k", lw=0.8)
    ax.figure.colorbar(image, ax=ax, label="share that comes back")


def _bars(result: xr.Dataset, ax: "Axes", layer: int) -> None:
    roles, one = result["role"].values.tolist(), result.sel(layer=layer)
    drawn = [("mixer_in", "recovered", LTI, "mixer input (before conv)"),
             ("scan", "recovered", REAL, "scan input (after conv)"),
             ("scan", "null_recovered", NULL, "scan input, another row")]  # fmt: skip
    if "twin_recovered" in result:
        drawn.append(("scan", "twin_recovered", "0.8", "scan input, untrained twin"))
    drawn = [each for each in drawn if each[0] in result["site"].values]
    width = 0.8 / len(drawn)
    for i, (site, name, colour, label) in enumerate(drawn):
        entry = one.sel(site=site)
        value, low, high = (entry[f"{name}{end}"].values for end in ("", "_low", "_high"))
        x = np.arange(len(roles)) + (i - (len(drawn) - 1) / 2) * width
        ax.bar(x, np.nan_to_num(value), width, color=colour, label=label)
        ax.vlines(x, low, high, color="0.2", lw=1)
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xticks(range(len(roles)), roles)
    ax.set_ylabel("share of the answer\nthat comes back")
    ax.set_xlabel(f"token at which the clean run is put back in layer {layer}")
    ax.set_ylim(top=1.45)
    ax.set_yticks(np.arange(np.ceil(ax.get_ylim()[0] / 0.25) * 0.25, 1.01, 0.25))
    ax.legend(loc="upper left", ncols=2, columnspacing=1.0, handlelength=1.2)
    style.frame(ax)
