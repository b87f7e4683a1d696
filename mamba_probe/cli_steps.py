"""How a command says what it does, and what was wrong with what it was given."""

import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from mamba_probe.visible import visible

__all__ = ["Commands", "Terminal", "answered", "command", "err", "headed", "lines", "or_else", "out", "progress"]


class Terminal(Console):
    """A console to which text is text: names and messages from anyone are no markup, no emoji and no control codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, and every cell of a table, comes by here."""
        return super().render_str(visible(text, keep="\n\t"), **options)


out, err = Terminal(), Terminal(stderr=True)


def headed(head: str, text: object) -> Text:
    """A bold head, a colon and a text."""
    return Text.assemble((visible(head), "bold"), ": ", visible(str(text), keep="\n"))


P = ParamSpec("P")
R = TypeVar("R")


def answered(command: Callable[P, R]) -> Callable[P, R]:
    """Wrong input ends with exit code 2 and one clear message; a fault of ours keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            try:
                return command(*args, **kwargs)
            except (ValueError, OSError) as error:
                err.print("error:", style="bold red", end=" ")
                err.print(str(error), highlight=False, soft_wrap=True)
                for line in getattr(error, "__notes__", ()):
                    err.print(headed("try", line), highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None

    return run


def _warned(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning is one line: where in our code it was given helps nobody here."""
    err.print(headed("warning", message), highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """Commands whose options say of a wrong choice which is the nearest."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _nearest(error.message)
            raise


def _nearest(message: str) -> str:
    """What Typer says of a wrong choice, without the words of the library it checks with, and the nearest.

    >>> _nearest("Value error, 'mqr' is not one of 'mqar'.")
    "'mqr' is not one of 'mqar': did you mean 'mqar'?"
    """
    from mamba_probe.trace.contract import nearest

    message = message.removeprefix("Value error, ")
    found = re.fullmatch(r"'(.*)' is not one of (.*)\.", message)
    near = nearest(found[1], re.findall("'([^']*)'", found[2])) if found else ""
    return f"{message.removesuffix('.')}: {near}" if near.startswith("did you") else message


def command(*words: object) -> str:
    """A command of ours, as it can be pasted into a shell; names in capitals are for the reader to fill in.

    >>> command("verify", "my run")
    "mamba-probe verify 'my run'"
    """
    return shlex.join(["mamba-probe", *map(str, words)])


@contextmanager
def or_else(
    *commands: str, on: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """What to type next, where the block fails: `answered` says it below what was wrong."""
    try:
        yield
    except on as error:
        for each in commands:
            error.add_note(each)
        raise


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """One line a step, with its time, on stderr; where that is no terminal, a plain line as each step begins."""
    if not err.is_terminal:  # a bar would be written once, at its end
        with lines() as say:
            yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err) as bar:
        running: list[Any] = []

        def begin(step: str) -> None:
            if running:
                bar.update(running[-1], total=1, completed=1)
            running.append(bar.add_task(visible(step), total=None))

        yield begin
        if running:
            bar.update(running[-1], total=1, completed=1)


@contextmanager
def lines(shown: bool = True) -> Iterator[Callable[[str], None]]:
    """One plain line a step as it begins: where stderr is no terminal, or has a bar of its own."""
    yield lambda step: err.print(step, highlight=False, soft_wrap=True) if shown else None
