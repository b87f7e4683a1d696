"""How long a token's mixer input keeps moving the output, selection moving with it: from `probe.jacobian`.

    H_J(s) = min{k >= 1 : |d out_t / d u_s| <= level max_t |d out_t / d u_s| for all recorded t >= s + k}

It includes every path from the token to later outputs: the convolution, delta, B, C, the state, and the gate.
Definition: ours.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.memory_horizon import core
from mamba_probe.analyses.memory_horizon.options import QUANTILES
from mamba_probe.analyses.memory_horizon.path import TIE

__all__ = ["checked", "falls_for_good", "measure_sources"]


def checked(view: Canonical, jacobian: xr.Dataset | Sequence[xr.Dataset] | None) -> dict[int, xr.Dataset]:
    """The Jacobians by place of their layer in the trace.

    Raises:
        ValueError: not what `probe.jacobian(source_tokens=...)` returns, of another model, layer or prompt than the
            trace, two of one layer, or of different source tokens.
    """
    given = [jacobian] if isinstance(jacobian, xr.Dataset) else list(jacobian or ())
    placed: dict[int, xr.Dataset] = {}
    for one in given:
        if not isinstance(one, xr.Dataset) or "source_token" not in one.dims or "jacobian" not in one:
            raise ValueError(
                "jacobian takes what probe.jacobian(..., source_tokens=[...]) returned, or a list of them, one a "
                f"layer; got {_what(one)}"
            )
        layer = int(one.attrs["layer"])
        if layer not in view.layers:
            raise ValueError(f"jacobian is of layer {layer}; the trace has layers {view.layers.tolist()}")
        if one.attrs.get("model_hash") != view.trace.attrs.get("model_hash", one.attrs.get("model_hash")):
            raise ValueError("jacobian is of another model than the trace: their model_hash differ")
        position = np.where(one["valid"].values, one["position"].values, -1)
        if not np.array_equal(position, np.where(view.valid, view.position, -1)):
            raise ValueError("jacobian is of other prompts than the trace: valid tokens or positions differ")
        place = view.layers.tolist().index(layer)
        if place in placed:
            raise ValueError(f"jacobian holds layer {layer} twice")
        placed[place] = one
    tokens = {tuple(one["source_token"].values.tolist()) for one in given}
    if len(tokens) > 1:
        raise ValueError(f"every jacobian needs the same source_token; got {sorted(tokens)}")
    return placed


def _what(given: object) -> str:
    return f"a Dataset over {tuple(given.dims)}" if isinstance(given, xr.Dataset) else type(given).__name__


def falls_for_good(size: Float[np.ndarray, " token"], level: float) -> tuple[float, bool]:
    """Steps from the first entry until all that follow are at most `level` times the peak, and whether it is censored.

    Censored: the last entry is still above, and the steps are the least there can be. NaN where all is 0.

    >>> falls_for_good(np.array([1.0, 4.0, 1.0, 3.0, 1.0]), 0.5)
    (4.0, False)
    """
    peak = size.max()
    if peak == 0:
        return np.nan, False
    above = np.flatnonzero(size > level * peak * (1 + TIE))
    return float(max(1, above[-1] + 1)), bool(above[-1] == len(size) - 1)


def measure_sources(
    view: Canonical, jacobian: xr.Dataset | None, tokens: list[int], level: float
) -> dict[str, np.ndarray]:
    """Jacobian horizons (batch, source_token) of the layer that `view` holds; quantiles over states of the frozen."""
    shape = (view.n_rows, len(tokens))
    found = {name: np.full(shape, np.nan) for name in ("jacobian_horizon", "jacobian_horizon_at_least")}
    frozen = {name: np.full((*shape, len(QUANTILES)), np.nan) for name in _FROZEN}
    if jacobian is None:
        return found | frozen
    threshold = core.reach(level, view.decay(0))
    size = jacobian["jacobian"].transpose("batch", "source_token", "token").values
    for row in range(view.n_rows):
        steps = view.row(0, row)
        for i, token in enumerate(tokens):
            at = steps.index(token)
            least, censored = falls_for_good(size[row, i, view.valid[row]][at:], level)
            found["jacobian_horizon_at_least"][row, i] = least
            found["jacobian_horizon"][row, i] = np.inf if censored else least
            pooled, over = _frozen(steps.cumulative[at:], threshold)
            at_ends = np.where(over, np.inf, pooled), pooled
            for name, horizons in zip(_FROZEN, at_ends, strict=True):
                frozen[name][row, i] = np.quantile(horizons, QUANTILES, method="inverted_cdf")
    return found | frozen


_FROZEN = ("source_forward_horizon", "source_forward_horizon_at_least")


def _frozen(
    cumulative: Float[np.ndarray, "token head"], threshold: Float[np.ndarray, "head state"]
) -> tuple[Float[np.ndarray, " channel_state"], Bool[np.ndarray, " channel_state"]]:
    """Frozen horizon of the first token in every channel and state, and whether it is censored: then the least."""
    passed = cumulative - cumulative[0]
    reached = [np.searchsorted(passed[:, head], reach * (1 - TIE)) for head, reach in enumerate(threshold)]
    steps = np.maximum(np.concatenate(reached), 1)
    return steps.astype(float), steps == len(cumulative)
