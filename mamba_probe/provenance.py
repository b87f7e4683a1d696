"""Where a recording came from: model, hash, versions, time. Written into every Dataset we make."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.mixers.offload import held
from mamba_probe.trace.schema import SCHEMA_VERSION

__all__ = ["of_model", "versions"]

PACKAGES = ("mamba-probe", "torch", "triton", "transformers", "numpy", "xarray")


def versions() -> dict[str, str]:
    """Installed versions of what a number depends on."""
    return {package: _installed(package) for package in PACKAGES}


@cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def of_model(model: nn.Module, kind: str = "trace") -> dict[str, Any]:
    """Attributes of a Dataset of this kind made from `model`; plain strings and numbers, which any store takes."""
    source = getattr(model, "_mamba_probe_source", None) or {}
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "model": source.get("source") or getattr(model, "name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "model_hash": _hash(model),
        "loaded_from": _loaded(source),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "creation_library": "mamba_probe",
    }


def _loaded(source: Mapping[str, Any]) -> str:
    """How to load the model again, as JSON; nothing of one that was not loaded by name or path."""
    given = {name: source[name] for name in ("source", "revision", "dtype", "vocab") if name in source}
    return json.dumps(given) if given else ""


def _hash(model: nn.Module) -> str:
    """sha256 of the parameters as they are now, by name: an edited or trained model has another one."""
    digest, parameters = hashlib.sha256(), dict(model.named_parameters())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in sorted(parameters.items()):
        stored = _stored(model, name)
        if tied.get(name) in parameters and torch.equal(stored, _stored(model, tied[name])):
            continue  # one tensor under two names, as offloading parts them
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(stored.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored(model: nn.Module, name: str) -> Tensor:
    """A parameter on the host, also one that is offloaded."""
    with held(model.get_submodule(name.rpartition(".")[0]), recurse=False):
        return model.get_parameter(name).detach().cpu().contiguous()
