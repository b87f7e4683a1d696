"""Trace in, rows of hidden attention and their summaries out: validation, nulls and intervals."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import Canonical, by_layer, described, refuse, stacked
from mamba_probe.analyses.hidden_attention import core
from mamba_probe.analyses.hidden_attention.identity import TOLERANCE, Identity
from mamba_probe.analyses.hidden_attention.plan import Plan, Queries, queries, rules
from mamba_probe.analyses.hidden_attention.stream import KINDS, blocks, subset
from mamba_probe.analyses.hidden_attention.summary import summaries, units
from mamba_probe.analyses.hidden_attention.words import attributes, coordinates, entry

__all__ = ["measure"]

RESULT_BYTES = 2**30
"""Most bytes that one result may hold while it is made."""


def measure(
    trace: xr.Dataset, *, query_tokens: Queries = None, aggregate: str = "signed_mean", normalise: str = "raw",
    heads: Sequence[int] | np.ndarray | None = None, tolerance: float = TOLERANCE, n_bootstrap: int = 200,
    seed: int = 0, weights: xr.Dataset | None = None, interventions: object = None, baseline: object = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure what a query's scan output reads from each earlier token, selection frozen at what was executed.

    $$\alpha_t[s] = \sum_n C_t[n] \, e^{A_n \mathrm{Cum}(s,t)} \, \Delta_s B_s[n], \qquad \alpha \cdot x + D x_t = y_t$$

    by channel (Mamba-1, S4D) or head (Mamba-2); with zoh the write is phi1(delta A) delta B. Source: Ali et al. 2024,
    arXiv 2403.01590; the statistics and nulls: ours. Negative weights keep their sign. Two nulls, measured alike:
    `null_lti_`, the layer with delta, B and C frozen to their means over the row, and `null_shuffle_`, with delta
    shuffled in time. Cost: O(token head state) a query, one block of heads at a time.

    Args:
        trace: delta, A, B and C, with `valid` and `position`; with x and y the sum identity is asserted.
        query_tokens: positions among a row's valid tokens: (query_token,) for every row, or (batch, query_token) one
            set a row; default: the last valid token of each.
        aggregate: how the rows of the heads become one: "signed_mean" (signs cancel), "mean_absolute", "l2" (square
            root of the sum of squares), or "none": a row for each of `heads`.
        normalise: "raw", or "absolute_share": each head's row over its sum of |alpha|, before it is aggregated.
        heads: labels of the channels or heads to take; default: all.
        tolerance: largest error of the identity, in units of the largest sum of |terms| over heads.
        n_bootstrap: replicates of the 95 % intervals, over rows; with one row over 8 blocks of consecutive queries;
            NaN with one row and fewer than 8 queries.
        seed: of the replicates and of the shuffle.
        weights: `probe.weights()`: D, for the identity.
        interventions: not used; refused.
        baseline: not used; refused: the nulls come from the trace.

    Returns:
        alpha (layer, batch, query_token, [channel or head,] token) in the trace's tokens: 0 after the query, NaN at
        padding, and null_lti_alpha, null_shuffle_alpha. By head: entropy (nats), first_share (sink), mean_distance
        (mass horizon), negative_share, top_share, top_source (position) of each row. aggregate_*: of the aggregated
        row; head_*: means over rows and queries; layer_*: means over heads too, with intervals and nulls;
        layer_by_lag: mean |alpha| by lag. identity_error: NaN where it could not be measured; attrs say why.

    Raises:
        ValueError: a missing variable, tokens with gaps, a query that a row lacks, an unknown rule or head, a result
            above 1 GiB, weights of another model, or the identity fails: where, and by how much.

    >>> one = np.ones((1, 1, 3, 1), "float32")
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), one),
    ...      "B": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "C": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -np.log(2), "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 3), bool)),
    ...      "position": (("batch", "token"), np.arange(3)[None])},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> measure(trace)["alpha"].values.ravel().round(6).tolist()
    [0.25, 0.5, 1.0]
    """
    refuse("hidden_attention", interventions=interventions, baseline=baseline)
    rules(aggregate, normalise)
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")
    view = Canonical(subset(trace, heads), "delta", "A", "B", "C")
    at, label = queries(view, query_tokens)
    plan = Plan(at, label, aggregate, normalise, seed)
    _check_size(view, plan)
    identity = Identity.of(view, weights, tolerance)
    found = stacked(by_layer([view.trace], lambda layer: _Rows(view, plan, identity, layer).measured()))
    identity.check(found["identity_error"], view, plan.at)
    unit, n_units = units(plan.at)
    found |= summaries(found, plan.at, unit, n_units, n_bootstrap, seed)
    return described(
        {name: entry(name, found[name], view.head_dim) for name in sorted(found)},
        coordinates(view, plan, core.lag_bins(int(at.max()) + 1)),
        attributes(view, plan, identity, n_units, n_bootstrap),
    )


def _check_size(view: Canonical, plan: Plan) -> None:
    wide = view.n_heads if plan.aggregate == "none" else 1
    each = wide * view.trace.sizes["token"] + view.n_heads * len(core.STATISTICS)
    size = 8 * len(KINDS) * view.n_layers * plan.at.size * each
    if size > RESULT_BYTES:
        raise ValueError(
            f"rows of {plan.at.size} queries in {view.n_layers} layers, aggregate {plan.aggregate!r}, and statistics "
            f"of {view.n_heads} heads would take {size / 2**30:.1f} GiB, above {RESULT_BYTES // 2**30}: ask for fewer "
            "query_tokens, layers (trace.sel) or heads"
        )


class _Rows:
    """Everything of a layer by (batch, query_token), filled one block of heads at a time."""

    def __init__(self, view: Canonical, plan: Plan, identity: Identity, layer: int):
        self.view, self.plan, self.identity, self.layer = view, plan, identity, layer
        self.bins = core.lag_bins(int(plan.at.max()) + 1)
        self.found: dict[str, np.ndarray] = {"identity_error": np.zeros(plan.at.shape)}
        wide = (view.n_heads,) if plan.aggregate == "none" else ()
        for prefix in ("", *(f"{kind}_" for kind in KINDS[1:])):
            self._blank(f"{prefix}alpha", *wide, view.trace.sizes["token"])
            self._blank(f"{prefix}lag_total", len(self.bins))
            self._blank(f"{prefix}lag_count", len(self.bins))
            for name in core.STATISTICS:
                self._blank(f"{prefix}{name}", view.n_heads)

    def _blank(self, name: str, *shape: int) -> None:
        self.found[name] = np.full((*self.plan.at.shape, *shape), np.nan)

    def measured(self) -> dict[str, np.ndarray]:
        for row in range(self.view.n_rows):
            self._prompt(row)
        return self.found

    def _prompt(self, row: int) -> None:
        at = self.plan.at[row].tolist()
        totals = {(kind, query): core.Total(self.plan.aggregate) for kind in KINDS for query in range(len(at))}
        sums = {key: np.zeros((2, len(self.bins))) for key in totals}
        scale = np.zeros((len(at), 2))
        for block in blocks(self.view, self.layer, row, at, self.plan.seed, self.identity.names):
            for kind, query in totals:
                alpha = block.alpha(kind, at[query])
                if kind == "executed":
                    parts = self.identity.parts(self.layer, block, at[query], alpha)
                    scale[query] = np.maximum(scale[query], parts)
                self._statistics(kind, (row, query), block.heads, alpha)
                alpha = core.normalised(alpha, self.plan.normalise)
                totals[kind, query].add(alpha)
                sums[kind, query] += np.stack(core.by_lag(alpha, self.bins))
        for (kind, query), total in totals.items():
            self._keep(kind, (row, query), total.row(), sums[kind, query])
        self.found["identity_error"][row] = scale[:, 0] / np.where(scale[:, 1] == 0, 1.0, scale[:, 1])

    def _statistics(self, kind: str, place: tuple[int, int], heads: slice, alpha: np.ndarray) -> None:
        for name, values in core.statistics(alpha).items():
            self.found[_named(kind, name)][(*place, heads)] = values

    def _keep(self, kind: str, place: tuple[int, int], row: np.ndarray, by_lag: np.ndarray) -> None:
        """Write a row among the trace's tokens: 0 after the query, NaN at padding."""
        token = np.flatnonzero(self.view.valid[place[0]])
        target = self.found[_named(kind, "alpha")][place]
        target[..., token] = 0.0
        target[..., token[: row.shape[-1]]] = row
        self.found[_named(kind, "lag_total")][place], self.found[_named(kind, "lag_count")][place] = by_lag


def _named(kind: str, name: str) -> str:
    return name if kind == "executed" else f"{kind}_{name}"
