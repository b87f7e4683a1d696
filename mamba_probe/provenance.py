"""Where a recording came from: model, hash, versions, time. Written into every Dataset we make."""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from mamba_probe.trace.schema import SCHEMA_VERSION

__all__ = ["of_model", "versions"]

PACKAGES = ("mamba-probe", "torch", "triton", "transformers", "numpy", "xarray")


def versions() -> dict[str, str]:
    """Installed versions of what a number depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def of_model(model: nn.Module, kind: str = "trace") -> dict[str, Any]:
    """Attributes of a Dataset of this kind made from `model`; plain strings and numbers, which any store takes."""
    source = getattr(model, "_mamba_probe_source", None) or {}
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "model": source.get("source") or getattr(model, "name_or_path", "") or type(model).__name__,
        "model_hash": _hash(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "creation_library": "mamba_probe",
    }


def _hash(model: nn.Module) -> str:
    """sha256 of the parameters as they are now, by name: an edited or trained model has another one."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
