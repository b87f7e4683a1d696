"""The map of Ali et al.: every query of a small window against every source in it."""

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.common import Canonical, described
from mamba_probe.analyses.hidden_attention import core
from mamba_probe.analyses.hidden_attention.plan import Plan, check_causal, rules
from mamba_probe.analyses.hidden_attention.stream import KINDS, blocks, subset
from mamba_probe.analyses.hidden_attention.words import AGGREGATE_WORDS

__all__ = ["MAP_TOKENS", "map"]

MAP_TOKENS = 1024
"""Longest window of a map, whose cost and size grow with its square."""


def map(
    trace: xr.Dataset, *, layer: int | None = None, row: int = 0, head: int | None = None,
    aggregate: str = "signed_mean", normalise: str = "raw", window: tuple[int, int] | None = None, seed: int = 0,
) -> xr.Dataset:  # fmt: skip
    """Measure alpha for all pairs of tokens of a window, in one layer and row: the hidden attention map.

    Source: Ali et al. 2024, arXiv 2403.01590. Sources before the window are read too, and not shown.

    Args:
        trace: delta, A, B and C, with `valid` and `position`.
        layer: the model's number of the layer; may be left out where the trace has one.
        row: index on the batch axis.
        head: one channel or head, by label; default: all, aggregated.
        aggregate: "signed_mean", "mean_absolute" or "l2"; with `head` it joins one row and is refused unless default.
        normalise: "raw" or "absolute_share", as in `measure`; a share is of the whole row, not of the window.
        window: first position and the one after the last; default: the whole row.
        seed: of the shuffle of delta in `null_shuffle_alpha`.

    Returns:
        alpha, null_lti_alpha and null_shuffle_alpha (query_token, token), by position; 0 after the query.

    Raises:
        ValueError: a window above 1,024 tokens or outside the row, an unknown layer, row, head or rule.

    >>> one = np.ones((1, 1, 3, 1), "float32")
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), one),
    ...      "B": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "C": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -np.log(2), "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 3), bool)),
    ...      "position": (("batch", "token"), np.arange(3)[None])},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> map(trace)["alpha"].values.round(6).tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """
    rules(aggregate, normalise)
    if aggregate == "none" or (head is not None and aggregate != "signed_mean"):
        raise ValueError(f"a map is of one `head`, or of all heads by an aggregate; got {head=}, {aggregate=}")
    chosen = _layer(trace, layer)
    view = Canonical(subset(chosen, None if head is None else [head]), "delta", "A", "B", "C")
    first, end = _window(view, row, window)
    plan = Plan(np.arange(first, end)[None], np.arange(first, end), aggregate, normalise, seed)
    found = _square(view, row, plan)
    entries = {
        name: (("query_token", "token"), values, "weight of a source at a query; 0 after the query", "1")
        for name, values in found.items()
    }
    attrs = {
        "analysis": "hidden_attention.map",
        "model": str(trace.attrs.get("model", "unnamed model")),
        "layer": str(view.layers[0]),
        "row": str(row),
        "aggregation": AGGREGATE_WORDS[aggregate].format(view.head_dim) if head is None else f"{view.head_dim} {head}",
        "normalise": normalise,
        "null": "null_lti_alpha: delta, B and C frozen to means over the row; null_shuffle_alpha: delta shuffled",
        "seed": str(seed),
    }
    return described(entries, {"query_token": plan.label, "token": plan.label}, attrs)


def _layer(trace: xr.Dataset, layer: int | None) -> xr.Dataset:
    known = trace["layer"].values.tolist()
    if layer is None and len(known) > 1:
        raise ValueError(f"layer is needed: the trace holds {known}")
    if layer is not None and layer not in known:
        raise ValueError(f"layer {layer} is not in the trace, which holds {known}")
    return trace.sel(layer=[known[0] if layer is None else layer])


def _window(view: Canonical, row: int, window: tuple[int, int] | None) -> tuple[int, int]:
    if not 0 <= row < view.n_rows:
        raise ValueError(f"row must be 0 to {view.n_rows - 1} on the batch axis; got {row}")
    check_causal(view, row)
    n_tokens = len(view.positions(row))
    first, end = (0, n_tokens) if window is None else window
    if not 0 <= first < end <= n_tokens:
        raise ValueError(f"window must be (first, end) with 0 <= first < end <= {n_tokens}; got {window}")
    if end - first > MAP_TOKENS:
        raise ValueError(
            f"a map of {end - first} x {end - first} tokens is above the limit of {MAP_TOKENS} x {MAP_TOKENS}: give a "
            "shorter window=(first, end), or measure rows of chosen query_tokens"
        )
    return first, end


def _square(view: Canonical, row: int, plan: Plan) -> dict[str, Float[np.ndarray, "query_token token"]]:
    queries = plan.label.tolist()
    totals = {(kind, at): core.Total(plan.aggregate) for kind in KINDS for at in queries}
    for block in blocks(view, 0, row, queries, plan.seed):
        for (kind, at), total in totals.items():
            total.add(core.normalised(block.alpha(kind, at), plan.normalise)[queries[0] :])
    found = {}
    for kind in KINDS:
        square = np.zeros((len(queries), len(queries)))
        for i, at in enumerate(queries):
            square[i, : i + 1] = totals[kind, at].row()
        found["alpha" if kind == "executed" else f"{kind}_alpha"] = square
    return found
