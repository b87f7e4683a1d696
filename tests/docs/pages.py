"""The pages and their code blocks.

What a reader does not see stands in HTML comments before a block:

    <!-- not run: REASON -->              Python is then only compiled, shell only parsed
    <!-- run by tests/PATH.py: REASON --> the block needs more than a page gives it; that test reads the page
    <!-- all run by ... -->               the same, anywhere, of every block of the page
    <!-- long -->                         anywhere: the page runs in `make test-long`

and `<!-- check`, Python, `-->` is run where it stands: what a page promises and does not print. A block of `text` is
what the block before it prints, `...` standing for anything.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["PAGES", "ROOT", "Block", "blocks", "is_long"]

ROOT = Path(__file__).parents[2]
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not re.search(r"/[_.]", str(page.relative_to(ROOT)))]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "examples/README.md")] + DOCS

MARKER = re.compile(r"<!-- (not run|(?:all )?run by \S+): (\S.*) -->\s*")
CHECK = re.compile(r"<!-- check\n(.*)-->\s*", re.S)
LONG = "<!-- long -->"


@dataclass(frozen=True)
class Block:
    """A code block: its language ("check": Python that is not seen), text, first line, and what its marker says."""

    language: str
    code: str
    line: int
    marker: str = ""
    reason: str = ""


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in their order.

    Raises:
        ValueError: a comment begins as a marker does and is none, or marks no block.
    """
    found, marker, whole = [], ("", ""), ("", "")
    for token in MarkdownIt().parse(text):
        if token.map is None:  # the end of something
            continue
        line = token.map[0] + 1
        if token.type == "html_block" and (comment := token.content).startswith("<!--"):
            if check := CHECK.fullmatch(comment):
                found.append(Block("check", check[1], line + 1))
            elif (known := MARKER.fullmatch(comment)) and known[1].startswith("all "):
                whole = known[1].removeprefix("all "), known[2]
            elif known:
                marker = known[1], known[2]
            elif re.match(r"<!--\s*(not run|run by|all run by|check|long)", comment) and comment.strip() != LONG:
                raise ValueError(f"line {line}: {comment.strip()!r} is no marker as tests/docs/pages.py has them")
        elif token.type in ("fence", "code_block"):
            found.append(Block(token.info.strip(), token.content, line + (token.type == "fence"), *marker))
            marker = "", ""
        elif marker != ("", ""):
            raise ValueError(f"line {line}: the marker before it marks no block")
    if marker != ("", ""):
        raise ValueError("the last marker marks no block")
    return [
        replace(block, marker=whole[0], reason=whole[1]) if whole[0] and not block.marker else block for block in found
    ]


def is_long(text: str) -> bool:
    """Whether a page takes too long for `make test`."""
    return LONG in text.splitlines()
