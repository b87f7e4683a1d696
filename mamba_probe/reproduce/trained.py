"""The zoo's trained checkpoints: their cards, their untrained twins, and the construction of the same task."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from mamba_probe import blocks, zoo
from mamba_probe.constructions import Construction, induction, keep_nth, mqar
from mamba_probe.loading import load
from mamba_probe.reproduce.evaluate import MIXERS, NUMBERS_A_CALL
from mamba_probe.reproduce.table import Cell
from mamba_probe.tasks import Task
from mamba_probe.training import RECIPES, Config, held_out, initial

__all__ = ["FRESH", "Checkpoint", "absent", "answers", "checkpoints", "fresh_task", "opened"]

FRESH = 2**20
"""First test batch that no card counts: those of run seed k are FRESH (k + 1) and on."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained checkpoint: config.json, model.safetensors and card.json in a directory.

    Arguments:
        path: of the directory.
    """

    path: Path

    @cached_property
    def card(self) -> dict[str, Any]:
        """What `mamba_probe.training.describe` wrote."""
        return json.loads((self.path / "card.json").read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> Config:
        """Of its training, on the CPU."""
        return replace(Config(**self.card["config"]), device="cpu")

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self.card["name"]

    @property
    def kind(self) -> str:
        """ "mamba1", "mamba2" or "s4d"."""
        return self.config.mixer["kind"]

    @property
    def mixer(self) -> str:
        """The kind for a reader."""
        return MIXERS[self.kind]

    @property
    def solves(self) -> bool:
        """Whether it answers most queries: what `recall_circuit` demands before it scores a circuit."""
        return self.card["accuracy"]["low"] > 0.5

    @cached_property
    def model(self) -> nn.Module:
        """As trained, to be probed: its scan is ours, of S4D too."""
        return load(self.path)

    @cached_property
    def engine(self) -> nn.Module:
        """As trained, by what it was trained by: of S4D maybe its convolution, which is fast and hides its state."""
        made = self.config.build().to(getattr(torch, self.config.dtype))
        made.load_state_dict(self.model.state_dict())
        return made.eval()

    @cached_property
    def twin(self) -> nn.Module:
        """The same model before its first step, to be probed: the null."""
        made = blocks.build(blocks.config_of(self.model)).to(getattr(torch, self.config.dtype))
        made.load_state_dict(initial(self.config).state_dict())
        return made.eval()

    @cached_property
    def ideal(self) -> Construction | None:
        """What we wrote down for its task in its mixer, of the smallest size; None where there is none."""
        task, size = self.config.task, self.config.vocab
        if task["name"] == "mqar":
            return mqar(mixer=self.kind, n_keys=size // 2, n_values=size // 2)
        if task["name"] == "induction":
            return induction(mixer=self.kind, n_tokens=size, kind="special")
        if task["name"] == "keep_nth" and self.kind != "s4d":
            drawn = self.config.draw(1, 0).params
            return keep_nth(drawn["n_tokens"], drawn["length"], drawn["n"], mixer=self.kind)
        return None

    @property
    def said(self) -> dict[str, Any]:
        """What every row says of it: name, mixer, precision and sizes."""
        drawn, sizes = self.config.draw(1, 0).params, self.model.backbone.layers[0].mixer.sizes  # type: ignore[union-attr, index]
        shown = {"length": "T", "n_pairs": "pairs", "n": "n"}
        found = {new: drawn[old] for old, new in shown.items() if old in drawn}
        found |= {"layers": self.config.layers, "channels": sizes["d_inner"], "states": sizes["d_state"]}
        found |= {"taps": sizes["d_conv"]}
        return {"what": self.name, "mixer": self.mixer, "dtype": self.config.dtype, "sizes": found}

    def work(self, tokens: int) -> int:
        """What a forward of `engine` over so many tokens costs: numbers of the states, or of a convolution for them."""
        mixer = self.model.backbone.layers[0].mixer  # type: ignore[union-attr]
        states = 4 if self.config.mixer.get("backend") == "convolution" else mixer.sizes["d_state"]  # type: ignore[index]
        return tokens * self.config.layers * mixer.sizes["d_inner"] * states  # type: ignore[index]


@lru_cache(maxsize=64)
def opened(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory, the same one each time."""
    return Checkpoint(path)


def checkpoints(directory: str | PathLike[str] | None = None) -> list[Checkpoint]:
    """Return the trained checkpoints of the zoo, or of a directory of such, in the order of the recipes.

    Arguments:
        directory: holds NAME/card.json; None is the zoo of this installation.
    """
    paths = map(zoo.path, zoo.names()) if directory is None else (p.parent for p in Path(directory).glob("*/card.json"))
    found = [each for each in map(opened, paths) if "config" in each.card]
    order = list(RECIPES)
    return sorted(found, key=lambda each: (order.index(each.name) if each.name in order else len(order), each.name))


def absent(task: str, cells: Sequence[Cell]) -> tuple[str, ...]:
    """Say which recipes for a task have no checkpoint in the cells."""
    here = {opened(cell.build["path"]).name for cell in cells}
    lacking = [r.name for r in RECIPES.values() if r.config.task["name"] == task and r.name not in here]
    if not lacking:
        return ()
    return (f"Absent: {', '.join(lacking)}. The zoo of this installation holds no such trained checkpoint.",)


def fresh_task(checkpoint: Checkpoint, rows: int, seed: int, **changes: Any) -> Task:
    """Return rows of a checkpoint's task that neither training nor card has seen, another number of them."""
    config = checkpoint.config
    config = replace(config, batch=rows, task={**config.task, **changes}, mixture=())
    return held_out(config, "test", FRESH * (seed + 1))


def answers(model: nn.Module, tasks: Iterable[Task]) -> Int[np.ndarray, "row count=2"]:
    """Return how many queries of each row a language model answers, and how many there are."""
    first: Any = model.backbone.layers[0]  # type: ignore[union-attr, index]
    found = []
    for task in tasks:
        widest = max(first.mixer.sizes["d_inner"], task.vocab)
        rows = max(1, NUMBERS_A_CALL // (task.input_ids.shape[1] * widest))
        with torch.inference_mode():
            pieces = torch.from_numpy(task.input_ids).split(rows)
            predicted = np.concatenate([model(piece).logits.argmax(-1).numpy() for piece in pieces])
        asked = task.target >= 0
        found.append(np.stack([(asked & (predicted == task.target)).sum(1), asked.sum(1)], axis=1))
    return np.concatenate(found)
