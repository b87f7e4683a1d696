"""An oracle that shares no code with ours: what the interpreter reports of files, sockets and processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

WATCHED = ("open", "socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec", "os.mkdir",
           "pickle.find_class")  # fmt: skip
_listening: list[list[tuple]] = []


def _heard(event: str, arguments: tuple) -> None:
    if _listening and event in WATCHED:
        for events in _listening:
            events.append((event, *arguments))


sys.addaudithook(_heard)


class Watch:
    """The events since it began."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def opened(self, folder: Path) -> set[Path]:
        """Files below `folder` that Python opened."""
        paths = {Path(os.fsdecode(e[1])).absolute() for e in self.events if e[0] == "open" and _is_path(e[1])}
        return {path for path in paths if path.is_relative_to(folder)}

    def happened(self, *names: str) -> list[tuple]:
        return [event for event in self.events if event[0] in names]

    @property
    def network(self) -> list[tuple]:
        return self.happened("socket.connect", "socket.getaddrinfo")

    @property
    def ran(self) -> list[tuple]:
        return self.happened("os.system", "subprocess.Popen", "os.exec")


def _is_path(value: object) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


@pytest.fixture
def watch() -> Iterator[Watch]:
    seen = Watch()
    _listening.append(seen.events)
    yield seen
    _listening.remove(seen.events)


class Payload:
    """A pickle of it makes the directory `mark` when it is read without guard."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "ran")
