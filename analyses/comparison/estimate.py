"""Values and differences with their intervals: rows measured one by one, or drawn and measured again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.comparison import core
from mamba_probe.analyses.comparison.asking import Label

__all__ = ["Estimate", "Estimates", "Resampling", "each", "refit"]

Measured = Callable[[Label, Int[np.ndarray, " row"] | None], Float[np.ndarray, " cell"]]
"""Cells of a label's rows, or of all of them pooled."""
Cells = Float[np.ndarray, "label cell"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, for several labels."""

    value: Cells
    low: Cells
    high: Cells

    def at(self, cells: Bool[np.ndarray, " cell"]) -> "Estimate":
        """Those of some cells."""
        return Estimate(self.value[:, cells], self.low[:, cells], self.high[:, cells])


@dataclass(frozen=True)
class Estimates:
    """Values of every label; of every label but the reference, what it has beyond that one, the rows used, and p."""

    values: Estimate
    differences: Estimate
    n_rows: Cells
    n_infinite: Cells
    p: Cells

    @classmethod
    def of(cls, values: Sequence[np.ndarray], differences: Sequence[np.ndarray]) -> "Estimates":
        """From (value, low, high) of each label, and (value, low, high, n_rows, n_infinite, p) of each difference."""
        difference, low, high, n_rows, n_infinite, p = np.stack(differences, axis=1)
        return cls(Estimate(*np.stack(values, axis=1)), Estimate(difference, low, high), n_rows, n_infinite, p)

    def at(self, cells: Bool[np.ndarray, " cell"]) -> "Estimates":
        """Those of some cells."""
        counted = (part[:, cells] for part in (self.n_rows, self.n_infinite, self.p))
        return Estimates(self.values.at(cells), self.differences.at(cells), *counted)


@dataclass(frozen=True)
class Resampling:
    """How rows are drawn."""

    statistic: str
    paired: bool
    n_bootstrap: int
    seed: int

    def seed_of(self, place: int) -> int:
        """Seed of a label's draws: one for all where rows are paired."""
        return self.seed if self.paired else self.seed + place


def each(measured: Measured, n_rows: Mapping[Label, int], reference: Label, how: Resampling) -> Estimates:
    """Every row by itself, located over rows."""
    rows = {label: np.stack([measured(label, np.array([row])) for row in range(n)]) for label, n in n_rows.items()}
    seeds = {label: how.seed_of(place) for place, label in enumerate(rows)}
    values = [_value(rows[label], how, seeds[label]) for label in rows]
    base = rows[reference], seeds[reference]
    return Estimates.of(
        values, [_difference((rows[label], seeds[label]), base, how) for label in rows if label != reference]
    )


def _value(rows: Float[np.ndarray, "row cell"], how: Resampling, seed: int) -> Float[np.ndarray, "part cell"]:
    found = np.full((3, rows.shape[1]), np.nan)
    for known, at in core.patterns(~np.isnan(rows)):
        part = rows[np.ix_(known, at)]
        if len(known):
            found[0, at] = core.located(part, how.statistic)
        if len(known) > 1:
            found[1:, at] = core.bounds(core.replicates(part, how.statistic, how.n_bootstrap, seed))
    return found


def _difference(
    ours: tuple[np.ndarray, int], reference: tuple[np.ndarray, int], how: Resampling
) -> Float[np.ndarray, "part cell"]:
    """Cells by the rows that are known in both; the mean over rows of which one is infinite is left NaN."""
    (a, a_seed), (b, b_seed) = ours, reference
    known = [~np.isnan(a), ~np.isnan(b)]
    if how.paired:
        known = [known[0] & known[1]] * 2
    found = np.full((6, a.shape[1]), np.nan)
    for rows, at in core.patterns(np.concatenate(known)):
        mine, theirs = a[rows[rows < len(a)]][:, at], b[rows[rows >= len(a)] - len(a)][:, at]
        infinite = np.isinf(mine).sum(axis=0) + np.isinf(theirs).sum(axis=0)
        found[3, at], found[4, at] = len(mine) if how.paired else len(mine) + len(theirs), infinite
        usable = infinite == 0 if how.statistic == "mean" else np.full(len(at), True)
        if len(mine) and len(theirs) and usable.any():
            compared = _compared((mine[:, usable], a_seed), (theirs[:, usable], b_seed), how)
            found[np.array([[0], [1], [2], [5]]), at[usable]] = compared
    return found


def _compared(
    ours: tuple[np.ndarray, int], reference: tuple[np.ndarray, int], how: Resampling
) -> Float[np.ndarray, "part cell"]:
    """Difference, low, high and p of rows that are all known."""
    a, b = ours[0], reference[0]
    low = high = np.full(a.shape[1], np.nan)
    if min(len(a), len(b)) > 1:
        parts = [core.replicates(rows, how.statistic, how.n_bootstrap, seed) for rows, seed in (ours, reference)]
        low, high = core.bounds(_less(*parts))
    test = core.swapped if how.paired else core.permuted
    return np.stack([core.apart(a, b, how.statistic), low, high, test(a, b, how.statistic, how.seed)])


def refit(measured: Measured, n_rows: Mapping[Label, int], reference: Label, how: Resampling) -> Estimates:
    """All rows pooled; rows drawn and measured again, the same of every label; and for p all rows but one."""
    pooled = {label: measured(label, None) for label in n_rows}
    again = {label: _again(measured, label, n, how, place) for place, (label, n) in enumerate(n_rows.items())}
    alone = {label: _alone(measured, label, n, pooled[label]) for label, n in n_rows.items()}
    values = [np.stack([pooled[label], *core.bounds(again[label])]) for label in n_rows]
    differences = []
    for label, n in n_rows.items():
        if label == reference:
            continue
        infinite = np.isinf(pooled[label]).astype(int) + np.isinf(pooled[reference])
        rows = np.full(len(infinite), n if how.paired else n + n_rows[reference])
        ends = core.bounds(_less(again[label], again[reference]))
        value, p = _less(pooled[label], pooled[reference]), _p(alone[label], alone[reference], how)
        differences.append(np.stack([value, *ends, rows, infinite, p]))
    return Estimates.of(values, differences)


def _alone(
    measured: Measured, label: Label, n: int, whole: Float[np.ndarray, " cell"]
) -> Float[np.ndarray, "row cell"]:
    """What each row brings to the pooled measure; unknown of one row."""
    if n < 2:
        return np.full((n, len(whole)), np.nan)
    without = [measured(label, np.delete(np.arange(n), row)) for row in range(n)]
    return core.pseudovalues(whole, np.stack(without))


def _p(
    ours: Float[np.ndarray, "row cell"], reference: Float[np.ndarray, "other cell"], how: Resampling
) -> Float[np.ndarray, " cell"]:
    """The test of rows by themselves, on what each row brings; NaN where that is unknown of a row."""
    found = np.full(ours.shape[1], np.nan)
    known = np.isfinite(ours).all(axis=0) & np.isfinite(reference).all(axis=0)
    if known.any():
        test = core.swapped if how.paired else core.permuted
        found[known] = test(ours[:, known], reference[:, known], "mean", how.seed)
    return found


def _again(
    measured: Measured, label: Label, n: int, how: Resampling, place: int
) -> Float[np.ndarray, "replicate cell"]:
    if n < 2:  # nothing can be drawn
        return np.full((1, len(measured(label, None))), np.nan)
    draws = core.drawn(n, how.n_bootstrap, how.seed_of(place))
    return np.stack([measured(label, rows) for rows in draws])


def _less(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of two infinite values: NaN
        return ours - reference
