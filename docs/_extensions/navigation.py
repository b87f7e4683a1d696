"""The front page's list is the navigation, and links to scripts lead to their pictures."""

import posixpath
import re
from pathlib import Path
from typing import Any

from gallery import FOLDER, drawn

__all__ = ["listed", "setup"]

FRONT = "docs/README"
ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+\.(?:md|rst))\)")
SCRIPT = re.compile(r"\]\((?:\.\./)*examples/(\w+)\.(py|md)\)")
NAMED = re.compile(r"(?<!\])\((examples/\w+\.py)\)")


def listed(front: str) -> dict[str, list[str]]:
    """The pages that the front page lists under each of its headings, as Sphinx names them.

    >>> listed("## Start\\n[a](notation.md), [b](../kernels/README.md), [c](../examples/README.md)")
    {'Start': ['docs/notation', 'kernels/README', 'docs/gallery/index']}
    """
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", front, flags=re.M)[1:]:
        heading, _, text = part.partition("\n")
        links = [target for target in LINK.findall(to_gallery(text)) if not target.startswith("http")]
        paths = [posixpath.normpath(posixpath.join("docs", target)).lstrip("/") for target in links]
        found[heading.strip()] = [path.rpartition(".")[0] for path in dict.fromkeys(paths)]
    return found


def to_gallery(text: str) -> str:
    """The text with links to drawn examples turned to their pages."""

    def page(match: re.Match[str]) -> str:
        name, kind = match.groups()
        if kind == "md":
            return f"](/{FOLDER}/index.rst)"
        return f"](/{FOLDER}/{name}.rst)" if name in drawn(ROOT / "examples") else match.group()

    return SCRIPT.sub(page, NAMED.sub(r"([\1](../\1))", text))


def read(app: Any, name: str, source: list[str]) -> None:
    """Turn the links, and give the front page its navigation."""
    source[0] = to_gallery(source[0])
    if name.startswith("benchmarks/"):  # results: linked from pages, not listed
        source[0] = f"---\norphan: true\n---\n{source[0]}"
    if name != FRONT:
        return
    for heading, pages in listed(source[0]).items():
        entries = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```\n"


def setup(app: Any) -> dict[str, bool]:
    """Listen to pages as they are read."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
