"""Shell blocks of a page: every command is held to what it names, and those of `mamba-probe` can be run."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable

import typer
from pages import ROOT
from typer.testing import CliRunner

from mamba_probe.cli import app

__all__ = ["check", "commands", "run"]


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments, prompts, continued lines and variables set before it."""
    found: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            found.append(command)
    return found


def check(words: list[str]) -> None:
    """Hold a command to what is there: options, targets, files, modules, extras.

    Raises:
        ValueError: it names what is not there, or is a program that nothing here knows.
    """
    program = words[0].removeprefix(".venv/bin/")
    if program not in PROGRAMS:
        raise ValueError(f"{program}: no check for it; write one in tests/docs/shell.py")
    PROGRAMS[program](words[1:])


def run(words: list[str]) -> str:
    """Run a command of ours and return what it prints; of other programs nothing is run.

    Raises:
        ValueError: it ends with another exit code than 0.
    """
    if words[0].removeprefix(".venv/bin/") != "mamba-probe":
        return ""
    done = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"})
    if done.exit_code:
        raise ValueError(f"{shlex.join(words)}: exit code {done.exit_code}: {done.output}") from done.exception
    return done.stdout


def _ours(words: list[str]) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if not words or (words[0] not in known and not words[0].startswith("-")):
        raise ValueError(f"mamba-probe has no command {words[:1]}")
    if words[0] in known:
        known[words[0]].make_context(words[0], words[1:])  # raises click's own UsageError


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        if not re.search(rf"^{re.escape(target)}:", makefile, re.M):
            raise ValueError(f"make {target}: no such target")


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        _module(words[1], words[2:])
    elif words[0] != "-c":
        _file(words[0])


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words)
    if asked.module:
        _module(asked.training_script, asked.training_script_args)
    else:
        _file(asked.training_script)


def _module(name: str, words: list[str]) -> None:
    if name == "mamba_probe":
        _ours(words)
    elif name in PROGRAMS:
        PROGRAMS[name](words)
    elif importlib.util.find_spec(name) is None:
        raise ValueError(f"python -m {name}: no such module")


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if word.endswith(".txt"):
            _file(word)
        if extras := re.search(r"\[(.*)\]", word):
            unknown = set(extras[1].split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise ValueError(f"pip install {word}: pyproject.toml has no extra {sorted(unknown)}")


def _pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests"):
            _file(word.split("::")[0])


def _file(name: str) -> None:
    if not (ROOT / name).exists():
        raise ValueError(f"{name}: no such file in the repository")


def _anything(_words: list[str]) -> None:
    """Programs of the system, which need no check."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "mamba-probe": _ours, "make": _make, "python": _python, "python3": _python, "torchrun": _torchrun, "pip": _pip,
    "pytest": _pytest, **dict.fromkeys(("cd", "git", "hf", "ls", "cp", "mkdir", "export", "source", "."), _anything),
}  # fmt: skip
