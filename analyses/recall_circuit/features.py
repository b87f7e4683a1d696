"""What a mixer is given at each key and value token, and what an S4D layer's channels make of it: S12 and S13."""

import numpy as np
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.recall_circuit.core import ratio, silu
from mamba_probe.analyses.recall_circuit.static import Path
from mamba_probe.analyses.recall_circuit.swaps import and_index, gate_correlation
from mamba_probe.trace import require

__all__ = ["conjunction", "selection", "token_means"]


def selection(
    canonical: Canonical, layer: int, row: int
) -> tuple[Inexact[np.ndarray, "token group state"], Inexact[np.ndarray, "token group state"]]:
    """B and C of the valid tokens; where they are constant (S4D) one copy stands for all tokens."""
    if not canonical.constant:
        return canonical.selection(layer, row)
    n = int(canonical.valid[row].sum())
    each = (canonical.trace[name].isel(layer=layer).values for name in ("B", "C"))
    B, C = (np.broadcast_to(one.astype(np.promote_types(one.dtype, np.float64)), (n, *one.shape)) for one in each)
    return B, C


def token_means(
    canonical: Canonical, layer: int, name: str, role: str
) -> tuple[Int[np.ndarray, " id"], Float[np.ndarray, "id feature"]]:
    """The token ids that have `role`, and the mean of a variable (SiLU of the gate `z`) over the tokens of each.

    In the first layer the mixer's input is the same wherever an id stands; in later layers this is its mean.
    """
    require(canonical.trace, "token_id", name)
    roles, token_id = (canonical.trace[of].transpose("batch", "token").values for of in ("role", "token_id"))
    ids, values = [], []
    for row in range(canonical.n_rows):
        valid = canonical.valid[row]
        chosen = roles[row][valid] == role
        ids.append(token_id[row][valid][chosen])
        values.append(canonical.load(name, layer, row)[chosen])
    found, index = np.unique(np.concatenate(ids), return_inverse=True)
    every = np.concatenate(values).reshape(len(index), -1)
    total = np.zeros((len(found), every.shape[1]))
    np.add.at(total, index, np.asarray(silu(every)) if name == "z" else every)
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
