"""Mathematics as MathML, made while the site is built: no script, no font, nothing fetched."""

import re
from html import escape
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

__all__ = ["setup"]

LOG = logging.getLogger(__name__)
UNKNOWN = re.compile(r"<m\w+[^>]*>\\\w+|<mtext>[^<]*\$")
"""A command that the converter left as it stands, or a dollar inside of text."""
FENCE = re.compile(r"<mo(?: (?:stretchy|fence)=\"false\")*>(&#x0007C;|&#x02016;)</mo>")
"""Bars of a norm, which a browser would space as it does operators."""
SPELLED = {r"\\langle(?![a-z])": "\u27e8", r"\\rangle(?![a-z])": "\u27e9", r"\\arg(?![a-z])": r"\\operatorname{arg}"}
"""What it does not know, or not everywhere, in words that it knows."""


def mathml(latex: str, display: str, node: nodes.Node) -> str:
    """The formula as MathML with its LaTeX beside it; a warning, which the strict build refuses, where it cannot be."""
    for unknown, known in SPELLED.items():
        latex = re.sub(unknown, known, latex)
    try:
        made = convert(latex, display=display)
    except Exception as error:
        LOG.warning("no MathML of %r: %r", latex, error, location=node)
        return f"<code>{escape(latex)}</code>"
    if UNKNOWN.search(made):
        LOG.warning("MathML knows not all of %r: %s", latex, UNKNOWN.search(made), location=node)
    return FENCE.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', made)


def visit_math(writer: Any, node: nodes.Element) -> None:
    writer.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.Element) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block", node)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer and use it."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
