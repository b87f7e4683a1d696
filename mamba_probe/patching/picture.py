"""The picture of a sweep or an attribution: layer by token, or quantity by token where there is one layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.trace.contract import unknown_name
from mamba_probe.visible import literal

__all__ = ["plot"]

TICKS = 48
"""Tokens whose labels stand side by side; of more, every second, third, ..."""


@style.names_as_they_are
def plot(
    result: xr.Dataset, quantity: str | None = None, row: int | None = None, ax: Any = None, *,
    token_text: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """Draw what is recovered: 0 (white) is the base's answer, 1 the source's; grey where it is not defined.

    Args:
        result: of `sweep` or `attribute`.
        quantity: one to draw; None is all: of several layers, one panel each; of one layer, one line each.
        row: index of one row; None is the mean over rows in which it is defined.
        ax: matplotlib Axes of a single panel; new ones by default.
        token_text: a text for each token on the axis; None: the result's `token_text` where a single row is drawn and
            has it, else the tokens' numbers.

    Returns:
        The Axes, an array of them where there are several panels.

    Raises:
        ValueError: no result of patching, an unknown quantity or row, `ax` for several panels, texts of another number.

    >>> plot(xr.Dataset())
    Traceback (most recent call last):
    ValueError: patching.plot draws what patching.sweep or patching.attribute returned; got Dataset
    """
    shown, rows = _shown(result, quantity, row)
    texts = _texts(result, row, token_text)
    one_layer = shown.sizes["layer"] == 1
    if one_layer:
        panels = [("", shown.isel(layer=0).values, shown["quantity"].values.tolist())]
    else:
        labels = shown["layer"].values.tolist()
        panels = [(name, shown.sel(quantity=name).values, labels) for name in shown["quantity"].values]
    axes = _axes(ax, panels, len(texts))
    largest = float(np.nanmax(np.abs(shown.values), initial=0.0)) or 1.0
    for each, (name, values, labels) in zip(axes, panels, strict=True):
        image = _panel(each, values, labels, largest)
        each.set_ylabel(f"{name}\nlayer".strip() if not one_layer else "")
    axes[-1].set_xticks(*_ticks(texts), rotation=90 if max(map(len, texts)) > 2 else 0)
    axes[-1].set_xlabel("token")
    style.title(axes[0], _title(result, shown, rows, row))
    bar = axes[0].figure.colorbar(image, ax=list(axes), pad=0.01)
    bar.set_label("share of (source - base)")
    return axes[0] if len(axes) == 1 else np.array(axes)


def _shown(result: xr.Dataset, quantity: str | None, row: int | None) -> tuple[xr.DataArray, int]:
    """recovered (quantity, layer, token), and the rows it is the mean of."""
    if getattr(result, "attrs", {}).get("analysis") != "patching":
        raise ValueError(
            f"patching.plot draws what patching.sweep or patching.attribute returned; got {type(result).__name__}"
        )
    known = result["quantity"].values.tolist()
    if quantity is not None and quantity not in known:
        raise unknown_name("quantity", quantity, known)
    if row is not None and not 0 <= row < result.sizes["batch"]:
        raise ValueError(f"row is an index, 0 .. {result.sizes['batch'] - 1}; got {row!r}")
    found = result["recovered"].sel(quantity=known if quantity is None else [quantity])
    found = found if row is None else found.isel(batch=[row])
    defined = (result["base"] != result["source"]).values
    n_rows = int(defined.sum() if row is None else defined[row])
    return found.mean("batch").transpose("quantity", "layer", "token"), n_rows


def _texts(result: xr.Dataset, row: int | None, given: Sequence[str] | None) -> list[str]:
    n_tokens = result.sizes["token"]
    if given is not None:
        if isinstance(given, str) or len(given) != n_tokens:
            raise ValueError(f"token_text is a text for each of the {n_tokens} tokens of the result; got {given!r}")
        return [literal(f"{text}") for text in given]
    single = 0 if result.sizes["batch"] == 1 else row
    if "token_text" in result.coords and single is not None:
        return [str(text) for text in result["token_text"].isel(batch=single).values]
    return [str(token) for token in result["token"].values]


def _axes(ax: Any, panels: Sequence[Any], n_tokens: int) -> list[Any]:
    if ax is not None:
        if len(panels) > 1:
            raise ValueError(f"ax has place for one quantity; the result holds {len(panels)}: pass quantity=...")
        return [ax]
    import matplotlib.pyplot as plt

    lines = sum(len(labels) for _, _, labels in panels)
    size = (min(14.0, 3.0 + 0.2 * n_tokens), min(18.0, 1.4 + 0.3 * len(panels) + (0.3 if lines < 12 else 0.12) * lines))
    made = plt.subplots(len(panels), figsize=style.size(*size), sharex=True, squeeze=False, layout="constrained")
    return list(made[1][:, 0])


def _panel(ax: Any, values: np.ndarray, labels: Sequence[Any], largest: float) -> Any:
    """A heat map whose first line is the lowest where lines are layers: depth goes up."""
    ax.set_facecolor("0.8")
    deep = not isinstance(labels[0], str)
    image = ax.imshow(
        values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest",
        origin="lower" if deep else "upper",
    )  # fmt: skip
    step = max(1, -(-len(labels) // 12))
    ax.set_yticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
    return image


def _ticks(texts: list[str]) -> tuple[list[int], list[str]]:
    step = max(1, -(-len(texts) // TICKS))
    return list(range(0, len(texts), step)), texts[::step]


def _title(result: xr.Dataset, shown: xr.DataArray, rows: int, row: int | None) -> str:
    how = "exact" if "patched" in result else "first order"
    mean = f"mean over {rows} row{'s' * (rows != 1)}" if rows else "no row in which base and source differ"
    which = mean if row is None else f"row {row}"
    layer = f", layer {shown['layer'].item()}" if shown.sizes["layer"] == 1 else ""
    return f"{result.attrs['metric']} recovered ({how}), {which}{layer}"
