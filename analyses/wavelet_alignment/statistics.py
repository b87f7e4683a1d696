"""Every statistic of one query's kernels, by name: of each kernel, of their span, and what the summaries add up."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.lti_limits.fits import fit_optimised
from mamba_probe.analyses.wavelet_alignment import core
from mamba_probe.analyses.wavelet_alignment.basis import Basis
from mamba_probe.analyses.wavelet_alignment.span import Span

__all__ = ["MEANS", "MEDIANS", "ORDER_ERROR", "REFERENCE_MEANS", "SHARES", "Query", "Settings"]

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy whose coefficients are counted."""

ORDER_ERROR = 0.1
"""Relative L2 error at which time-invariant states are counted."""

MEANS = (
    "best_cosine",
    "scaling_cosine",
    "capture",
    "wavelet_capture",
    "effective_rank",
    "energy_by_level",
    "compaction",
)
"""Means over kernels with energy; `REFERENCE_MEANS` of the executed kernels only."""
REFERENCE_MEANS = ("dft_compaction", "dft_effective_rank")
MEDIANS = ("discontinuity_index", "lti_order")

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What is measured of a kernel.

    Attributes:
        basis: wavelet and mode.
        level: J of the coarse space.
        depth: log2 of the longest window of the whole result: where shorter ones are filled with NaN.
        n_angles: functions of the largest coarse space.
        n_sampled: kernels a query for the costly measures (`lti_order`, `exponential_error`), evenly spaced.
        n_span: kernels a query for the span, evenly spaced.
        order_lags: lags next to the query that enter `lti_order`.
        exponentials: numbers of exponentials to fit.
    """

    basis: Basis
    level: int
    depth: int
    n_angles: int
    n_sampled: int
    n_span: int
    order_lags: int
    exponentials: tuple[int, ...]


class Query:
    """Statistics of one query's kernels, which come a block at a time.

    Args:
        n_kernels: how many there are in all.
        settings: what is measured.
        executed: whether they are the kernels as executed: then beside the DFT and the fitted exponentials.
        spanning: whether their span is compared with the coarse space: some of the kernels are held until the end.
        n_kept: how many of those nearest to a wavelet are kept.
    """

    def __init__(self, n_kernels: int, settings: Settings, executed: bool, spanning: bool, n_kept: int = 0) -> None:
        self.settings, self.executed, self.n_kept = settings, executed, n_kept
        self.sampled = _even(n_kernels, settings.n_sampled)
        self.spanning = _even(n_kernels, settings.n_span) if spanning else np.zeros(n_kernels, dtype=bool)
        self.parts, self.first, self.window = [], 0, 0
        self.span = Span(0, 0)
        self.kept: tuple[np.ndarray, np.ndarray] = np.empty(0, dtype=int), np.empty((0, 0))

    def add(self, kernel: Float[np.ndarray, "kernel token"]) -> None:
        """Measure the next block."""
        here, self.window = slice(self.first, self.first + len(kernel)), kernel.shape[1]
        scaled = core.normalised(kernel)
        coefficient = self.settings.basis.transform(scaled)
        found = _of_kernels(kernel, coefficient, self.sampled[here], self.settings)
        if self.executed:
            found |= _references(kernel, scaled, coefficient, self.sampled[here], self.settings)
        self.parts.append(found)
        if not self.first:
            self.span = Span(int(self.spanning.sum()), coefficient.shape[1])
        self.span.add(coefficient[self.spanning[here] & ~np.isnan(coefficient[:, 0])])
        self._keep(np.arange(here.start, here.stop), scaled)
        self.first = here.stop

    def _keep(self, index: Int[np.ndarray, " kernel"], scaled: Float[np.ndarray, "kernel token"]) -> None:
        if self.n_kept:
            index = np.concatenate([self.kept[0], index])
            scaled = np.concatenate([self.kept[1].reshape(-1, self.window), scaled])
            cosine = np.concatenate([part["best_cosine"] for part in self.parts])[index]
            nearest = np.sort(np.argsort(-np.nan_to_num(cosine, nan=-1.0), kind="stable")[: self.n_kept])
            self.kept = index[nearest], scaled[nearest]

    def result(self) -> tuple[Statistics, Statistics]:
        """Numbers by kernel and of the span; and what the summaries need: sums over kernels with energy, their count
        `live`, and the values whose medians are taken.
        """
        each = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        alive = ~np.isnan(each["best_cosine"])
        means = MEANS + (REFERENCE_MEANS if self.executed else ())
        totals = {name: np.asarray(np.nansum(each[name][alive], axis=0)) for name in means} | {
            name: each[name] for name in MEDIANS
        }
        curves = ("compaction", "dft_compaction")
        details = {name: values for name, values in each.items() if name not in curves}
        details["n_dead"] = np.asarray(float(np.sum(~alive)))
        details |= _of_span(self.span, self.window, self.settings)
        return details, totals | {"live": np.asarray(float(alive.sum()))}

    def release(self) -> None:
        """Let go of the kernels of the span: its result has been taken, or will not be."""
        self.span.close()


def _even(size: int, n: int) -> Bool[np.ndarray, " kernel"]:
    """At most n of `size` kernels, evenly spaced, the first and the last among them."""
    chosen = np.zeros(size, dtype=bool)
    chosen[np.linspace(0, size - 1, min(n, size)).round().astype(int)] = True
    return chosen


def _of_kernels(
    kernel: Float[np.ndarray, "kernel token"], coefficient: Float[np.ndarray, "kernel coefficient"],
    sampled: Bool[np.ndarray, " kernel"], settings: Settings,
) -> Statistics:  # fmt: skip
    window, energy = kernel.shape[1], coefficient**2
    level, coarse = settings.basis.levels(window), settings.basis.coarse(window, settings.level)
    cosine, at_level, shift = core.best_wavelet(coefficient, level)
    compacted = core.compaction(coefficient)
    count = core.needed(compacted, SHARES)
    return {
        "n_coefficients": count,
        "coefficient_fraction": count / window,
        "effective_rank": core.effective_rank(coefficient),
        "best_cosine": cosine,
        "best_level": at_level,
        "best_shift": shift,
        "scaling_cosine": np.abs(coefficient[:, level == 0]).max(axis=1),
        "capture": energy[:, coarse].sum(axis=1),
        "wavelet_capture": energy[:, coarse & (level > 0)].sum(axis=1),
        "energy_by_level": _by_level(energy, level, settings.depth),
        "compaction": _curve(compacted, settings.depth),
        "discontinuity_index": core.discontinuity_index(kernel),
        "lti_order": _sampled(kernel, sampled, lambda some: core.lti_order(some, ORDER_ERROR, settings.order_lags)),
    }


def _references(
    kernel: Float[np.ndarray, "kernel token"], scaled: Float[np.ndarray, "kernel token"],
    coefficient: Float[np.ndarray, "kernel coefficient"], sampled: Bool[np.ndarray, " kernel"], settings: Settings,
) -> Statistics:  # fmt: skip
    """The kernels in the unitary DFT; where asked for, the error of fitted exponentials and of as many wavelets."""
    modulus = core.fourier(scaled)
    in_dft = core.compaction(modulus)
    found = {
        "dft_n_coefficients": core.needed(in_dft, SHARES),
        "dft_effective_rank": core.effective_rank(modulus),
        "dft_compaction": _curve(in_dft, settings.depth),
    }
    if settings.exponentials:
        counts, compacted = np.array(settings.exponentials), core.compaction(coefficient)
        found["n_term_error"] = np.sqrt(np.maximum(1 - compacted[:, counts - 1], 0.0))
        errors = [_sampled(kernel, sampled, lambda some, n=n: _fitted(some, n)) for n in settings.exponentials]
        found["exponential_error"] = np.stack(errors, axis=1)
    return found


def _sampled(
    kernel: Float[np.ndarray, "kernel token"], sampled: Bool[np.ndarray, " kernel"], measure: Any
) -> np.ndarray:
    """A costly measure of the sampled kernels; NaN for the others."""
    found = np.full(len(kernel), np.nan)
    if sampled.any():
        found[sampled] = measure(kernel[sampled])
    return found


def _fitted(kernel: Float[np.ndarray, "kernel token"], n_states: int) -> Float[np.ndarray, " kernel"]:
    """Relative L2 error of the best exponentials found; NaN without energy."""
    return np.array([fit_optimised(one[::-1], n_states).error if np.any(one) else np.nan for one in kernel])


def _of_span(span: Span, window: int, settings: Settings) -> Statistics:
    """Principal angles with the coarse space; what is closed form in a window-wide basis is NaN in another."""
    coarse = settings.basis.coarse(window, settings.level)
    cosines, rank = core.coarse_cosines(span, coarse)
    inside = settings.basis.mode == "periodization"
    return {
        "principal_cosine": np.pad(cosines, (0, settings.n_angles - len(cosines)), constant_values=np.nan),
        "mean_squared_cosine": np.asarray(np.mean(cosines**2) if rank else np.nan),
        "random_mean_squared_cosine": np.asarray(max(rank, coarse.sum()) / window if rank and inside else np.nan),
        "capture_residual": np.asarray(max(0.0, 1 - np.sum(cosines**2) / coarse.sum()) if rank and inside else np.nan),
        "rank": np.asarray(float(rank)),
    }


def _by_level(
    energy: Float[np.ndarray, "kernel coefficient"], level: np.ndarray, depth: int
) -> Float[np.ndarray, "kernel level"]:
    """Energy of the scaling functions (0) and of the levels 1 (finest) to `depth`; NaN at levels the window lacks."""
    found = np.full((len(energy), depth + 1), np.nan)
    for j, first, size in zip(*np.unique(level, return_index=True, return_counts=True), strict=True):
        found[:, j] = energy[:, first : first + size].sum(axis=1)
    return found


def _curve(compacted: Float[np.ndarray, "kernel coefficient"], depth: int) -> Float[np.ndarray, "kernel size"]:
    """Share of the energy in the largest 1, 2, 4, .., 2^depth coefficients."""
    return compacted[:, np.minimum(2 ** np.arange(depth + 1), compacted.shape[1]) - 1]
