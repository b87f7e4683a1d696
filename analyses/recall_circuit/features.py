"""What a mixer is given at each key and value token, and what an S4D layer's channels make of it: S12 and S13."""

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, runs
from mamba_probe.analyses.recall_circuit.core import ratio, silu
from mamba_probe.analyses.recall_circuit.static import Path
from mamba_probe.analyses.recall_circuit.stream import RUN_BYTES
from mamba_probe.analyses.recall_circuit.swaps import and_index, gate_correlation
from mamba_probe.trace import require

__all__ = ["conjunction", "token_means"]


def token_means(
    canonical: Canonical, layer: int, name: str, role: str
) -> tuple[Int[np.ndarray, " id"], Float[np.ndarray, "id feature"]]:
    """The token ids that have `role`, and the mean of a variable (SiLU of the gate `z`) over the tokens of each.

    In the first layer the mixer's input is the same wherever an id stands; in later layers this is its mean.
    """
    require(canonical.trace, "token_id", name)
    roles, token_id = (canonical.trace[of].transpose("batch", "token").values for of in ("role", "token_id"))
    found, index = np.unique(token_id[canonical.valid & (roles == role)], return_inverse=True)
    total, taken = np.zeros((len(found), canonical.trace[name].isel(layer=0, batch=0, token=0).size)), 0
    for row in range(canonical.n_rows):
        chosen = np.flatnonzero(roles[row][canonical.valid[row]] == role)
        for part in runs(len(chosen), (), max(1, RUN_BYTES // (8 * total.shape[1]))):
            each = canonical.load(name, layer, row, tokens=chosen[part]).reshape(-1, total.shape[1])
            np.add.at(total, index[taken : taken + len(each)], np.asarray(silu(each)) if name == "z" else each)
            taken += len(each)
    return found, total / np.bincount(index, minlength=len(found))[:, None]


def conjunction(canonical: Canonical, layer: int, path: Path, offset: int) -> tuple[float, float]:
    """S12 and S13 of an S4D layer: means over channels, each weighted by |W_out|^2 x11^2; NaN where none is defined."""
    (key_ids, keys), (_, values) = (token_means(canonical, layer, "u", role) for role in ("key", "value"))
    asked, gate = token_means(canonical, layer, "z", "query")
    assert path.in_proj is not None
    index, weight, written = and_index(path, keys @ path.in_proj.T, values @ path.in_proj.T, offset)
    both, of_keys, of_asked = np.intersect1d(key_ids, asked, return_indices=True)
    if not len(both):
        return _mean(index, weight), float("nan")
    return _mean(index, weight), _mean(gate_correlation(written[of_keys], gate[of_asked]), weight)


def _mean(values: Float[np.ndarray, " channel"], weight: Float[np.ndarray, " channel"]) -> float:
    known = np.isfinite(values)
    return ratio(np.array((values * weight)[known].sum()), np.array(weight[known].sum())).item()
