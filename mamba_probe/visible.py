"""Text from anyone, made visible: what would steer a terminal, a page or a reader's eye is shown as its escape."""

import re
from typing import Any

__all__ = ["literal", "visible"]

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
r"""Control characters (C0, C1), soft hyphen, zero-width and line separators, bidirectional marks, embeddings, overrides
and isolates, annotations, lone surrogates and tags."""


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every character that is not seen, or that reorders what is seen, as Python would escape it.

    Source: ours; the bidirectional controls are those of Unicode's UAX #9, section 2.

    Args:
        text: anything.
        keep: characters that stay as they are, such as a line end where lines are ours.

    Example:
        >>> visible("a\x1b[31mb\u202ec\n"), visible("a\nb", keep="\n")
        ('a\\x1b[31mb\\u202ec\\n', 'a\nb')
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def literal(value: Any) -> Any:
    r"""What matplotlib draws as it stands: visible, and with each dollar escaped, which would begin its mathematics.

    Line ends stay. Strings within a dict, list or tuple are made so too; what is no text is returned as it is.

    Example:
        >>> literal("$x^2$ \u202e"), literal({"a": ["$", 1]})
        ('\\$x^2\\$ \\u202e', {'a': ['\\$', 1]})
    """
    if isinstance(value, str):
        return visible(value, keep="\n").replace("$", r"\$")
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    return type(value)(map(literal, value)) if type(value) in (list, tuple) else value
