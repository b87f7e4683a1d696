"""Small checkpoints that ship with the package, each with a card that says what it is."""

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = ["build", "card", "names", "path"]


def names() -> list[str]:
    """Return the names of the shipped checkpoints.

    Example:
        >>> names()
        ['mqar-mamba1']
    """
    return sorted(_BUILDERS)


def path(name: str) -> Path:
    """Return the directory of a shipped checkpoint: config.json, model.safetensors, card.json.

    Raises:
        ValueError: if no checkpoint has this name.
        FileNotFoundError: if the installation lacks its files.

    Example:
        >>> sorted(file.name for file in path("mqar-mamba1").iterdir())
        ['card.json', 'config.json', 'model.safetensors']
    """
    _builder(name)
    directory = Path(__file__).parent / name
    if not directory.is_dir():
        raise FileNotFoundError(f"zoo: {name} is missing from this installation: {directory}; reinstall mamba-probe")
    return directory


def card(name: str) -> dict[str, Any]:
    """Return what a shipped checkpoint is: its origin, its task, its accuracy, how to build it again.

    Raises:
        ValueError: if no checkpoint has this name.

    Example:
        >>> card("mqar-mamba1")["accuracy"]["value"]
        1.0
    """
    return json.loads((path(name) / "card.json").read_text())


def build(name: str, directory: str | Path, overwrite: bool = False) -> Path:
    """Build a checkpoint of the zoo again, card included; the weights come out bit for bit.

    Arguments:
        name: one of `names()`.
        directory: where to write; made if missing.
        overwrite: replace a model that is there.

    Raises:
        ValueError: if no checkpoint has this name, or a model is there and `overwrite` is False.
    """
    return _builder(name)(name, Path(directory), overwrite)


def _builder(name: str) -> Callable[[str, Path, bool], Path]:
    if name not in _BUILDERS:
        near = get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"zoo: no checkpoint is named {name!r}{hint} (names: {', '.join(names())})")
    return _BUILDERS[name]


def _mqar_mamba1(name: str, directory: Path, overwrite: bool) -> Path:
    from mamba_probe.constructions import mqar

    sizes = {"mixer": "mamba1", "n_keys": 128, "n_values": 128}
    construction = mqar(**sizes)
    construction.save(directory, overwrite)
    task = {"name": "mqar", "batch": 256, "length": 128, "n_pairs": 8, "vocab": 256, "seed": 20_260_101}
    correct, total = _recalled(construction, task)
    written = {
        "name": name,
        "what": "A one-layer Mamba language model that solves multi-query associative recall exactly. Its weights are "
        "written down in closed form, not trained.",
        "origin": "ours: mamba_probe.constructions.mqar",
        "claim": construction.claim.replace("\n", " "),
        "construction": sizes,
        "dtype": "float32",
        "parameters": sum(weight.numel() for weight in construction.model.parameters()),
        "task": task,
        "accuracy": {"correct": correct, "total": total, "value": correct / total},
        "regenerate": f"mamba_probe.zoo.build({name!r}, directory)",
        "license": "Apache-2.0",
    }
    (directory / "card.json").write_text(json.dumps(written, indent=2) + "\n")
    return directory


def _recalled(construction: Any, task: dict[str, Any], rows: int = 4) -> tuple[int, int]:
    """Count the queries of `task` that the model answers, `rows` sequences at a time, to bound the memory."""
    import numpy as np
    import torch

    from mamba_probe.tasks import mqar

    asked = mqar(**{key: value for key, value in task.items() if key != "name"})
    with torch.inference_mode():
        pieces = construction.inputs(asked.input_ids).split(rows)
        predicted = [construction.model(ids, use_cache=False).logits.argmax(-1).numpy() for ids in pieces]
    return asked.accuracy(np.concatenate(predicted))


_BUILDERS: dict[str, Callable[[str, Path, bool], Path]] = {"mqar-mamba1": _mqar_mamba1}
