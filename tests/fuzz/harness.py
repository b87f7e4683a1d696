"""A case of a fuzzer, its verdict, and runs over many: every case is drawn from a committed seed and is JSON itself.

A case passes if it gives a clean result (its fuzzer says what that is) or raises our error: a ValueError or a
FileNotFoundError that was raised in this package, with a message. Anything else is a finding: another exception, an
error that a library raised through us, a warning, an unclean result, or more than LIMIT seconds of processor time.
A finding, once mended, goes into corpus/NAME.json, whose cases run with every `make test`.
"""

import json
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OURS = tuple(str((ROOT / name).resolve()) + "/" for name in ("mamba_probe", "kernels", "analyses"))
LIMIT = 20.0
"""Seconds of this process' processor time that a case may take."""
MEMORY = 2**32
"""Bytes of address space that a case may take on top of what is taken."""

ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "3": lambda: 3,
    "10**15": lambda: 10**15,
    "-2**63": lambda: -(2**63),
    "2**64": lambda: 2**64,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "1e300": lambda: 1e300,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "text": lambda: "delta",
    "no text": lambda: "",
    "accents": lambda: "ß\x00\ud800",
    "bytes": lambda: b"\xff",
    "[]": lambda: [],
    "[0]": lambda: [0],
    "[1, 0]": lambda: [1, 0],
    "[0, 0]": lambda: [0, 0],
    "[-1]": lambda: [-1],
    "[99]": lambda: [99],
    "[2**64]": lambda: [2**64],
    "[0.5]": lambda: [0.5],
    "[None]": lambda: [None],
    "['a']": lambda: ["a"],
    "[True]": lambda: [True],
    "[[0], [0, 1]]": lambda: [[0], [0, 1]],
    "{}": lambda: {},
    "{'a': 1}": lambda: {"a": 1},
    "{0}": lambda: {0},
    "range": lambda: range(2),
    "slice": lambda: slice(None),
    "object": object,
    "type": lambda: int,
    "array 0": lambda: np.zeros(0),
    "array 2x3": lambda: np.zeros((2, 3)),
    "array of text": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, 1], dtype=object),
    "int64": lambda: np.int64(1),
    "tensor": lambda: torch.zeros(2, 3),
    "tensor of bool": lambda: torch.ones(2, 3, dtype=torch.bool),
    "meta tensor": lambda: torch.zeros(2, 3, device="meta"),
    "dtype": lambda: torch.float32,
    "dataset": lambda: __import__("xarray").Dataset(),
}
"""Values that nobody means, by the name under which a case has them."""
odd = st.sampled_from(sorted(ODD))


class Unclean(AssertionError):
    """A result that no call may give in silence."""


class TooLong(BaseException):
    """A case took more than LIMIT seconds."""


@dataclass(frozen=True)
class Fuzzer:
    """What draws cases and what runs one.

    `run` returns after a clean result, raises what the package raised, and `Unclean` where a result is wrong.
    """

    name: str
    cases: st.SearchStrategy[Any]
    run: Callable[[Any], None]
    long: int
    """Cases of the whole run, in runs of `shard`."""
    short: int
    """Cases in `make test`."""
    shard: int = 500


@dataclass
class Found:
    """What a run of a fuzzer met."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], tuple[str, Any]] = field(default_factory=dict)

    def text(self) -> str:
        parts = [
            f"{at}: {kind}: {text[:600]}\n  {json.dumps(case)}" for (kind, at), (text, case) in self.findings.items()
        ]
        return f"{len(parts)} kind(s) of finding\n" + "\n".join(parts)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLong after so much processor time (pytest-timeout has the clock), and lend MEMORY more bytes alone."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {seconds} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_ours(error: BaseException) -> bool:
    """Whether it is a refusal that our code raised itself, in words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    right = isinstance(error, ValueError | FileNotFoundError) and not isinstance(error, UnicodeError)
    return right and str(Path(last.filename).resolve()).startswith(OURS) and len(str(error)) >= 15


def place(error: BaseException) -> str:
    """Where our code was when it was raised, and where that was."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if str(Path(frame.filename).resolve()).startswith(OURS)]
    return " > ".join(
        f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}" for f in (*own[-1:], frames[-1])
    )


def judged(fuzzer: Fuzzer, case: Any, found: Found) -> None:
    """Run a case and count its verdict."""
    try:
        with limited(LIMIT):
            fuzzer.run(case)
        found.counts["clean"] += 1
    except (Exception, TooLong) as error:
        # under pytest the arguments of analyses are checked by their annotations, too
        if is_ours(error) or type(error).__name__ == "TypeCheckError":
            found.counts["our error"] += 1
            return
        found.counts["finding"] += 1
        found.findings.setdefault((type(error).__name__, place(error)), (str(error), case))


def explored(fuzzer: Fuzzer, n_cases: int, seed: int) -> Found:
    """Draw `n_cases` from a seed and judge each."""
    found = Found()

    @hypothesis.seed(seed)
    @settings(
        max_examples=n_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(fuzzer.cases)
    def each(case: Any) -> None:
        judged(fuzzer, case, found)

    each()
    return found


def corpus(name: str) -> list[Any]:
    """Cases that were findings once."""
    path = HERE / "corpus" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def replayed(fuzzer: Fuzzer) -> Found:
    """Judge every case of the corpus."""
    found = Found()
    for case in corpus(fuzzer.name):
        judged(fuzzer, case, found)
    return found
