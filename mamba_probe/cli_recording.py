"""What `record` and `report` do with what they are asked: where to, of which model, on what."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mamba_probe.cli_options import Backend, Task
from mamba_probe.cli_steps import command, or_else

__all__ = [
    "NO_MODEL",
    "check_alone",
    "check_free",
    "or_else_no_model",
    "place",
    "quiet_transformers",
    "recorded",
]

NO_MODEL = (
    f"{command('zoo')}, for what ships with the package",
    f"{command('inspect', 'DIRECTORY')}, for what a checkpoint of yours is to the probe",
)
"""What to type where a model is not found."""
_ZOO = "zoo:"


def place(directory: Path, *, resume: bool, overwrite: bool, **options: Any) -> Any:
    """Where `record` records to: this process' share of it, under torchrun.

    Raises:
        ValueError: going on with what is overwritten, or overwriting what other processes write to.
    """
    from mamba_probe.run_folder import Into
    from mamba_probe.to_store import shard

    if overwrite and (resume or shard() is not None):
        other = "--resume goes on with what is there" if resume else "several processes write under torchrun"
        raise ValueError(f"--overwrite removes what is there, and {other}: choose one")
    given = {name: value for name, value in options.items() if value is not None}
    into = Into(directory, overwrite, resume, shard(), given)
    return replace(into, options={**given, "progress": into.leads})


@contextmanager
def or_else_no_model(source: str, commands: Sequence[str] = NO_MODEL) -> Iterator[None]:
    """What to type next, where a block fails as there is no model of that name; not where what it holds is wrong."""
    from mamba_probe import zoo

    shipped = source.startswith(_ZOO)
    there = source.removeprefix(_ZOO) in zoo.names() if shipped else Path(source).expanduser().exists()
    with nullcontext() if there else or_else(*commands, on=ValueError if shipped else FileNotFoundError):
        yield


def _check_of_text(source: str) -> None:
    """Check that a model has a vocabulary of text.

    Raises:
        ValueError: it is of the zoo, whose ids are those of a task.
    """
    task = _task_of(source)
    if task:
        raise ValueError(
            f"{source} has no tokenizer and no vocabulary of text: its ids are those of its task, {task['name']}."
            " --text is for a model of text"
        )


def _task_of(source: str) -> dict[str, Any]:
    """The task that the card of a zoo model names, with its sizes; empty for other models."""
    from mamba_probe import zoo

    return dict(zoo.card(source.removeprefix(_ZOO))["task"]) if source.startswith(_ZOO) else {}


def _in_python(source: str, task: Task) -> list[str]:
    """How to record a zoo model on the task that its card names, where that is another."""
    own = _task_of(source)
    name = own.pop("name", task.value)
    if name == task.value:
        return []
    sizes = ", ".join(f"{key}={value!r}" for key, value in own.items())
    return [
        f"Python, for the card of {source} names the task {name}, and this command draws only {task.value}:"
        f" mp.attach(mp.load({source!r})).record(mp.tasks.{name}({sizes})), after import mamba_probe as mp"
    ]


def _device() -> str:
    """Where a model is loaded to: a GPU of its own for each process of torchrun, else the CPU."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else "cpu"


def check_free(directory: Path, overwrite: bool, otherwise: str = "") -> None:
    """Check that a directory may be written to.

    Arguments:
        otherwise: another way than to overwrite, in words.

    Raises:
        ValueError: it is a file, or holds an earlier run that is not to be overwritten.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file: -o names a directory")
    taken = [name for name in ("trace.zarr", "report.html") if (directory / name).exists()]
    if taken and not overwrite:
        raise ValueError(
            f"{directory} holds an earlier run ({', '.join(taken)}): pass --overwrite to replace it,{otherwise} or"
            " choose another directory"
        )


def check_alone() -> None:
    """Check that this is no process among others.

    Raises:
        ValueError: it is one of torchrun's.
    """
    from mamba_probe.to_store import shard

    if shard() is not None:
        raise ValueError("under torchrun only `record` runs: analyse what it wrote with `mamba-probe analyze`, alone")


def recorded(
    source: str, task: Task | None, text: Path | None, tokenizer: str | None, rows: int | None, length: int | None,
    n_pairs: int, seed: int, beside: str | None, backend: Backend, train_length: int | None, into: Any,
    say: Callable[[str], None],
) -> Any:  # fmt: skip
    """The run of a model on a task or a text.

    Raises:
        FileNotFoundError, ValueError: options that do not go together, or name what is not there.
    """
    from mamba_probe import run
    from mamba_probe.loading import load, load_tokenizer

    if (task is None) == (text is None):
        got = "neither" if task is None else "both"
        asked = ("report", "report") if into is None else ("record", "run")
        with or_else(command(asked[0], source, "--task", "mqar", "-o", asked[1])):
            raise ValueError(f"say what to record on, either --task mqar or --text FILE; got {got}")
    if text is not None and text.is_dir():
        raise ValueError(f"{text} is a directory: --text takes one file; `mamba-probe reduce` takes a folder of them")
    if text is not None and not text.is_file():
        raise FileNotFoundError(f"no text file at {text}")
    if text is not None and beside is not None:
        raise ValueError(f"--beside {beside} goes with --task: a reference is of the task's closed form, not of a text")
    if text is not None:
        with or_else_no_model(source):
            _check_of_text(source)
    say(f"loading {source}")
    quiet_transformers()
    with or_else_no_model(source):
        model = load(source, device=_device())
    options = {"train_length": train_length, "backend": backend.value, "into": into or run.MEMORY, "say": say}
    if task is not None:
        with or_else(*_in_python(source, task), on=ValueError):
            return run.record_task(
                model, task.value, rows=rows or 64, length=length or 64, n_pairs=n_pairs, seed=seed,
                beside=_reference(source, beside, model), **options,
            )  # fmt: skip
    assert text is not None
    given = run.Text(text, load_tokenizer(tokenizer or source), length or 512, rows or 4)
    return run.record_text(model, given, **options)


def _reference(source: str, beside: str | None, model: Any) -> Any:
    """The model to put beside that of `source`, if any: what was asked for, or what the card names."""
    from mamba_probe.reference import NONE
    from mamba_probe.report import load_beside, named
    from mamba_probe.run import vocabulary

    name = named(source) if beside is None else beside
    return None if name in (None, NONE) else load_beside(name, vocabulary(model))


def quiet_transformers() -> None:
    """transformers notes on every slow path that it would take; none of them is taken."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
