"""Rows of a reproduced table: a measurement, its null, its interval, what it is over, and whether it is as stated."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from mamba_probe.analyses.common.proportion import wilson

__all__ = [
    "AS_IT_MUST", "FAILS", "HOLDS", "REPORT", "REPORTED", "Cell", "Criterion", "Readable", "Row", "count", "counted",
    "measured", "readable", "sentence", "spread", "text", "write_csv",
]  # fmt: skip

HOLDS, AS_IT_MUST, FAILS, REPORTED = "holds", "fails as it must", "FAILS", "reported"
KEPT = ("value", "verdict")  # columns of every readable table
FIXED = (
    "what", "mixer", "dtype", "quantity", "value", "interval", "null", "ideal", "bound", "over", "criterion", "verdict",
    "interval is", "null is", "ideal is", "estimator",
)  # fmt: skip
LONGEST = 44  # letters of a text within a readable table; longer ones stand below it
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    ">=": lambda value, limit: value >= limit,
    "<": lambda value, limit: value < limit,
    ">": lambda value, limit: value > limit,
    "=": lambda value, limit: value == limit,
    "none": lambda value, limit: True,
}


@dataclass(frozen=True)
class Criterion:
    """What a measurement must meet, stated before it is made.

    Arguments:
        relation: "<=", ">=", "<", ">" or "="; "none" states nothing: the value is reported.
        limit: what stands on the right of it.
        of_bound: the limit is added to the row's bound.
        must_fail: the criterion describes a failure that theory demands.

    Example:
        >>> Criterion("<=", 1e-12).verdict(3e-14), Criterion("<=", 1e-12).verdict(1e-3)
        ('holds', 'FAILS')
        >>> Criterion("<", 0.5, must_fail=True).verdict(0.2)
        'fails as it must'
        >>> Criterion("<=", 1e-15, of_bound=True).text("error")
        'error <= bound + 1e-15'
    """

    relation: str
    limit: float
    of_bound: bool = False
    must_fail: bool = False

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f"relation: expected one of {', '.join(RELATIONS)}; got {self.relation!r}")
        if not math.isfinite(self.limit):
            raise ValueError(f"limit: expected a finite number; got {self.limit}")

    def verdict(self, value: float, bound: float = math.nan) -> str:
        """Judge a value; a value that is no number fails."""
        if self.relation == "none":
            return REPORTED
        limit = bound + self.limit if self.of_bound else self.limit
        if not RELATIONS[self.relation](value, limit):
            return FAILS
        return AS_IT_MUST if self.must_fail else HOLDS

    def text(self, what: str) -> str:
        """The criterion in words, `what` being the judged quantity."""
        if self.relation == "none":
            return "none: reported as it is"
        near_one = 0 < abs(1 - self.limit) < 1e-3
        limit = text(self.limit) if near_one else f"{self.limit:g}"
        if self.of_bound:
            limit = f"bound {'+' if self.limit > 0 else '-'} {abs(self.limit):g}" if self.limit else "bound"
        return f"{what} {self.relation} {limit}"


REPORT = Criterion("none", 0.0)
"""Of a number that nothing is demanded of."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table, as data: what to build, what to ask it, and what must come of it.

    Arguments:
        table: the table it stands in.
        how: name of the measurement.
        build: arguments of the construction.
        task: arguments of the task, or of the draws.
        criterion: what its main row must meet.
        null: "twin", the construction's randomised twin, or "chance" where the twin would take too long.
    """

    table: str
    how: str
    criterion: Criterion
    build: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    null: str = "twin"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Arguments:
        table: heading of the table.
        what: what was built or fitted.
        mixer: "Mamba-1", "Mamba-2", "S4D" or "time-invariant".
        dtype: precision of the weights and of the evaluation.
        sizes: sizes by name, a column each.
        quantity: what the value is.
        estimator: how it was got.
        value: the number.
        low, high: its interval; NaN where it has none.
        interval: what the interval is.
        null: the same quantity where nothing was built.
        null_is: what the null is.
        bound: the theoretical bound; NaN where there is none.
        over: what the value is reduced over.
        criterion: what it must meet, in words.
        verdict: "holds", "fails as it must" or "FAILS"; of a number that nothing is demanded of, what is found.
        ideal: the same quantity of the construction; NaN where there is none.
        ideal_is: what the ideal is.
    """

    table: str
    what: str
    mixer: str
    dtype: str
    sizes: dict[str, Any]
    quantity: str
    estimator: str
    value: float
    low: float
    high: float
    interval: str
    null: float
    null_is: str
    bound: float
    over: str
    criterion: str
    verdict: str
    ideal: float = math.nan
    ideal_is: str = ""


def counted(cell: Cell, correct: tuple[int, int], **said: Any) -> Row:
    """Return the row of an accuracy: its Wilson interval, and the criterion on the share itself."""
    share, (low, high) = correct[0] / correct[1], wilson(*correct)
    low, high = min(low, share), max(high, share)  # at 0 and 1 an end is the share itself, up to rounding
    return Row(
        table=cell.table, quantity="accuracy", value=share, low=low, high=high, interval="Wilson 95 %", bound=math.nan,
        criterion=cell.criterion.text("accuracy"), verdict=cell.criterion.verdict(share), **said,
    )  # fmt: skip


def spread(cell: Cell, quantity: str, values: Sequence[float], bound: float | None = None, **said: Any) -> Row:
    """Return the row of a deterministic error over draws: median, smallest and largest, judged at its worst draw."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    upper = cell.criterion.relation in ("<=", "<")
    worst, known = ordered[-1] if upper else ordered[0], math.nan if bound is None else bound
    return Row(
        table=cell.table, quantity=quantity, value=(ordered[middle] + ordered[~middle]) / 2, low=ordered[0],
        high=ordered[-1], interval="min .. max over the draws", bound=known,
        criterion=cell.criterion.text("largest" if upper else "smallest"),
        verdict=cell.criterion.verdict(worst, known), **said,
    )  # fmt: skip


def measured(cell: Cell, quantity: str, value: float, bound: float | None = None, **said: Any) -> Row:
    """Return the row of a number that nothing was drawn for: no interval."""
    known = math.nan if bound is None else bound
    return Row(
        table=cell.table, quantity=quantity, value=value, low=math.nan, high=math.nan, bound=known,
        interval="none: nothing is drawn", criterion=cell.criterion.text(quantity),
        verdict=cell.criterion.verdict(value, known), **said,
    )  # fmt: skip


def count(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many rows have each verdict: the three of a criterion, then what was found without one."""
    verdicts = [row.verdict for row in rows]
    return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys((HOLDS, AS_IT_MUST, FAILS, *verdicts))}


def sentence(rows: Iterable[Row]) -> str:
    """Return the verdicts in words.

    >>> sentence([])
    '0 measurements: 0 hold, 0 fail as they must, none FAILS'
    """
    counts = count(rows)
    failed = f"{counts[FAILS]} FAIL" if counts[FAILS] else "none FAILS"
    judged = f"{counts[HOLDS]} hold, {counts[AS_IT_MUST]} fail as they must, {failed}"
    found = [f"{n} {verdict}" for verdict, n in counts.items() if verdict not in (HOLDS, AS_IT_MUST, FAILS)]
    return f"{sum(counts.values())} measurements: {judged}" + (f"; {', '.join(found)}" if found else "")


def text(value: Any, *, near_one: bool = True) -> str:
    """Return a number for a reader; very near one what is missing is shown, unless not `near_one`.

    >>> [text(value) for value in (1.0, 0.9980, 3.14159e-14, 16384, 0.99999, float("nan"))]
    ['1.000', '0.998', '3.1e-14', '16384', '1 - 1.0e-05', '']
    """
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    if value == int(value) and value != 1:
        return f"{value:.0f}"
    if near_one and 0 < abs(1 - value) < 1e-3:
        return f"1 {'-' if value < 1 else '+'} {abs(1 - value):.1e}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def write_csv(path: Path, claim: str, rows: Sequence[Row]) -> None:
    """Write one line a row; each size has its own column, empty where it does not apply."""
    sizes = dict.fromkeys(name for row in rows for name in row.sizes)
    fixed = [name for name in Row.__dataclass_fields__ if name != "sizes"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["claim", *fixed[:4], *sizes, *fixed[4:]], restval="")
        writer.writeheader()
        for row in rows:
            plain = {name: getattr(row, name) for name in fixed}
            numbers = {name: "" if isinstance(v, float) and math.isnan(v) else v for name, v in plain.items()}
            writer.writerow({"claim": claim} | numbers | row.sizes)


@dataclass(frozen=True)
class Readable:
    """A table as text: its heading, what all rows share, its columns and cells, and what its letters stand for."""

    heading: str
    shared: list[tuple[str, str]]
    columns: list[str]
    cells: list[list[str]]
    notes: list[tuple[str, str]]


def readable(rows: Sequence[Row]) -> list[Readable]:
    """Return the tables for a reader: what is equal in all rows stands above, long texts below under letters."""
    headings = dict.fromkeys(row.table for row in rows)
    return [_table(heading, [row for row in rows if row.table == heading]) for heading in headings]


def _table(heading: str, rows: list[Row]) -> Readable:
    lines = [_line(row) for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = {name: [line.get(name, "") for line in lines] for name in (*_moved_last(names),)}
    shared = [(name, cells[0]) for name, cells in columns.items() if len(set(cells)) == 1 and name not in KEPT]
    left = [name for name in columns if name not in dict(shared)]
    notes: list[tuple[str, str]] = []
    for name in left:
        if max(map(len, columns[name])) > LONGEST:
            letters = dict(zip(dict.fromkeys(columns[name]), ascii_lowercase[len(notes) :], strict=False))
            notes += [(letter, f"{name}: {said}") for said, letter in letters.items()]
            columns[name] = [letters[said] for said in columns[name]]
    cells = [[columns[name][i] for name in left] for i in range(len(rows))]
    return Readable(heading, [(name, said) for name, said in shared if said], left, cells, notes)


def _moved_last(names: list[str]) -> list[str]:
    """The sizes of a later row stand before the quantity too."""
    fixed = [name for name in names if name in FIXED]
    return [*fixed[:3], *(name for name in names if name not in FIXED), *fixed[3:]]


def _line(row: Row) -> dict[str, str]:
    low, high = text(row.low), text(row.high)
    sizes = {name: f"{size:g}" if isinstance(size, float) else str(size) for name, size in row.sizes.items()}
    return (
        {"what": row.what, "mixer": row.mixer, "dtype": row.dtype} | sizes
        | {"quantity": row.quantity, "value": text(row.value), "interval": f"{low} .. {high}" if low else ""}
        | {"null": text(row.null, near_one=False), "ideal": text(row.ideal), "bound": text(row.bound), "over": row.over}
        | {"criterion": row.criterion, "verdict": row.verdict, "interval is": row.interval}
        | {"null is": row.null_is, "ideal is": row.ideal_is, "estimator": row.estimator}
    )  # fmt: skip
