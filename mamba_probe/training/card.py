"""What a trained model is, in numbers that its weights reproduce."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from mamba_probe.analyses.common.proportion import wilson
from mamba_probe.kernels.scan import choose_backend
from mamba_probe.provenance import versions
from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import Config
from mamba_probe.training.trainer import Result, answered

__all__ = ["UNSEEN_BATCHES", "counted", "describe"]

UNSEEN_BATCHES = 16
"""Test batches that a card's accuracy is counted over."""
TOKENS = 2**27
"""At most so many tokens of them: of very long rows fewer batches, at least one, as the card says."""


def describe(
    result: Result, name: str, what: str, *, regenerate: str, unseen_batches: int = UNSEEN_BATCHES,
    beyond: Sequence[Mapping[str, Any]] = (), trials: Mapping[float, Sequence[Point]] | None = None,
    commit: str | None = None, beside: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the card of a trained model, counting its accuracy on rows that neither training nor choices have seen.

    `accuracy` is `answered(model, config, "test", unseen_batches)` with its Wilson interval (95 %, the queries taken
    as independent); the test rows stop no training and choose no rate. Source: ours.

    Arguments:
        result: a finished training.
        name: of the checkpoint.
        what: it is, in a sentence.
        regenerate: the command that trains it again.
        unseen_batches: test batches to count over.
        beyond: changes of the task to count the same over, such as `{"length": 512}`.
        trials: curves of the learning rates tried.
        commit: of the source, for a copy without its history; what git says if None.
        beside: the reference that a report of this model shows, as `mamba-probe report --beside` takes it.

    Raises:
        ValueError: the training is not finished, or diverged.
    """
    if not result.finished or result.ended == "diverged":
        raise ValueError(f"{name}: a card is of a finished training; this one ended by {result.ended!r}")
    config, model = result.config, result.model
    task = {"name": config.task["name"], **config.draw(config.batch, 0).params}
    curves = {f"{rate:.3g}": [asdict(point) for point in curve] for rate, curve in (trials or {}).items()}
    return {
        "name": name,
        "what": what,
        "origin": "ours: trained by mamba_probe.training",
        "dtype": config.dtype,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "task": {key: value for key, value in task.items() if key != "seed" and value is not None},
        "accuracy": counted(model, config, unseen_batches),
        "beyond": [{"task": dict(task), **counted(model, _changed(config, task), unseen_batches)} for task in beyond],
        "data": "rows drawn anew each step; accuracy on test rows, whose seeds no training or validation draws",
        "seed": config.seed,
        "config": asdict(config),
        "ended": result.ended,
        "curve": [asdict(point) for point in result.curve],
        "trials": curves,
        "engine": sorted({_engine(layer.mixer.backend, config.device) for layer in model.backbone.layers}),  # type: ignore[union-attr]
        "commit": _commit() if commit is None else commit,
        "versions": versions(),
        "beside": beside,
        "regenerate": regenerate,
        "license": "Apache-2.0",
    }


def counted(model: nn.Module, config: Config, batches: int) -> dict[str, Any]:
    """Return the accuracy on test rows: correct, total, value and its Wilson interval, and the batches counted, fewer
    than asked for where they are of more than `TOKENS`."""
    batches = max(1, min(batches, TOKENS // config.draw(config.batch, 0).input_ids.size))
    correct, total = answered(model, config, "test", batches)
    low, high = wilson(correct, total)
    return {"correct": correct, "total": total, "value": correct / total, "low": low, "high": high, "batches": batches}


def _changed(config: Config, task: Mapping[str, Any]) -> Config:
    return replace(config, task={**config.task, **task}, mixture=())


def _engine(backend: str, device: str) -> str:
    return f"{choose_backend(device).name if backend == 'auto' else backend} on {device}"


def _commit() -> str:
    """The commit of this source, "+" behind it where tracked files differ from it; "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).resolve()
    commands = (["ls-files", "--error-unmatch", here], ["rev-parse", "HEAD"], ["diff-index", "--quiet", "HEAD"])
    ours, head, same = (
        subprocess.run(["git", "-C", here.parent, *c], capture_output=True, text=True) for c in commands
    )
    return "unknown" if ours.returncode or head.returncode else head.stdout.strip() + ("+" if same.returncode else "")
