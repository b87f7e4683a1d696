"""Trace in, state dynamics out: validation, nulls, a baseline measured alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import Canonical, described, refuse
from mamba_probe.analyses.state_dynamics.asked import Asked, Splits
from mamba_probe.analyses.state_dynamics.rows import Rows
from mamba_probe.analyses.state_dynamics.summary import summaries
from mamba_probe.analyses.state_dynamics.words import attributes, coordinates, entry

__all__ = ["measure"]

TOLERANCE = 1e-5
"""Above the rounding of fp32 recordings, whose B and C are off by 1e-6 of the largest."""
SATURATION = 1e-3
"""What a share of a write or of a state must fall below to count as nothing."""


def measure(
    trace: xr.Dataset, *, every: int | None = None, at: Splits = None, heads: Sequence[int] | np.ndarray | None = None,
    tolerance: float = TOLERANCE, saturation: float = SATURATION, loss: xr.Dataset | None = None,
    n_bootstrap: int = 200, seed: int = 0, weights: object = None, interventions: object = None,
    baseline: xr.Dataset | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure how fast each layer forgets, how its state grows along the context, and how much of it is used.

    $$\lambda = \overline{A \Delta_t}, \qquad t_{1/2} = \frac{\ln 2}{|A| \overline{\Delta}}, \qquad
    \mathrm{ESS}_i = e^{-\sum_k p_k \ln p_k}, \quad p = \sigma(T_{i:,:i}) / \textstyle\sum \sigma$$

    T[t, s] is the weight of source s in the scan's output at t, selection as executed. Sources: effective state size,
    arXiv 2504.19561; state statistics every 128 tokens, arXiv 2410.07145; factors, growth, saturation and nulls: ours.
    Cost: linear in tokens, one (layer, row, block of heads) at a time.

    Args:
        trace: delta, A, B and C, with `valid` and `position`; with h or x the states are measured too (h as recorded,
            else computed), and with x their null.
        every: tokens from one sample of the state to the next: after tokens every - 1, 2 every - 1, ..; default: 128,
            or a 16th of the shortest row where that is fewer.
        at: positions i among a row's valid tokens, (query_token,) or (batch, query_token): what the tokens from i on
            read of those before; default: the middle of each row.
        heads: labels of the channels or heads whose effective size is taken; default: 8, evenly spread.
        tolerance: of `ess_rank`, relative to max |C_t| max delta_s |B_s| over the block.
        saturation: eps of closed, held and erased.
        loss: `loss` (batch, token) in nats, NaN where a token has none.
        n_bootstrap: replicates of the 95 % intervals over rows; NaN with one row.
        seed: of the replicates and the shuffles.
        weights: not used; refused.
        interventions: not used; refused.
        baseline: the trace of an untrained twin, of the same layers and heads: measured alike, `baseline_layer_*`.

    Returns:
        lyapunov (1/token), half_life (tokens) by layer, head and decay. state_mean, state_variance, state_rms by layer,
        sample_token and head, mean over rows; growth and null_order_growth by head. ess_entropy, ess_rank by layer,
        row, query_token and sized head, with null_lti_ and null_shuffle_. closed_share, held_share, erased_share by
        head, with null_lti_. layer_*: the same by layer, `_low`, `_high` (quantiles .1, .5, .9 over heads and states
        of lyapunov, half_life and growth), layer_rms by sample_token, and layer_ess_share, of the number of states.
        loss_by_position; loss_trend and null_shuffle_loss_trend, within rows. half_life is at the mean step: no
        write is followed, and what is beyond attrs["longest"] tokens was not seen.

    Raises:
        ValueError: a variable is missing, tokens have gaps or do not begin with the first, a split, head, number or
            loss that cannot be, or a baseline of other layers or heads.

    >>> one = np.ones((1, 1, 8, 1), "float32")
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), one / 2),
    ...      "x": (("layer", "batch", "token", "channel"), one),
    ...      "B": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "C": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -1.0, "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 8), bool)),
    ...      "position": (("batch", "token"), np.arange(8)[None])},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> result = measure(trace, every=1)
    >>> result["lyapunov"].item(), round(result["half_life"].item(), 3), result["ess_entropy"].item()
    (-0.5, 1.386, 1.0)
    """
    refuse("state_dynamics", weights=weights, interventions=interventions)
    view = Canonical(trace, "delta", "A", "B", "C")
    asked = Asked.of(view, every, at, heads, tolerance, saturation, loss, n_bootstrap, seed)
    rows = Rows(view, asked).measured()
    entries = {name: entry(name, values, view.head_dim) for name, values in summaries(view, rows).items()}
    result = described(entries, coordinates(view, rows), attributes(view, rows))
    if baseline is None:
        return result
    settings: dict[str, Any] = {"every": every, "heads": heads, "tolerance": tolerance, "saturation": saturation}
    return _beside(result, baseline, view, settings | {"n_bootstrap": n_bootstrap, "seed": seed})


def _beside(result: xr.Dataset, baseline: xr.Dataset, view: Canonical, settings: dict[str, Any]) -> xr.Dataset:
    """The result with the layers of the baseline, split where the rows of the trace are."""
    other = Canonical(baseline, "delta", "A", "B", "C")
    ours, theirs = (
        (one.trace.attrs["family"], one.layers.tolist(), one.heads.tolist(), one.n_states) for one in (view, other)
    )
    if ours != theirs:
        raise ValueError(
            f"baseline needs the trace's family, layers, heads and states: {_sizes(view)}; got {_sizes(other)}"
        )
    if not np.array_equal(view.valid, other.valid):
        raise ValueError("baseline needs the trace's rows and tokens: their `valid` differ; record it on the same task")
    found = measure(baseline, at=result["query_position"].values, **settings)
    layers = {f"baseline_{name}": found[name] for name in found.data_vars if str(name).startswith("layer_")}
    entries = {name: entry(name, of.values, view.head_dim) for name, of in layers.items()}
    more = described(entries, {}, {})
    return result.assign(more.data_vars).assign_attrs(baseline=str(found.attrs["model"]))


def _sizes(view: Canonical) -> str:
    return (
        f"{view.trace.attrs['family']}, layers {view.layers.tolist()}, {view.n_heads} {view.head_dim}s, "
        f"{view.n_states} decays"
    )
