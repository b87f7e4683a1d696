"""docs/performance.md: every number of its tables and text stands in a result that its section links."""

import re

import pytest
from pages import ROOT

PAGE = ROOT / "docs" / "performance.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
NUMBER = re.compile(r"(?<![\w.,/-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?|(?<![\w.,])\.\d+")


def numbers(text):
    """The numbers of a text, without its links, code and Mamba-1 or -2."""
    bare = re.sub(r"\]\([^)]*\)|`[^`]*`|\[[\w/-]+\.md\]", " ", text)
    return {number.rstrip(",") for number in NUMBER.findall(bare)}


def plain(number):
    value = number.replace(",", "")
    return value.lstrip("0") if "." in value and "e" not in value else value


@pytest.mark.parametrize("section", SECTIONS, ids=[text.splitlines()[0] for text in SECTIONS])
def test_what_is_quoted_is_there(section):
    results = {PAGE.parent / link for link in re.findall(r"\]\((\.\./benchmarks/[^)]*)\)", section)}
    assert all(result.exists() for result in results)
    there = {plain(number) for result in results for number in numbers(result.read_text().replace("**", " "))}
    quoted = {number for number in numbers(section) if "." in number or len(number) > 2}
    missing = sorted(number for number in quoted if plain(number) not in there)
    assert results or not quoted
    assert not missing, missing


def test_a_number_that_is_made_up_is_found():
    section = "\n| y | 0.123 |\n[r](../benchmarks/results/scan-h200.md)"
    with pytest.raises(AssertionError, match="123"):
        test_what_is_quoted_is_there(section)
