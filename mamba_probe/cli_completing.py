"""What a shell completes: models, analyses and runs by name. It is asked at each press of a key, and loads no torch."""

import os
import shlex
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

__all__ = ["analyses", "models", "prepare", "references", "runs"]

ASKED = "_MAMBA_PROBE_COMPLETE"
_BEFORE = "_MAMBA_PROBE_BEFORE"
"""What stands before the part of a word that bash completes; it parts words at colons."""


def models(incomplete: str) -> Iterator[tuple[str, str]]:
    """The zoo's checkpoints; directories are the shell's own to complete.

    >>> [name for name, _ in models("zoo:mqar-m")]
    ['zoo:mqar-mamba1']
    """
    from mamba_probe.zoo import card, names

    return _named(incomplete, {f"zoo:{name}": card(name)["what"].partition(".")[0] for name in names()})


def references(incomplete: str) -> Iterator[tuple[str, str]]:
    """What `--beside` takes by name."""
    kinds = {f"construction:{kind}": f"the closed form in {kind}" for kind in ("mamba1", "mamba2", "s4d")}
    known = {"none": "nothing", **kinds, **{name: what for name, what in models("") if not os.environ.get(_BEFORE)}}
    return _named(incomplete, known)


def analyses(incomplete: str) -> Iterator[tuple[str, str]]:
    """Names of analyses, also after a comma, and what stands for several.

    >>> [name for name, _ in analyses("sinks,memory")]
    ['sinks,memory_horizon']
    """
    from mamba_probe.analyses._names import names

    before, comma, last = incomplete.rpartition(",")
    known: dict[str, str] = dict.fromkeys((*names(), *(() if comma else ("all",))), "")
    for name, _ in _named(last, known):
        yield f"{before}{comma}{name}", ""


def runs(incomplete: str) -> Iterator[tuple[str, str]]:
    """Directories that hold a recording, in the directory that is typed and in those below it; also after LABEL=."""
    label, equals, path = incomplete.rpartition("=")
    folder, _, start = path.rpartition("/")
    at = Path(folder or ("/" if path.startswith("/") else "."))
    found = (store.parent for depth in ("*", "*/*") for store in at.glob(f"{depth}/trace.zarr"))
    for run in sorted(found):
        below = run.relative_to(at).as_posix()
        if below.startswith(start) and (start.startswith(".") or not below.startswith(".")):
            yield f"{label}{equals}{path[: len(path) - len(start)]}{below}", "a recorded run"


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Put the words together again that bash parted at colons, as in zoo:NAME, where a completion is asked for."""
    if environ.get(ASKED) != "complete_bash" or "COMP_WORDS" not in environ:
        return
    words, at, before = _joined(_split(environ["COMP_WORDS"]), int(environ["COMP_CWORD"]))
    environ.update({"COMP_WORDS": shlex.join(words), "COMP_CWORD": str(at), _BEFORE: before})


def _joined(words: list[str], at: int) -> tuple[list[str], int, str]:
    """Words, the number of the one that is completed, and what stands before the part of it that bash replaces.

    >>> _joined(["mamba-probe", "report", "zoo", ":", "mq"], 4)
    (['mamba-probe', 'report', 'mq'], 2, 'zoo:')
    >>> _joined(["mamba-probe", "report", "zoo", ":", "a", "--task"], 5)
    (['mamba-probe', 'report', 'zoo:a', '--task'], 3, '')
    """
    groups: list[list[str]] = []
    where = len(words)
    for number, word in enumerate(words[: at + 1]):
        follows = number > 1 and (word == ":" or words[number - 1] == ":")
        if follows:
            groups[-1].append(word)
        else:
            groups.append([word])
        where = len(groups) - 1
    if at >= len(words):
        return ["".join(group) for group in groups], len(groups), ""
    *before, last = groups[where]
    if last == ":":
        before, last = [*before, ":"], ""
    return ["".join(group) for group in groups[:where]] + [last], where, "".join(before)


def _split(line: str) -> list[str]:
    """Words of a line that may end within a quotation."""
    for end in ("", "'", '"'):
        try:
            return shlex.split(line + end)
        except ValueError:
            continue
    return line.split()


def _named(incomplete: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    before = os.environ.get(_BEFORE, "")
    for name, what in known.items():
        if name.startswith(before + incomplete):
            yield name.removeprefix(before), what
