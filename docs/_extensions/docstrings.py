r"""Docstrings as they are written here: for the eye first.

$formulas$ are mathematics, an indented block is shown as it stands, and | or a last _ mean nothing. A data's docstring
is prose: a colon in it ends no type.
"""

import re
from typing import Any

__all__ = ["readable", "setup"]

BLOCK = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE = re.compile(r"(?<![\\$`])\$([^$`]+?)\$(?!\$)", re.S)
KEPT = re.compile(r"(:[\w:]+:`[^`]*`|``.+?``|`[^`\n]*`|(?<![\w*])\*[^\s*][^*\n]*\*(?![\w*]))")
"""Roles, literals, names and emphasis."""
PROSE = ("attribute", "data", "property")
SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes|Examples?|Note):$", re.M)


def mathematics(text: str) -> str:
    r"""Dollars as reStructuredText has them.

    >>> mathematics("of $\\bar v$")
    'of :math:`\\bar v`'
    """
    text = BLOCK.sub(lambda match: f"\n\n.. math:: {' '.join(match.group(1).split())}\n\n", text)
    return INLINE.sub(lambda match: f":math:`{' '.join(match.group(1).split())}`", text)


def plain(line: str) -> str:
    r"""A line of prose in which |, * and a last _ stand for themselves.

    >>> plain("mean |cos| of effect_*, `C_`")
    'mean \\|cos\\| of effect\\_\\*, `C_`'
    """
    parts = KEPT.split(line)
    parts[::2] = [re.sub(r"(?<!\\)([|*]|(?<=\w)_(?![\w`]))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def readable(text: str) -> str:
    """The docstring in reStructuredText."""
    made: list[str] = []
    last, literal, doctest = 0, None, False
    for line in mathematics(text).split("\n"):
        indent, blank = len(line) - len(line.lstrip()), not line.strip()
        doctest = not blank and (doctest or line.lstrip().startswith(">>>"))
        if not blank and literal is not None and indent < literal:
            literal = None
        if not blank and literal is None and not doctest and made and not made[-1].strip() and indent > last:
            literal = indent
            made += [" " * last + "::", ""]
        made.append(line if doctest or literal is not None or ".. math::" in line else plain(line))
        last = last if blank else indent
    return "\n".join(made)


def before(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn what autodoc found, ahead of napoleon."""
    lines[:] = readable("\n".join(lines)).split("\n")
    if what in PROSE and not SECTION.search("\n".join(lines)):
        app.prose[name] = list(lines)


def after(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Undo what napoleon takes for a type."""
    lines[:] = app.prose.pop(name, lines)


def setup(app: Any) -> dict[str, bool]:
    """Listen to docstrings as they are read."""
    app.prose = {}
    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
