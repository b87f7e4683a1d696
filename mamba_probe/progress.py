"""The one progress bar of long work: a widget in a notebook, a line of stderr on a terminal, nothing elsewhere.

tqdm draws it, and not rich: in a notebook rich redraws an output from a thread of its own and leaves nothing in a saved
notebook, where tqdm has a widget, and a line of text where widgets are missing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mamba_probe.visible import visible

__all__ = ["bar", "drawn"]


@contextmanager
def bar(doing: str, total: int | None, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yields what is told of each step's begin, by a name for it, and, with nothing, of its end.

    >>> with bar("recording", 2, shown=False) as step:
    ...     step("rows 0 to 7")
    ...     step("")
    """
    with drawn(doing, total, shown) as line:

        def step(what: str) -> None:
            if what:
                line.set_description(visible(what))
            else:
                line.update()

        yield step


def drawn(doing: str, total: int | None, shown: bool = True) -> Any:
    """A bar of tqdm; its `disable` says that there is neither a terminal nor a notebook to draw it, or that it is not
    to be `shown`."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=visible(doing), disable=None if shown else True)
