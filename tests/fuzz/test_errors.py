"""docs/errors.md: each row's error is said in these words, and the page has every row."""

from pathlib import Path

import pytest
from provoked import TABLE, page

ROWS = [(entry, row) for entry, rows in TABLE.items() for row in rows]
PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.mark.parametrize(("entry", "row"), ROWS, ids=[f"{entry}: {row.says}" for entry, row in ROWS])
def test_it_is_said(entry, row):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        row.call()
    said = str(caught.value)
    assert row.says.removeprefix("...") in said if row.says.startswith("...") else said.startswith(row.says)


def test_the_page_is_that_of_the_table():
    """Write it with `python tests/fuzz/write_errors.py`."""
    assert PAGE.read_text(encoding="utf-8") == page()
