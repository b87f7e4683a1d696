"""Pages that need no other file and fetch nothing, and run no script but their own, whatever the text in them says."""

import base64
import hashlib
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_probe.visible import visible
from mamba_probe.writing import write_whole

__all__ = ["POLICY", "Picture", "Table", "picture", "read_template", "write_page"]

TEMPLATES = Path(__file__).parent / "templates"
WIDE = 1600
"""Pixels from which a picture has two columns, and needs twice the room to be read."""


def read_template(name: str) -> str:
    """The text of a template of ours: one that extends `base.html`, or what that holds."""
    return (TEMPLATES / name).read_text(encoding="utf-8").removesuffix("\n")


def _hash(name: str) -> str:
    """A source of Content Security Policy (W3C, Level 3) that allows what stands in a file, and nothing else."""
    digest = hashlib.sha256(read_template(name).encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


POLICY = (
    f"default-src 'none'; script-src {_hash('page.js')}; style-src {_hash('page.css')}; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""The page's Content-Security-Policy: pictures that it holds, its own style and its own script, each by its hash, so
that what a text could bring is neither run nor applied; no frame, form or request."""


@dataclass(frozen=True)
class Table:
    """A table of a page: each row begins with its heading.

    Attributes:
        caption: what it has; also how a screen reader names it.
        columns, rows: the headings, and as many cells a row.
        numbers: the columns that are sorted as numbers; the others as text in which numbers are in order.
        marks: the style of a cell by its text.
        sortable: whether its order is not part of what it says.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[str] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    sortable: bool = True


@dataclass(frozen=True)
class Picture:
    """A picture that a page holds: its data, its size in pixels, and what it shows in words."""

    title: str
    source: str
    width: int
    height: int
    alt: str

    @property
    def wide(self) -> bool:
        """Whether it has two columns."""
        return self.width >= WIDE


def picture(png: Path, title: str, alt: str) -> Picture:
    """A PNG file as a picture of a page.

    Raises:
        ValueError: no PNG file.
    """
    data = png.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{png}: a page holds PNG files; this one begins with {data[:8]!r}")
    width, height = struct.unpack(">II", data[16:24])  # of its first chunk, IHDR
    return Picture(title, "data:image/png;base64," + base64.b64encode(data).decode(), width, height, alt)


def write_page(path: Path, template: str, **values: Any) -> Path:
    r"""Render a Jinja template and write it whole. Every value is escaped for HTML, and what is hidden in it is shown.

    A template that extends `base.html` needs a `title` and `contents`, which are pairs of an anchor and its name.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.

    Example:
        >>> import tempfile
        >>> path = write_page(Path(tempfile.mkdtemp()) / "a.html", "<p>{{ text }}</p>", text="<b>\u202e")
        >>> path.read_text()
        '<p>&lt;b&gt;\\u202e</p>'
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=FileSystemLoader(TEMPLATES), finalize=lambda value: visible(str(value), keep="\n"),
    )  # fmt: skip
    page = environment.from_string(template).render(policy=POLICY, **values)
    write_whole(path, page.encode("utf-8"))
    return path
