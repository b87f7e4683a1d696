"""A training on disk: one file, written whole or not at all, without pickle."""

import json
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.training.config import Config
from mamba_probe.writing import write_whole

__all__ = ["CHECKPOINT", "Point", "exists", "restore", "store"]

CHECKPOINT = "checkpoint.safetensors"
FREE = ("device",)
"""Fields that a resumed training may change: where it runs, not what it is."""


@dataclass(frozen=True)
class Point:
    """One evaluation: after `step` steps and `seconds` of training.

    `loss` is the mean over the steps since the last evaluation, in nats a query, infinite where it is not finite;
    `correct` of `total` validation queries were answered.
    """

    step: int
    loss: float
    correct: int
    total: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of the validation queries answered."""
        return self.correct / self.total


def exists(directory: str | PathLike[str]) -> bool:
    """Whether a directory holds a training."""
    return (Path(directory) / CHECKPOINT).is_file()


def store(
    directory: str | PathLike[str], config: Config, model: nn.Module, optimizer: torch.optim.Optimizer,
    curve: tuple[Point, ...],
) -> Path:  # fmt: skip
    """Write weights, the optimiser's moments, config and curve, as one safetensors file.

    Nothing random needs storing: data are a function of seed and step.
    """
    from safetensors.torch import save

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in optimizer.state[parameter].items()}
    said = {"config": config.to_json(), "curve": json.dumps([asdict(point) for point in curve])}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=said)
    write_whole(directory / CHECKPOINT, data)
    return directory / CHECKPOINT


def restore(
    directory: str | PathLike[str], config: Config, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Point, ...]:
    """Fill model and optimiser with what `store` wrote, and return the curve.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is damaged, or of another training: the fields that differ are named.
    """
    path = Path(directory) / CHECKPOINT
    tensors, said = _read(path)
    _same(path, config, said["config"])
    model.load_state_dict({name: tensors.pop(f"model.{name}") for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        kinds = [key.removesuffix(f".{name}") for key in tensors if key.endswith(f".{name}")]
        optimizer.state[parameter] = {
            kind: _placed(tensors[f"{kind}.{name}"], kind, parameter, optimizer) for kind in kinds
        }
    return tuple(Point(**point) for point in json.loads(said["curve"]))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            said = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to train from the start") from error
    if not {"config", "curve"} <= said.keys():
        raise ValueError(f"{path} is no checkpoint of a training: it lacks its config and curve")
    return tensors, said


def _same(path: Path, wanted: Config, text: str) -> None:
    """Compared as JSON first: to make another's config would draw a row of its task, of whatever length it says."""
    names = [field.name for field in fields(Config) if field.name not in FREE]
    own, given = json.loads(wanted.to_json()), _object(path, text)
    differ = [f"{n} {given[n]!r}, not {own[n]!r}" for n in names if n in given and given[n] != own[n]]
    if not differ:
        found = Config.from_json(text)
        differ = [f"{n} {getattr(found, n)!r}, not {getattr(wanted, n)!r}" for n in names if _differ(wanted, found, n)]
    if differ:
        raise ValueError(f"{path} is of another training ({'; '.join(differ)}): choose another directory")


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged (its config is no JSON: {error}): remove it to train anew") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} is damaged (its config is no JSON object): remove it to train anew")
    return given


def _differ(wanted: Config, found: Config, name: str) -> bool:
    return getattr(wanted, name) != getattr(found, name)


def _placed(tensor: Tensor, kind: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """A moment beside its parameter; the count of steps on the CPU, but for a fused optimiser."""
    beside = kind != "step" or optimizer.defaults["fused"]
    return tensor.to(parameter.device if beside else "cpu")
