"""What one training is: task, model, optimiser, schedule, in one frozen dataclass and as JSON."""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from mamba_probe import blocks, tasks
from mamba_probe.trace.contract import unknown_name

__all__ = ["SCHEDULES", "TASKS", "Config"]

TASKS = {
    task.__name__: task
    for task in (
        tasks.mqar, tasks.keep_nth, tasks.induction, tasks.induction_every_token, tasks.selective_copying,
        tasks.repeated_tokens,
    )
}  # fmt: skip
"""Generators that can be trained on, by name."""
SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float64")
LARGEST_SEED = 2**20 - 1


@dataclass(frozen=True)
class Config:
    r"""A training: everything that its result depends on.

    The rate of step i = 0 .. steps - 1 is, with w = min(1, (i + 1) / warmup),

    .. math:: w \cdot \text{learning\_rate} \cdot \tfrac12 (1 + \cos(\pi i / \text{steps}))

    ("cosine"), or w times `learning_rate` ("constant"). Weight decay spares biases, norms, D, A and delta, as
    upstream's `_no_weight_decay`. Source: ours; AdamW is arXiv 1711.05101.

    Arguments:
        task: its `name`, one of `TASKS`, and its generator's arguments but for batch and seed.
        mixer: a block as `blocks.build` takes it: `kind`, `d_model` and sizes; `d_conv` 1 is a block without
            convolution, since one tap mixes no tokens.
        layers: blocks.
        steps: of the optimiser.
        batch: rows a step.
        learning_rate: the greatest.
        warmup: steps of linear warmup, 0 for none.
        schedule: one of `SCHEDULES`.
        weight_decay: AdamW's.
        clip: greatest norm of the gradient; None leaves it.
        seed: of the initial weights and of the data, 0 .. 2^20 - 1.
        device: "cpu", or "cuda": where the scan runs in Triton (S4D in plain torch).
        dtype: of the weights, "float32" or "float64".
        every: steps between evaluations, which divide `steps`; a checkpoint is written at each.
        evaluation_batches: batches of held-out rows an evaluation.
        stop_at: accuracy at which training ends; None trains all steps.
        fixed_batches: train on this many batches over and over; None, the default, draws new rows each step.
        mixture: changes of the task, such as {"length": 16}, that training steps take in turn; evaluations are of the
            task itself. Lengths from short to long make a long task learnable.

    Raises:
        ValueError: naming what is unknown, of the wrong kind or out of range.

    Example:
        >>> task = {"name": "mqar", "length": 16, "n_pairs": 2, "vocab": 16}
        >>> config = Config(task, {"kind": "mamba1", "d_model": 8}, layers=1, steps=100, every=50)
        >>> config.vocab, Config.from_json(config.to_json()) == config
        (16, True)
    """

    task: Mapping[str, Any]
    mixer: Mapping[str, Any]
    layers: int = 2
    steps: int = 2000
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    every: int = 100
    evaluation_batches: int = 8
    stop_at: float | None = None
    fixed_batches: int | None = None
    mixture: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "steps", "batch", "every", "evaluation_batches", "fixed_batches"):
            if not (name == "fixed_batches" and self.fixed_batches is None):
                _require(name, getattr(self, name), "a whole number >= 1", _whole(getattr(self, name), 1))
        _require("steps", self.steps, f"a multiple of every = {self.every}", self.steps % self.every == 0)
        _require("warmup", self.warmup, "a whole number >= 0", _whole(self.warmup, 0))
        _require("seed", self.seed, f"in 0 .. {LARGEST_SEED}", _whole(self.seed, 0) and self.seed <= LARGEST_SEED)
        rate, decay, clip, stop = self.learning_rate, self.weight_decay, self.clip, self.stop_at
        _require("learning_rate", rate, "a finite number > 0", _real(rate) and rate > 0)
        _require("weight_decay", decay, "a finite number >= 0", _real(decay) and decay >= 0)
        _require("clip", clip, "None or a finite number > 0", clip is None or (_real(clip) and clip > 0))
        _require("stop_at", stop, "None or in (0, 1]", stop is None or (_real(stop) and 0 < stop <= 1))
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _require("device", self.device, "'cpu' or 'cuda'", self.device in ("cpu", "cuda"))
        object.__setattr__(self, "task", dict(_described("task", self.task, "name")))
        object.__setattr__(self, "mixer", dict(_described("mixer", self.mixer, "kind")))
        if not isinstance(self.mixture, Sequence) or not all(isinstance(each, Mapping) for each in self.mixture):
            raise ValueError(f"mixture must be a list of dictionaries, changes of the task; got {self.mixture!r}")
        object.__setattr__(self, "mixture", tuple(dict(change) for change in self.mixture))
        for change in ({}, *self.mixture):
            self._check_task(change)
        with torch.random.fork_rng(devices=[]):
            self.build()

    @property
    def vocab(self) -> int:
        """Token ids of the task, and so of the model."""
        return self.draw(1, 0).vocab

    def draw(self, batch: int, seed: int, step: int | None = None) -> tasks.Task:
        """Return rows of the task, or of what the mixture makes of it at a step."""
        change = self.mixture[step % len(self.mixture)] if self.mixture and step is not None else {}
        return TASKS[self.task["name"]](batch=batch, seed=seed, **_without({**self.task, **change}, "name"))

    def build(self) -> nn.Module:
        """Return the language model, initialised from torch's global generator."""
        return blocks.build({"mixers": [self.mixer] * self.layers, "vocab_size": self.vocab})

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return warm * falling * self.learning_rate

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Return what `to_json` wrote.

        Raises:
            ValueError: not JSON, no object, or a field that is missing, unknown or wrong.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a training's config is a JSON object; this is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"a training's config is a JSON object; got {type(given).__name__}")
        names = tuple(field.name for field in fields(cls))
        for name in given:
            if name not in names:
                raise unknown_name("field", name, names)
        missing = [name for name in ("task", "mixer") if name not in given]
        if missing:
            raise ValueError(f"a training's config needs `task` and `mixer`; it lacks {', '.join(missing)}")
        return cls(**given)

    def _check_task(self, change: Mapping[str, Any]) -> None:
        name, changed = self.task["name"], {**self.task, **change}
        if not isinstance(name, str) or name not in TASKS:
            raise unknown_name("task", name, tuple(TASKS))
        known = tuple(_without(inspect.signature(TASKS[name]).parameters, "batch", "seed"))
        for given in _without(changed, *(() if "name" in change else ("name",))):
            if given in ("batch", "seed"):
                raise ValueError(f"task: {given} is no argument here: it is a field of the config itself")
            if given not in known:
                raise unknown_name(f"argument of {name}", given, known)
        vocab = TASKS[name](batch=1, **_without(changed, "name")).vocab
        if vocab != self.vocab:
            raise ValueError(f"mixture must keep the vocabulary, {self.vocab} ids; {dict(change)} makes it {vocab}")


def _described(field: str, given: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or key not in given:
        raise ValueError(f"{field} must be a dictionary with {key!r}; got {given!r}")
    return given


def _without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def _require(name: str, value: Any, expected: str, met: bool) -> None:
    if not met:
        raise ValueError(f"{name} must be {expected}; got {value!r}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
