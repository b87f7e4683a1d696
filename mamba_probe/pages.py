"""Pages that need no other file, hold no script and fetch nothing, whatever the text in them says."""

import base64
from pathlib import Path
from typing import Any

from mamba_probe.visible import visible
from mamba_probe.writing import write_whole

__all__ = ["POLICY", "embedded", "write_page"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page's Content-Security-Policy: pictures that it holds and its own style; no script, frame, form or request."""


def write_page(path: Path, template: str, **values: Any) -> Path:
    r"""Render a Jinja template and write it whole. Every value is escaped for HTML, and what is hidden in it is shown.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.

    Example:
        >>> import tempfile
        >>> path = write_page(Path(tempfile.mkdtemp()) / "a.html", "<p>{{ text }}</p>", text="<b>\u202e")
        >>> path.read_text()
        '<p>&lt;b&gt;\\u202e</p>'
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(str(value), keep="\n"),
    )  # fmt: skip
    page = environment.from_string(template).render(policy=POLICY, **values)
    write_whole(path, page.encode("utf-8"))
    return path


def embedded(png: Path) -> str:
    """A picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
