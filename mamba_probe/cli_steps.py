"""How a command says what it does, and what was wrong with what it was given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["answered", "err", "lines", "out", "progress"]

out, err = Console(), Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")


def answered(command: Callable[P, R]) -> Callable[P, R]:
    """Wrong input ends with exit code 2 and one clear message; a fault of ours keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            err.print("[bold red]error:[/bold red]", end=" ")
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """One line a step, with its time; on stderr, so that output can be piped."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        running: list[Any] = []

        def say(step: str) -> None:
            if running:
                bar.update(running[-1], total=1, completed=1)
            running.append(bar.add_task(step, total=None))

        yield say
        if running:
            bar.update(running[-1], total=1, completed=1)


@contextmanager
def lines() -> Iterator[Callable[[str], None]]:
    """One plain line a step as it begins, where stderr is no terminal."""
    yield lambda step: err.print(step, markup=False, highlight=False, soft_wrap=True)
