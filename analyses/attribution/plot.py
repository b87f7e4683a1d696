"""Relevance of one row's tokens, shares by class, depth, and perturbation curves."""

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KINDS", "plot"]

KINDS = ("classes", "tokens", "curve", "depth")
DIVERGING = "PuOr_r"
"""Orange above 0, purple below, white at 0: told apart by the colour-blind."""
MOST_TOKENS = 80
"""Tokens of one picture: the last of the row up to the query."""
LABELLED = 32
"""Tokens up to which each has its id below."""

LETTERS = {"key": "k", "value": "v", "query": "q", "kept": "!", "marker": "m"}
"""Of what a token is there for; the pair that is asked for in green."""

_NAMES = {"mambalrp": "MambaLRP", "gradient": "gradient x input", "random": "random order"}
_SERIES = {"": style.REAL, "gradient_": style.LTI, "other_": style.NULL, "baseline_": "#CC79A7"}
_WORDS = {"other_": "of another id (null)", "baseline_": "untrained twin (null)"}


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "classes", row: int = 0, query: int = 0) -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `classes`: mean share of the positive relevance on each class of tokens, with intervals, beside gradient x input and
    the nulls that were given; a tick marks chance. `tokens`: the tokens of one row up to a query, coloured by signed
    relevance in units of the row's largest, a line for each rule. `curve`: the target's probability while tokens are
    taken away, by order. `depth`: share of |relevance| at the query's own token before each block.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: "classes", "tokens", "curve" or "depth".
        row, query: indices, for "tokens".

    Raises:
        ValueError: another kind, a row or query that is not there, no perturbation for "curve", or a result of
            something else.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('classes', 'tokens', 'curve', 'depth'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "attribution")
    if kind == "curve" and "area" not in result:
        raise ValueError('kind "curve" needs measure(..., perturbation=probe.perturbed(...))')
    if kind == "tokens":
        _check_place(result, row, query)
        return _tokens(result.isel(batch=row, query=query), style.axes(ax))
    return {"classes": _classes, "curve": _curve, "depth": _depth}[kind](result, style.axes(ax))


def _check_place(result: xr.Dataset, row: int, query: int) -> None:
    for name, dim, index in (("row", "batch", row), ("query", "query", query)):
        if not 0 <= index < result.sizes[dim]:
            raise ValueError(f"{name} must be 0 to {result.sizes[dim] - 1}; got {index}")
    if result["query_token"].values[row, query] < 0:
        raise ValueError(f"row {row} has no query {query}")


def _label(prefix: str, result: xr.Dataset) -> str:
    if prefix in _WORDS:
        return _WORDS[prefix]
    return _NAMES["gradient" if prefix else result.attrs["rules"]]


def _classes(result: xr.Dataset, ax: "Axes") -> "Axes":
    shown = [prefix for prefix in _SERIES if f"mean_{prefix}class_share" in result]
    kinds, width = result["token_class"].values, 0.8 / len(shown)
    for index, prefix in enumerate(shown):
        name, x = f"mean_{prefix}class_share", np.arange(len(kinds)) - 0.4 + width * (index + 0.5)
        mean, ends = result[name].values, [result[f"{name}_{end}"].values for end in ("low", "high")]
        ax.bar(x, mean, 0.9 * width, color=_SERIES[prefix], label=_label(prefix, result))
        if np.isfinite(ends).all():
            ax.vlines(x, ends[0], ends[1], color="black", lw=1)
    ax.hlines(result["chance"].values, np.arange(len(kinds)) - 0.4, np.arange(len(kinds)) + 0.4, color="black",
              ls=":", lw=1.2, label="chance")  # fmt: skip
    ax.set_xticks(range(len(kinds)), [str(kind).replace(" ", "\n", 1) for kind in kinds], fontsize=style.dense("x"))
    ax.set_ylabel("share of positive relevance\n" + _bar(result))
    ax.set_ylim(0, None)
    style.frame(ax)
    style.legend_outside(ax)
    return ax


def _bar(result: xr.Dataset) -> str:
    return "bar 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"


def _tokens(one: xr.Dataset, ax: "Axes") -> "Axes":
    at = int(one["query_token"])
    token = np.flatnonzero(one["valid"].values & (np.arange(one.sizes["token"]) <= at))[-MOST_TOKENS:]
    names = [name for name in ("relevance", "gradient_relevance") if name in one]
    values = np.stack([one[name].values[token] for name in names])
    scaled = values / np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(float).tiny)
    drawn = ax.imshow(scaled, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
    rules = [one.attrs["rules"], "gradient"][: len(names)]
    ax.set_yticks(range(len(names)), [_NAMES[rule].replace(" x ", "\nx ") for rule in rules])
    ax.set_xticks(np.arange(len(token) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="0.8", lw=0.6)
    ax.tick_params(which="minor", length=0)
    _token_axis(one, ax, token)
    ax.figure.colorbar(drawn, ax=ax, label="relevance / largest", ticks=[-1, 0, 1], fraction=0.03, pad=0.01)
    return ax


def _token_axis(one: xr.Dataset, ax: "Axes", token: np.ndarray) -> None:
    """Ids below, where they are few, and what each is there for above."""
    ids = one["token_id"].values[token]
    if len(token) <= LABELLED:
        ax.set_xticks(range(len(token)), [str(each) for each in ids], fontsize=style.dense("x"), rotation=90)
        ax.set_xlabel(f"token id, the last the query; explained: the logit of {int(one['target_id'])}")
    else:
        step = -(-len(token) // 12)
        ax.set_xticks(range(0, len(token), step), [str(each) for each in token[::step]])
        ax.set_xlabel(f"token, the last the query; explained: the logit of id {int(one['target_id'])}")
    if "role" in one.coords:
        source = int(one["source_token"].values[int(one["query_token"])])
        for place, (at, role) in enumerate(zip(token, one["role"].values[token], strict=True)):
            asked = at == source or (at == source - 1 and role == "key")
            look: dict[str, Any] = {"color": "#009E73", "weight": "bold"} if asked else {"color": "0.5"}
            ax.text(place, -0.54, LETTERS.get(str(role), ""), ha="center", va="bottom", fontsize="small", **look)


def _curve(result: xr.Dataset, ax: "Axes") -> "Axes":
    look = {"mambalrp": (style.REAL, "-"), "gradient": (style.LTI, "--"), "random": (style.NULL, "-.")}
    x = np.arange(result.sizes["count"])
    for order in result["order"].values:
        colour, line = look[str(order)]
        one = result.sel(order=order)
        ax.fill_between(x, one["probability_low"].values, one["probability_high"].values, color=colour, alpha=0.2, lw=0)
        label = f"{_NAMES[str(order)]}: {float(one['area']):.3g} on average"
        ax.plot(x, one["probability"].values, color=colour, ls=line, marker="o", ms=3, label=label)
    ax.set_xticks(x, [str(count) for count in result["count"].values])
    ax.set_xlabel("tokens taken away, the most relevant first")
    band = "band 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
    ax.set_ylabel(f"probability of the target\n{band}")
    ax.set_ylim(0, 1)
    style.frame(ax)
    style.legend_outside(ax)
    return ax


def _depth(result: xr.Dataset, ax: "Axes") -> "Axes":
    for prefix in _SERIES:
        name = f"mean_{prefix}own_share"
        if name in result:
            x = np.arange(result.sizes["layer"])
            low, high = (result[f"{name}_{end}"].values for end in ("low", "high"))
            ax.fill_between(x, low, high, color=_SERIES[prefix], alpha=0.2, lw=0)
            ax.plot(x, result[name].values, color=_SERIES[prefix], marker="o", ms=4, label=_label(prefix, result))
    style.layer_axis(ax, result["layer"].values)
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of |relevance| at the query's\nown token, before the block")
    style.legend_outside(ax)
    return ax
