"""Several learning rates tried, the best trained to its end: recall hangs on the rate."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import Config
from mamba_probe.training.trainer import Result, Say, train

__all__ = ["LEARNING_RATES", "Sweep", "sweep"]

LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2)
"""The upper half of the range of Zoology's logspace(-4, -2, 4), where small models learn soonest."""


@dataclass(frozen=True)
class Sweep:
    """A sweep: `trials` holds the curve of each rate over the trial, `best` the rate that was trained on.

    `result` is the best rate's training; `best` and `result` are None while trials are missing (out of time).
    """

    trials: dict[float, tuple[Point, ...]]
    best: float | None
    result: Result | None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.result is not None and self.result.finished


def sweep(
    config: Config, out: str | PathLike[str], *, learning_rates: Sequence[float] = LEARNING_RATES,
    trial: int | None = None, seconds: float | None = None, say: Say = lambda config, point: None,
) -> Sweep:  # fmt: skip
    """Train `trial` steps at each rate, then the best to its end, each in a directory of its own, resumed if there.

    The best has the greatest accuracy on the validation rows, the least loss among equals. A trial is the beginning
    of the training itself, schedule included, so the best is gone on with and not started anew. Source: ours.

    Arguments:
        config: of every training, but for its learning rate.
        out: directory; each rate's is `out/rate-RATE`.
        learning_rates: to try, each once.
        trial: steps of a trial, a multiple of `config.every`; a quarter of `config.steps`, rounded up, if None.
        seconds: stop, to be resumed, at the first evaluation after so long.
        say: told of each evaluation.

    Raises:
        ValueError: no rate, one twice, or what `train` refuses.

    Example:
        >>> import tempfile
        >>> task = {"name": "mqar", "length": 8, "n_pairs": 1, "vocab": 8}
        >>> config = Config(task, {"kind": "mamba1", "d_model": 4, "d_state": 2}, layers=1, steps=2, every=1, batch=2)
        >>> swept = sweep(config, tempfile.mkdtemp(), learning_rates=(1e-3, 1e-2), trial=1)
        >>> sorted(swept.trials), swept.result.config.learning_rate == swept.best
        ([0.001, 0.01], True)
    """
    if not learning_rates or len(set(learning_rates)) < len(learning_rates):
        raise ValueError(f"learning_rates must be at least one, each once; got {list(learning_rates)}")
    trial = config.every * -(-config.steps // (4 * config.every)) if trial is None else trial
    clock, trials = _Clock(seconds), {}
    for rate in learning_rates:
        tried = train(_at(config, rate), _place(out, rate), until=trial, seconds=clock.left(), say=say)
        trials[rate] = tuple(point for point in tried.curve if point.step <= trial)
        if tried.ended == "seconds":
            return Sweep(trials, None, None)
    best = max(trials, key=lambda rate: (trials[rate][-1].accuracy, -trials[rate][-1].loss))
    result = train(_at(config, best), _place(out, best), seconds=clock.left(), say=say)
    return Sweep(trials, best, result)


def _at(config: Config, rate: float) -> Config:
    return replace(config, learning_rate=rate)


def _place(out: str | PathLike[str], rate: float) -> Path:
    return Path(out) / f"rate-{rate:.3g}"


class _Clock:
    """What is left of a budget of seconds; None when there is none."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.perf_counter() + seconds

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.perf_counter())
