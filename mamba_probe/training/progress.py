"""How a training is going: a bar on a terminal and in a notebook, else a line an evaluation on stderr."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mamba_probe.progress import drawn
from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import Config
from mamba_probe.training.trainer import Say
from mamba_probe.visible import visible

__all__ = ["progress"]


@contextmanager
def progress(name: str = "training") -> Iterator[Say]:
    """Yield what `train` and `sweep` tell of each evaluation; one bar a learning rate.

    Arguments:
        name: what is trained.

    Example:
        >>> from mamba_probe.training import Config, train
        >>> task = {"name": "mqar", "length": 8, "n_pairs": 1, "vocab": 8}
        >>> config = Config(task, {"kind": "mamba1", "d_model": 4, "d_state": 2}, layers=1, steps=2, every=2, batch=2)
        >>> with progress("recall") as say:
        ...     train(config, say=say).last.step
        2
    """
    with ExitStack() as opened:
        bars: dict[float, Any] = {}

        def say(config: Config, point: Point) -> None:
            rate = config.learning_rate
            if rate not in bars:
                bars[rate] = opened.enter_context(drawn(f"{name} at {rate:.3g}", config.steps))
            bar = bars[rate]
            if bar.disable:
                print(visible(_line(name, config, point)), file=sys.stderr)
                return
            bar.set_postfix_str(f"loss {point.loss:.3f}, accuracy {point.accuracy:.3f}", refresh=False)
            bar.update(point.step - bar.n)
            bar.refresh()

        yield say


def _line(name: str, config: Config, point: Point) -> str:
    return (
        f"{name} at {config.learning_rate:.3g}, step {point.step} of {config.steps}: loss {point.loss:.3f},"
        f" accuracy {point.accuracy:.3f}, {point.seconds:.0f} s"
    )
