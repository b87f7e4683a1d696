"""What a notebook shows of a probe, a recorder or a trace: a small table that takes its colours from the page.

No colour, font or script is set, so that it reads in light and dark notebooks alike; every text is escaped, since names
of layers, models and variables may be anyone's.
"""

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["card"]

_CELL = 'style="text-align: left; vertical-align: top; background: none; color: inherit"'


def card(head: str, columns: Sequence[str], rows: Iterable[Sequence[object]], facts: Iterable[str] = ()) -> str:
    r"""A head, a table below it, and facts below that, as HTML.

    Args:
        head: one line, its first word set bold.
        columns: headings of the table.
        rows: as many cells each.
        facts: a line each.

    Returns:
        HTML in which every text is escaped, and what is not printable in it is shown as Python would.

    >>> card("trace (mamba)", ["variable"], [["<b>\u202e"]])[-63:]
    'color: inherit">&lt;b&gt;\\u202e</td></tr></tbody></table></div>'
    """
    name = head.split(" ")[0]
    lines = [f"<div><strong>{_text(name)}</strong>{_text(head.removeprefix(name))}</div>"]
    cells = list(rows)
    if cells:
        heads = "".join(f"<th {_CELL}>{_text(column)}</th>" for column in columns)
        body = "".join(f"<tr>{''.join(f'<td {_CELL}>{_text(cell)}</td>' for cell in row)}</tr>" for row in cells)
        lines.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")
    lines += [f"<div>{_text(fact)}</div>" for fact in facts]
    return f"<div>{''.join(lines)}</div>"


def _text(text: object) -> str:
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))
    return escape(shown)
