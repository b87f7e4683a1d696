"""Links of the pages lead to files, and to headings that are there."""

import re

import pytest
from markdown_it import MarkdownIt
from pages import PAGES, ROOT


def headings(page):
    """What GitHub, and the site, call each heading of a page."""
    tokens = MarkdownIt().parse(page.read_text())
    texts = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def broken(page):
    """The links of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if target.startswith(("http", "mailto")):
            continue
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in headings(there)):
            yield target


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_the_links_lead_somewhere(page):
    assert not list(broken(page))


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](page.md#one-heading) [b](page.md#other) [c](nothing.md) [d](#one-heading)")
    assert list(broken(page)) == ["page.md#other", "nothing.md"]
