"""Small checkpoints that ship with the package, each with a card that says what it is."""

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = ["CARD", "LIMIT", "build", "card", "names", "path", "save"]

CARD = ("name", "what", "origin", "dtype", "parameters", "task", "accuracy", "regenerate", "license")
"""What every card says; a trained checkpoint's says more (`mamba_probe.training.describe`)."""
LIMIT = 2_000_000
"""Bytes of a checkpoint's weights, above which `save` refuses unless told."""
_FILES = ("config.json", "model.safetensors", "card.json")
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped checkpoints: those in closed form, and those whose trained files are here.

    Example:
        >>> "mqar-mamba1" in names()
        True
    """
    return sorted({*_BUILDERS, *(card.parent.name for card in _HERE.glob("*/card.json"))})


def path(name: str) -> Path:
    """Return the directory of a shipped checkpoint: config.json, model.safetensors, card.json.

    Raises:
        ValueError: if no checkpoint has this name.
        FileNotFoundError: if the installation lacks its files.

    Example:
        >>> sorted(file.name for file in path("mqar-mamba1").iterdir())
        ['card.json', 'config.json', 'model.safetensors']
    """
    _check_name(name)
    directory = _HERE / name
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
        ValueError: if no checkpoint has this name, or it was trained, or a model is there and `overwrite` is False.
    """
    _check_name(name)
    if name not in _BUILDERS:
        raise ValueError(f"zoo: {name} was trained, not written down: {card(name)['regenerate']} trains it again")
    return _BUILDERS[name](name, Path(directory), overwrite)


def save(
    model: Any, card: Mapping[str, Any], directory: str | Path, *, limit: int = LIMIT, overwrite: bool = False
) -> Path:
    """Write a model of `mamba_probe.blocks` and its card as the zoo holds them; `mamba_probe.load` reads the directory.

    Arguments:
        model: a block or language model of ours.
        card: what it is; the names in `CARD` at least.
        directory: made if missing.
        limit: bytes that the weights may take.
        overwrite: replace a model that is there.

    Raises:
        ValueError: a card that lacks a name, weights that are larger than `limit` or not finite, a model of another
            kind, or one that is there and `overwrite` is False.
    """
    from safetensors.torch import save as to_bytes

    from mamba_probe.blocks import config_of
    from mamba_probe.formats.recipe import refuse_nonfinite

    missing = [name for name in CARD if name not in card]
    if missing:
        raise ValueError(f"zoo: a card says {', '.join(CARD)}; this one lacks {', '.join(missing)}")
    config, weights = config_of(model), {n: w.detach().cpu().contiguous() for n, w in model.state_dict().items()}
    refuse_nonfinite(weights, f"zoo: {card['name']}")
    data, target = to_bytes(weights, metadata={"format": "pt"}), Path(directory)
    if len(data) > limit:
        raise ValueError(f"zoo: the weights of {card['name']} take {len(data):,} bytes, more than limit={limit:,}")
    there = [name for name in _FILES if (target / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{target} holds {' and '.join(there)}: name another directory, or pass overwrite=True")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (target / "model.safetensors").write_bytes(data)
    (target / "card.json").write_text(json.dumps(dict(card), indent=2) + "\n")
    return target


def _check_name(name: str) -> None:
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"zoo: no checkpoint is named {name!r}{hint} (names: {', '.join(names())})")


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
