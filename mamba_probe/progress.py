"""The one progress bar of long work: on stderr, with what is done now and the time that is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(doing: str, total: int | None, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yields what is told of each step's begin, by a name for it, and, with nothing, of its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as shown_bar:
        task = shown_bar.add_task(doing, total=total)
        yield lambda what: shown_bar.update(task, description=what) if what else shown_bar.advance(task)
