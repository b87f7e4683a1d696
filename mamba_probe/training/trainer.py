"""One training: fresh rows each step, an evaluation and a checkpoint every so often, resumed to the bit."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mamba_probe.training import checkpoint
from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import Config
from mamba_probe.training.data import held_out, rows

__all__ = ["Result", "Say", "answered", "initial", "train"]

Say = Callable[[Config, Point], None]
TOKENS_A_CALL = 2**20
"""Of held-out rows in one forward: its memory is bounded so."""
UNDECAYED = ("A_log", "D", "dt_bias", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")


@dataclass(frozen=True)
class Result:
    """What came of a training: the model in eval mode, the curve, and why it ended.

    `ended` is "steps" (all of them), "accuracy" (`stop_at` reached), "diverged" (the loss was not finite), or, for a
    training that can be resumed, "until" or "seconds".
    """

    config: Config
    model: nn.Module = field(repr=False)
    curve: tuple[Point, ...] = field(repr=False)
    ended: str

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.ended not in ("until", "seconds")

    @property
    def last(self) -> Point:
        """The last evaluation."""
        return self.curve[-1]


def train(
    config: Config, out: str | PathLike[str] | None = None, *, until: int | None = None,
    seconds: float | None = None, say: Say = lambda config, point: None,
) -> Result:  # fmt: skip
    r"""Train a model on rows that are drawn anew each step, and resume where a checkpoint is.

    The loss is the cross-entropy over the task's queries,

    .. math:: -\frac{1}{|Q|} \sum_{(b, t) \in Q} \log \text{softmax}(\text{logits}_{b, t})_{\text{target}_{b, t}}

    Data are a function of seed and step, so a training that was interrupted anywhere and is resumed from its last
    checkpoint ends bit for bit where it would have ended without the interruption, on a CPU with as many threads.
    Source: ours.

    Arguments:
        config: what to train.
        out: directory of the checkpoint; made if missing, resumed if it holds one. None writes nothing.
        until: stop, to be resumed, after this many steps, a multiple of `config.every`.
        seconds: stop, to be resumed, at the first evaluation of this call after so long.
        say: told of each evaluation.

    Raises:
        ValueError: `until` or `seconds` out of range, a device that is not there, `out` of another training.

    Example:
        >>> task = {"name": "mqar", "length": 8, "n_pairs": 1, "vocab": 8}
        >>> config = Config(task, {"kind": "mamba1", "d_model": 4, "d_state": 2}, layers=1, steps=2, every=2, batch=2)
        >>> result = train(config)
        >>> result.ended, result.last.step, result.last.total
        ('steps', 2, 16)
    """
    _check(config, until, seconds, out)
    started, until = time.perf_counter(), config.steps if until is None else until
    model, optimizer = _made(config)
    curve: tuple[Point, ...] = ()
    if out is not None and checkpoint.exists(out):
        curve = checkpoint.restore(out, config, model, optimizer)
    resumed, before = len(curve), curve[-1].seconds if curve else 0.0
    while (ended := _ended(config, curve, until)) is None:
        if seconds is not None and len(curve) > resumed and time.perf_counter() - started >= seconds:
            ended = "seconds"
            break
        first = curve[-1].step if curve else 0
        loss = _steps(config, model, optimizer, range(first, first + config.every))
        correct, total = answered(model, config)
        point = Point(first + config.every, loss, correct, total, before + time.perf_counter() - started)
        curve = (*curve, point)
        if out is not None:
            checkpoint.store(out, config, model, optimizer, curve)
        say(config, point)
    return Result(config, model.eval(), curve, ended)


def initial(config: Config) -> nn.Module:
    """Return the model before its first step, a function of the seed; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = config.build()
    return model.to(config.device, getattr(torch, config.dtype))


def answered(
    model: nn.Module, config: Config, split: str = "validation", batches: int | None = None
) -> tuple[int, int]:
    """Count the queries that a model answers on rows that no training draws, `config.evaluation_batches` of them.

    Arguments:
        model: a language model, on any device.
        config: whose task, batch and seed say which rows.
        split: "validation" or "test".
        batches: another number of batches.

    Returns:
        The number answered by the largest logit, and the number of queries.
    """
    device = next(model.parameters()).device
    training = model.training
    counts = []
    model.eval()
    with torch.inference_mode():
        for index in range(config.evaluation_batches if batches is None else batches):
            task = held_out(config, split, index)
            pieces = torch.from_numpy(task.input_ids).split(max(1, TOKENS_A_CALL // task.input_ids.shape[1]))
            predicted = [model(piece.to(device)).logits.argmax(-1).cpu().numpy() for piece in pieces]
            counts.append(task.accuracy(np.concatenate(predicted)))
    model.train(training)
    correct, total = np.sum(counts, axis=0).tolist()
    return correct, total


def _check(config: Config, until: int | None, seconds: float | None, out: Any) -> None:
    if until is not None and (until % config.every or not 0 < until <= config.steps):
        expected = f"a multiple of every = {config.every} within 1 .. {config.steps} steps"
        raise ValueError(f"until must be {expected}, where checkpoints are; got {until!r}")
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a finite number >= 0; got {seconds!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available here; use device='cpu'")
    if out is not None and Path(out).is_file():
        raise ValueError(f"{out} is a file: `out` names a directory")


def _made(config: Config) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = initial(config)
    spared = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(UNDECAYED)]
    kept = {id(parameter) for parameter in spared}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    fused = config.device == "cuda"
    return model, torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)


def _ended(config: Config, curve: tuple[Point, ...], until: int) -> str | None:
    if not curve:
        return None
    if not math.isfinite(curve[-1].loss):
        return "diverged"
    if config.stop_at is not None and curve[-1].accuracy >= config.stop_at:
        return "accuracy"
    if curve[-1].step >= config.steps:
        return "steps"
    return "until" if curve[-1].step >= until else None


def _steps(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Take these steps and return their mean loss; the device is waited for once, at the end."""
    model.train()
    losses = []
    for step in steps:
        input_ids, target = (tensor.to(config.device) for tensor in rows(config, step))
        loss = F.cross_entropy(model(input_ids).logits.flatten(0, 1), target.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses).double().mean().item()
    return mean if math.isfinite(mean) else math.inf
