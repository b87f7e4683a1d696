"""Statistics of the kernels of one query: executed, and with the layer made time-invariant."""

import numpy as np
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.common import Row, attention_row
from mamba_probe.analyses.wavelet_alignment import core

__all__ = ["SHARES", "executed", "frozen", "statistics"]

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy whose coefficients are counted."""

Selection = tuple[Inexact[np.ndarray, "token group state"], Inexact[np.ndarray, "token group state"]]


def executed(
    row: Row,
    selection: Selection,
    A: Inexact[np.ndarray, "head decay"],
    groups: Int[np.ndarray, " head"],
    at: int,
    window: int,
    zoh: bool,
) -> Float[np.ndarray, "head window"]:
    """Kernels of the token `at` over the `window` tokens that end there, with delta, B and C as executed."""
    B, C = selection
    seen = slice(at + 1 - window, at + 1)
    elapsed = row.cumulative[at] - row.cumulative[seen]
    return attention_row(row.delta[seen], elapsed, A, B[seen], C[at], groups, zoh).T


def frozen(
    row: Row,
    selection: Selection,
    A: Inexact[np.ndarray, "head decay"],
    groups: Int[np.ndarray, " head"],
    window: int,
    zoh: bool,
) -> Float[np.ndarray, "head window"]:
    """The null: kernels over the same window with delta, B and C frozen to their means over the row's valid tokens."""
    B, C = (np.mean(values, axis=0) for values in selection)
    delta = np.broadcast_to(row.delta.mean(axis=0), (window, row.delta.shape[1]))
    elapsed = row.delta.mean(axis=0) * np.arange(window - 1, -1, -1.0)[:, None]
    return attention_row(delta, elapsed, A, B[None], C, groups, zoh).T


def statistics(
    kernel: Float[np.ndarray, "kernel token"], wavelet: str, level: int, depth: int
) -> dict[str, np.ndarray]:
    """Every statistic of one query's kernels, by name; NaN for kernels without energy.

    Args:
        kernel: kernels over a dyadic window.
        wavelet: name of an orthonormal wavelet.
        level: J of the coarse space, 2^J functions.
        depth: log2 of the longest window of the whole result: where shorter ones are filled with NaN.
    """
    coefficient = core.coefficients(core.normalised(kernel), wavelet)
    alive = ~np.isnan(coefficient[:, 0])
    compacted = core.compaction(coefficient)
    cosine, at_level, shift = core.best_wavelet(coefficient)
    count = core.needed(compacted, SHARES)
    cosines, rank = core.coarse_cosines(coefficient[alive], 2**level)
    energy = coefficient**2
    return {
        "n_coefficients": count,
        "coefficient_fraction": count / kernel.shape[1],
        "effective_rank": core.effective_rank(coefficient),
        "best_cosine": cosine,
        "best_level": at_level,
        "best_shift": shift,
        "scaling_cosine": np.abs(coefficient[:, 0]),
        "capture": energy[:, : 2**level].sum(axis=1),
        "wavelet_capture": energy[:, 1 : 2**level].sum(axis=1),
        "energy_by_level": _by_level(energy, depth),
        "principal_cosine": np.pad(cosines, (0, 2**level - len(cosines)), constant_values=np.nan),
        "mean_squared_cosine": np.asarray(np.mean(cosines**2) if rank else np.nan),
        "random_mean_squared_cosine": np.asarray(max(rank, 2**level) / kernel.shape[1] if rank else np.nan),
        "rank": np.asarray(float(rank)),
        "n_dead": np.asarray(float(np.sum(~alive))),
        "compaction": _curve(compacted[alive], depth),
    }


def _by_level(energy: Float[np.ndarray, "kernel token"], depth: int) -> Float[np.ndarray, "kernel level"]:
    """Energy of the scaling function (0) and of the levels 1 (finest) to `depth`; NaN at levels the window lacks."""
    level = core.levels(energy.shape[1])
    columns = [
        energy[:, level == j].sum(axis=1) if j in level else np.full(len(energy), np.nan) for j in range(depth + 1)
    ]
    return np.stack(columns, axis=1)


def _curve(compacted: Float[np.ndarray, "kernel token"], depth: int) -> Float[np.ndarray, " coefficient"]:
    """Share of the energy in the largest 1, 2, 4, .., 2^depth coefficients, summed over kernels."""
    last = compacted.shape[1]
    return np.stack([compacted[:, min(2**k, last) - 1].sum() for k in range(depth + 1)])
