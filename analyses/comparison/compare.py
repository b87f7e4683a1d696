"""The same measure of several traces, and what each has beyond a reference, with paired intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from types import ModuleType
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import described
from mamba_probe.analyses.comparison import core
from mamba_probe.analyses.comparison.asking import Label, Subject, asked_labels, asked_measure, asked_subjects
from mamba_probe.analyses.comparison.estimate import Estimates, Resampling, each, refit
from mamba_probe.analyses.comparison.layout import LABEL, OTHER, RULE, Layout, Unlike, layout
from mamba_probe.analyses.comparison.pairing import check_paired
from mamba_probe.trace.contract import unknown_name

__all__ = ["compare"]

REPLICATES = {"each": 1000, "refit": 200}
"""Bootstrap replicates by default; each of "refit" measures every trace again."""


def compare(
    measure: ModuleType | str | Callable[..., Any], of: Mapping[Any, Any], *,
    variable: str | Sequence[str] | None = None, reference: Any = None, resample: str = "each", paired: bool = True,
    statistic: str = "mean", select: Callable[[xr.Dataset], xr.Dataset] | None = None,
    n_bootstrap: int | None = None, seed: int = 0, **options: Any,
) -> xr.Dataset:  # fmt: skip
    r"""Compare a measure of two or more models, traces or training revisions on the same prompts (ours).

    With $m_{ai}$ the measure of row i of trace a, its value is $\frac1n \sum_i m_{ai}$, and beyond a reference r it has
    $d_a = \frac1n \sum_i (m_{ai} - m_{ri})$. Intervals: percentile bootstrap over rows, the same rows drawn of every
    trace, so that what makes a prompt hard for both cancels:
    $\mathrm{Var}(d) = (\sigma_a^2 + \sigma_r^2 - 2 \rho \sigma_a \sigma_r) / n$. p: swaps within pairs (R. A. Fisher's
    randomisation test), adjusted by Holm over all differences of one call.

    Args:
        measure: an analysis (`mamba_probe.analyses.memory_horizon`), its name, or a callable Dataset -> Dataset.
        of: label -> trace; or label -> the measure's keyword arguments with the trace among them; or label -> recorded
            run (`mamba_probe.run.Run`), which an analysis measures as for a report, its model run again where it must.
            Datasets with a dimension `batch`, those in lists and tuples too, are taken by row together; other arguments
            pass whole. Labels that are numbers (training steps) are put in order.
        variable: names of the result's variables; None: numeric `layer_*` that are no null, no end of an interval and
            no bound, and have the same dimensions and labels in all results: `attrs["left_out"]` names those that have
            not. Other dimensions are kept.
        reference: label that the others are compared with; None: the first.
        resample: "each": the measure of each row by itself. "refit": rows are drawn and the measure is taken of them
            together, as often as `n_bootstrap` says: for measures that gate or pool; p is of what each row brings
            (jackknife).
        paired: rows are the same prompts (checked by token ids). False: rows are drawn of each trace by itself, and p
            is of rows parted anew, by Welch's t.
        statistic: "mean" over rows, or "median" (the lower one): differences are then of medians, and infinite values
            (censored horizons) are ordered. A mean difference over rows of which one is infinite is NaN, and counted.
        select: applied to each result first, where dimensions differ between models: a function Dataset -> Dataset.
        n_bootstrap: replicates; None: 1000, for "refit" 200.
        seed: of the draws; passed to a measure that takes a seed.
        options: further arguments of the measure, the same for all.

    Returns:
        For each variable: itself, `*_low`, `*_high` over (trace, ..); `*_difference`, `*_difference_low`,
        `*_difference_high`, `*_p`, `*_p_holm`, `*_n_rows`, `*_n_infinite` over (other, ..), other than the reference. A
        row that is NaN in either of a pair is left out of its difference; `*_n_rows` counts those that were used.

    Raises:
        ValueError: rows that are not the same prompts; variables that were named and differ in dimensions, or all
            differ; names or labels unknown.

    >>> rows = {0: np.zeros(8), 100: np.ones(8)}
    >>> traces = {step: xr.Dataset({"x": ("batch", x)}, {"prompt_id": ("batch", range(8))}) for step, x in rows.items()}
    >>> found = compare(lambda trace: trace.mean(), traces, variable="x")
    >>> found.x_difference.sel(other=100).item(), found.x_p.item() == 2 / 2**8
    (1.0, True)
    """
    labels = asked_labels(of)
    name, function = asked_measure(measure, of)
    how = _asked_resampling(resample, statistic, paired, n_bootstrap, seed)
    base = labels[0] if reference is None else reference
    if base not in labels:
        raise unknown_name("reference", base, tuple(map(str, labels)))
    subjects = asked_subjects(function, of, labels, options, seed)
    by = check_paired({label: subject.recorded for label, subject in subjects.items()}) if paired else "not paired"
    measured = _Measured(subjects, variable, select)
    estimated = {"each": each, "refit": refit}[resample]
    found = estimated(measured, {label: subject.n_rows for label, subject in subjects.items()}, base, how)
    plan = measured.plan
    if plan is None:
        raise ValueError("nothing was measured")
    plan, kept = plan.without(measured.left_out)
    found = found.at(kept)
    attrs = _attrs(resample, how, subjects) | {
        "measure": name, "reference": str(base), "paired_by": by, "compared": ", ".join(plan.templates),
        "variable_rule": RULE if variable is None else "as asked",
        "left_out": "; ".join(f"{name} ({why})" for name, why in measured.left_out.items()), **_counted(found, how),
    }  # fmt: skip
    coords = {LABEL: labels, OTHER: [label for label in labels if label != base]}
    return described(_entries(plan, found), plan.coords() | coords, attrs)


@dataclass
class _Measured:
    """Cells of a label's rows; the first result sets the layout of all. What differs is left out, unless asked for."""

    subjects: Mapping[Label, Subject]
    variable: str | Sequence[str] | None
    select: Callable[[xr.Dataset], xr.Dataset] | None
    plan: Layout | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Variable -> what of it differs, where first."""

    def __call__(self, label: Label, rows: Int[np.ndarray, " row"] | None) -> Float[np.ndarray, " cell"]:
        result = self.subjects[label].of(rows)
        if self.plan is None:
            self.plan = layout(result, self.variable, self.select)
        which = "" if rows is None else f", row {rows[0]}" if len(rows) == 1 else ", rows drawn"
        cells, unlike = self.plan.cells(result)
        self.left_out = {name: f"{label!r}{which}: {why}" for name, why in unlike.items()} | self.left_out
        alike = [name for name in self.plan.templates if name not in self.left_out]
        if unlike and (self.variable is not None or not alike):
            raise Unlike(f"{label!r}{which}", unlike, alike)
        return cells


def _asked_resampling(resample: str, statistic: str, paired: bool, n_bootstrap: int | None, seed: int) -> Resampling:
    if resample not in REPLICATES:
        raise unknown_name("resample", resample, tuple(REPLICATES))
    if statistic not in core.STATISTICS:
        raise unknown_name("statistic", statistic, core.STATISTICS)
    if resample == "refit" and statistic != "mean":
        raise ValueError(
            f'statistic={statistic!r} is over rows measured by themselves; resample="refit" pools them by the measure'
        )
    n_bootstrap = REPLICATES[resample] if n_bootstrap is None else n_bootstrap
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")
    return Resampling(statistic, paired, n_bootstrap, seed)


def _entries(plan: Layout, found: Estimates) -> dict[str, Any]:
    parts = {
        "": (LABEL, found.values.value, "{}"),
        "_low": (LABEL, found.values.low, "lower 95 % bound of {}"),
        "_high": (LABEL, found.values.high, "upper 95 % bound of {}"),
        "_difference": (OTHER, found.differences.value, "{}, less the reference's"),
        "_difference_low": (OTHER, found.differences.low, "lower 95 % bound of the difference in {}"),
        "_difference_high": (OTHER, found.differences.high, "upper 95 % bound of the difference in {}"),
        "_p": (OTHER, found.p, "two-sided p of no difference in {}"),
        "_p_holm": (OTHER, core.holm(found.p), "p of no difference in {}, Holm over all differences"),
        "_n_rows": (OTHER, found.n_rows, "rows in the difference in {}"),
        "_n_infinite": (OTHER, found.n_infinite, "infinite values among those of the difference in {}"),
    }
    entries = {}
    for end, (dim, cells, text) in parts.items():
        counted = end.startswith("_n_")
        for name, (dims, values) in plan.shaped(cells, dim).items():
            template = plan.templates[name]
            units = "1" if end.startswith("_p") or counted else str(template.attrs.get("units", ""))
            long = text.format(template.attrs.get("long_name", name))
            entries[f"{name}{end}"] = (dims, values.astype(int) if counted else values, long, units)
    return dict(sorted(entries.items()))


def _attrs(resample: str, how: Resampling, subjects: Mapping[Label, Subject]) -> dict[str, str]:
    rows = [subject.n_rows for subject in subjects.values()]
    where = f"the {how.statistic} over rows, each measured by itself" if resample == "each" else "of all rows pooled"
    drawn = "the same rows of every trace" if how.paired else "rows of each trace by itself (independent, Welch-like)"
    models = [str(subject.recorded.attrs.get("model", "")) for subject in subjects.values()]
    return {
        "analysis": "comparison",
        "model": ", ".join(models) if any(models) else "",
        "estimator": f"{where}; differences from the reference's (ours)",
        "null": f"no difference; p: {_p_text(resample, how, rows)}",
        "interval": f"95 % percentile bootstrap, {drawn}"
        + ("" if resample == "each" else ", measured again; NaN where a replicate has no value"),
        "reduces_over": "batch",
        "missing": "a row that is NaN in either of a pair is left out of its difference, and of its own value alone",
        "n_rows": ", ".join(map(str, rows)) if len(set(rows)) > 1 else str(rows[0]),
        "resample": resample, "paired": str(how.paired), "statistic": how.statistic,
        "n_bootstrap": str(how.n_bootstrap), "seed": str(how.seed),
    }  # fmt: skip


def _counted(found: Estimates, how: Resampling) -> dict[str, str]:
    """How many differences were tested, and the least p that Holm's adjustment can leave the surest of them."""
    tested = ~np.isnan(found.p)
    n = int(tested.sum())
    rows = int(found.n_rows[tested].max()) if n else 0
    floor = min(1.0, n * core.least(rows if how.paired else rows // 2, how.paired)) if n else np.nan
    return {"n_comparisons": str(n), "least_p_holm": f"{floor:.2g}"}


def _p_text(resample: str, how: Resampling, rows: list[int]) -> str:
    most, of = max(rows), " of what each row brings to all (jackknife)" if resample == "refit" else ""
    ways = 2**most if how.paired else comb(2 * most, most)
    count = "every one" if ways <= core.EXACT else f"{core.PERMUTATIONS} drawn (exact where at most {core.EXACT})"
    what = f"swaps within pairs (R. A. Fisher){of}" if how.paired else f"rows parted anew, by Welch's t of means{of}"
    return f"{what}, {count}"
