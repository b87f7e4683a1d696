"""How a training is going, on stderr: a bar on a terminal, else a line an evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import Config
from mamba_probe.training.trainer import Say

__all__ = ["progress"]


@contextmanager
def progress(name: str = "training", console: Console | None = None) -> Iterator[Say]:
    """Yield what `train` and `sweep` tell of each evaluation; one bar a learning rate.

    Arguments:
        name: what is trained.
        console: where to write; stderr if None.

    Example:
        >>> from mamba_probe.training import Config, train
        >>> task = {"name": "mqar", "length": 8, "n_pairs": 1, "vocab": 8}
        >>> config = Config(task, {"kind": "mamba1", "d_model": 4, "d_state": 2}, layers=1, steps=2, every=2, batch=2)
        >>> with progress("recall") as say:
        ...     train(config, say=say).last.step
        2
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield lambda config, point: console.print(_line(name, config, point), markup=False, soft_wrap=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        bars: dict[float, TaskID] = {}

        def say(config: Config, point: Point) -> None:
            rate = config.learning_rate
            if rate not in bars:
                bars[rate] = bar.add_task(name, total=config.steps)
            said = f"{name} at {rate:.3g}: loss {point.loss:.3f}, accuracy {point.accuracy:.3f}"
            bar.update(bars[rate], completed=point.step, description=said)

        yield say


def _line(name: str, config: Config, point: Point) -> str:
    return (
        f"{name} at {config.learning_rate:.3g}, step {point.step} of {config.steps}: loss {point.loss:.3f},"
        f" accuracy {point.accuracy:.3f}, {point.seconds:.0f} s"
    )
