"""Verdicts, intervals and the text of tables."""

import csv
import math
import re

import pytest

from mamba_probe.reproduce.table import (
    AS_IT_MUST,
    FAILS,
    HOLDS,
    Cell,
    Criterion,
    count,
    counted,
    measured,
    readable,
    sentence,
    spread,
    text,
    write_csv,
)  # fmt: skip

SAID = {
    "what": "thing", "mixer": "Mamba-1", "dtype": "float32", "sizes": {"T": 64}, "estimator": "by hand", "null": 0.5,
    "null_is": "chance", "over": "3 draws",
}  # fmt: skip


def cell(relation, limit, **options):
    return Cell("a table", "how", Criterion(relation, limit, **options))


@pytest.mark.parametrize(
    ("relation", "met", "missed"),
    [("<=", 1.0, 1.1), (">=", 1.0, 0.9), ("<", 0.9, 1.0), (">", 1.1, 1.0), ("=", 1.0, 0.999)],
)
def test_a_criterion_holds_on_one_side_alone(relation, met, missed):
    assert Criterion(relation, 1.0).verdict(met) == HOLDS
    assert Criterion(relation, 1.0).verdict(missed) == FAILS
    assert Criterion(relation, 1.0, must_fail=True).verdict(met) == AS_IT_MUST
    assert Criterion(relation, 1.0, must_fail=True).verdict(missed) == FAILS
    assert Criterion(relation, 1.0).verdict(math.nan) == FAILS


def test_a_criterion_on_the_bound_needs_one():
    near = Criterion("<=", 0.1, of_bound=True)
    assert near.verdict(1.05, bound=1.0) == HOLDS
    assert near.verdict(1.2, bound=1.0) == FAILS
    assert near.verdict(0.0) == FAILS
    assert near.text("error") == "error <= bound + 0.1"
    assert Criterion(">=", -1e-9, of_bound=True).text("error") == "error >= bound - 1e-09"
    assert Criterion("<=", 0.0, of_bound=True).text("error") == "error <= bound"


def test_wrong_criteria():
    with pytest.raises(ValueError, match=r"relation: expected one of <=, >=, <, >, =, none; got '=='"):
        Criterion("==", 1.0)
    with pytest.raises(ValueError, match="limit: expected a finite number; got nan"):
        Criterion("<=", math.nan)


def test_errors_are_judged_at_their_worst_draw():
    row = spread(cell("<=", 3.0), "error", [1.0, 4.0, 2.0], **SAID)
    assert (row.value, row.low, row.high, row.verdict) == (2.0, 1.0, 4.0, FAILS)
    assert row.criterion == "largest <= 3"
    row = spread(cell(">", 0.5, must_fail=True), "error", [1.0, 4.0, 2.0, 0.6], **SAID)
    assert (row.value, row.verdict, row.criterion) == (1.5, AS_IT_MUST, "smallest > 0.5")
    assert spread(cell(">", 0.7, must_fail=True), "error", [1.0, 0.6], **SAID).verdict == FAILS
    assert spread(cell("<=", 0.0, of_bound=True), "error", [1.0, 2.0], bound=2.0, **SAID).verdict == HOLDS


def test_accuracies_have_their_wilson_interval():
    row = counted(cell("=", 1), (9, 10), **SAID)
    assert (row.value, row.verdict) == (0.9, FAILS)
    assert (row.low, row.high) == pytest.approx((0.596, 0.982), abs=1e-3)
    row = counted(cell("=", 1), (512, 512), **SAID)
    assert (row.value, row.high, row.verdict) == (1.0, 1.0, HOLDS)
    assert row.low == pytest.approx(512 / (512 + 3.8415), abs=1e-4)


def test_verdicts_are_counted():
    rows = [measured(cell("<=", limit), "error", 1.0, **SAID) for limit in (2.0, 0.5)]
    rows.append(measured(cell(">", 0.5, must_fail=True), "error", 1.0, **SAID))
    assert count(rows) == {HOLDS: 1, AS_IT_MUST: 1, FAILS: 1}
    assert sentence(rows) == "3 measurements: 1 hold, 1 fail as they must, 1 FAIL"


def test_numbers_read_well():
    assert text(1 - 1e-14) == "1 - 1.0e-14"
    assert [text(value) for value in (0.0, 511.0, 12.5, 1e-9, "a .. b")] == ["0", "511", "12.500", "1.0e-09", "a .. b"]


def test_what_rows_share_stands_above_and_long_texts_below():
    rows = [
        measured(cell("<=", 2.0), "error", 1.0, **SAID | {"estimator": long, "sizes": sizes})
        for long, sizes in (("x" * 60, {"T": 64}), ("y" * 60, {"T": 64, "N": 4}), ("x" * 60, {"T": 256}))
    ]
    (table,) = readable(rows)
    assert dict(table.shared)["mixer"] == "Mamba-1"
    assert table.columns == ["T", "N", "value", "verdict", "estimator"]
    assert [line[:2] + line[-1:] for line in table.cells] == [["64", "", "a"], ["64", "4", "b"], ["256", "", "a"]]
    assert table.notes == [("a", "estimator: " + "x" * 60), ("b", "estimator: " + "y" * 60)]


def test_csv_has_a_line_a_row_and_a_column_a_size(tmp_path):
    rows = [measured(cell("<=", 2.0), "error", 0.1 + 0.2, **SAID | {"sizes": sizes}) for sizes in ({"T": 64}, {"N": 4})]
    write_csv(tmp_path / "x.csv", "claim", rows)
    with (tmp_path / "x.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["T"], first["N"], second["T"], second["N"]) == ("64", "", "", "4")
    assert float(first["value"]) == 0.1 + 0.2
    assert (first["low"], first["bound"], first["verdict"]) == ("", "", "holds")
    assert not re.search(r"\bnan\b", (tmp_path / "x.csv").read_text())
