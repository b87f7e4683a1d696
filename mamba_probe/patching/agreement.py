"""How far attribution lies from the exact sweep, by quantity."""

from collections.abc import Callable

import numpy as np
import xarray as xr

from mamba_probe.patching.pair import DIMS

__all__ = ["compared"]

TOLD = 0.01
"""Share of the largest exact effect, below which a sign is not counted."""


def compared(found: xr.Dataset, exact: xr.Dataset, n_bootstrap: int, seed: int) -> xr.Dataset:
    """`found` of `attribute` with its error against `exact` of `sweep`.

    Raises:
        ValueError: `exact` is no finished sweep of the same model, runs and metric, or lacks an entry.
    """
    change = _effect(found, exact)
    guess = found["attributed"].transpose(*DIMS).values
    rows = found.sizes["batch"] > 1
    numbers: dict[str, list[float]] = {}
    for mine, true in zip(guess, change, strict=True):
        for name, value in _numbers(mine, true, rows, n_bootstrap, seed).items():
            numbers.setdefault(name, []).append(value)
    units = "rows" if rows else "cells (layer, token) of the one row, taken as independent"
    return found.assign({name: ("quantity", values) for name, values in numbers.items()}).assign(
        exact=(DIMS, change)
    ).assign_attrs(
        error="error_max, error_rms: of attributed - exact, by the same of exact (= patched - base), over layer, token"
        f" and batch; sign_agreement: share of equal signs where |exact| is at least {TOLD:g} of its largest",
        interval=f"pearson, spearman: 95 %, {n_bootstrap} bootstrap replicates over {units}, seed {seed}",
    )  # fmt: skip


def _effect(found: xr.Dataset, exact: xr.Dataset) -> np.ndarray:
    """patched - base of the entries of `found`."""
    if not isinstance(exact, xr.Dataset) or "patched" not in exact:
        raise ValueError(f"exact is what patching.sweep returned; got {type(exact).__name__}")
    for name in ("model_hash", "base_hash", "source_hash", "metric"):
        if exact.attrs[name] != found.attrs[name]:
            raise ValueError(f"exact has another {name}: there {exact.attrs[name]}, here {found.attrs[name]}")
    for dim in DIMS[:3]:
        lacking = sorted(set(found[dim].values.tolist()) - set(exact[dim].values.tolist()))
        if lacking:
            raise ValueError(f"exact lacks {dim} {', '.join(map(str, lacking))}: sweep them, or attribute fewer")
    same = exact.sel({dim: found[dim].values for dim in DIMS[:3]})
    if not bool(same["measured"].all()):
        raise ValueError("exact is not finished: run the sweep on with the same store")
    return (same["patched"] - same["base"]).transpose(*DIMS).values


def _numbers(mine: np.ndarray, true: np.ndarray, rows: bool, n_bootstrap: int, seed: int) -> dict[str, float]:
    """Of one quantity, arrays (layer, token, batch)."""
    from mamba_probe.analyses.common import bootstrap

    pairs = np.stack([mine, true]).reshape(2, -1, mine.shape[-1])
    pairs = pairs if rows else pairs[:, ~np.isnan(pairs[0, :, 0])].transpose(0, 2, 1)
    told = np.abs(true) >= TOLD * np.nanmax(np.abs(true))
    told &= true != 0
    numbers = {
        "error_max": _ratio(np.nanmax(np.abs(mine - true)), np.nanmax(np.abs(true))),
        "error_rms": _ratio(np.sqrt(np.nanmean((mine - true) ** 2)), np.sqrt(np.nanmean(true**2))),
        "sign_agreement": float((np.sign(mine) == np.sign(true))[told].mean()) if told.any() else np.nan,
    }
    for name, statistic in (("pearson", _pearson), ("spearman", _spearman)):

        def drawn(draws: np.ndarray, statistic: Callable[[np.ndarray], float] = statistic) -> np.ndarray:
            return np.array(statistic(np.repeat(pairs, draws, axis=2)))

        low, high = bootstrap.interval(drawn, pairs.shape[2], n_bootstrap, seed)
        numbers |= {name: statistic(pairs), f"{name}_low": float(low), f"{name}_high": float(high)}
    return numbers


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0 else np.nan


def _pearson(pairs: np.ndarray) -> float:
    mine, true = (each[~np.isnan(pairs).any(0)] for each in pairs)
    if not mine.size or np.ptp(mine) == 0 or np.ptp(true) == 0:
        return np.nan
    return float(np.corrcoef(mine, true)[0, 1])


def _spearman(pairs: np.ndarray) -> float:
    from scipy.stats import rankdata

    known = ~np.isnan(pairs).any(0)
    return _pearson(np.stack([rankdata(each[known]) for each in pairs]))
