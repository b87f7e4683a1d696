"""Checks before a probe acts: a backend that every mixer can use, mixers that are free, edits that mean something."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mamba_probe.edits import AXES, FREEZABLE, Edit
from mamba_probe.kernels.scan import BACKENDS, check_backend, choose_backend
from mamba_probe.mixers import MixerAdapter
from mamba_probe.mixers.offload import held
from mamba_probe.mixers.seat import seated
from mamba_probe.trace.contract import unknown_name

__all__ = ["check_editable", "check_free_to_attach", "chosen_backend", "torch_model"]

WRAPPERS = {"nnsight": "_module", "transformer_lens": "original_model"}
"""Where a library keeps the torch model that it wraps."""


def torch_model(model: Any) -> nn.Module:
    """The torch model itself, of one that nnsight or TransformerLens wraps as well.

    Raises:
        ValueError: something else.

    >>> torch_model(torch.nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package in packages & set(WRAPPERS):
        model = getattr(model, WRAPPERS[package])
    if not isinstance(model, nn.Module):
        raise ValueError(f"attach takes a live torch module; got {type(model).__name__}: load it with mp.load(...)")
    return model


def chosen_backend(device: torch.device, asked: str, adapters: Sequence[MixerAdapter]) -> tuple[str, str]:
    """The backend of the scan and why it is the one."""
    limited = [adapter for adapter in adapters if "triton" not in adapter.backends]
    if asked == "auto":
        choice = choose_backend(device)
        if choice.name == "triton" and limited:
            return (
                "cpu",
                f"{limited[0].family} layers need complex A, which triton lacks; plain torch on {device}",
            )
        return choice
    if asked not in BACKENDS:
        raise unknown_name("backend", asked, ("auto", *BACKENDS))
    if asked == "triton" and limited:
        needs = f"{limited[0].name or 'the mixer'} ({limited[0].family}) needs complex A"
        raise ValueError(f'backend "triton" does not support them yet: {needs}. Use backend="cpu", on any device.')
    check_backend(asked, device)
    return asked, "asked for"


def check_editable(edit: Edit, adapters: Sequence[MixerAdapter]) -> None:
    """Refuse to edit what a layer has not, or does not compute from its input."""
    for adapter in adapters:
        if edit.layer in (None, adapter.layer) and edit.target not in adapter.editable:
            constant = "is a constant weight, the same at every token; change the module's weights instead"
            why = constant if edit.target in FREEZABLE else "does not exist"
            raise ValueError(
                f"{edit!r}: {edit.target} of layer {adapter.layer} ({adapter.family}) {why}. Editable there: "
                f"{', '.join(adapter.editable)}."
            )
        axes = adapter.sizes.dims(edit.target) if edit.target in AXES else ()
        for axis, _ in edit.where if edit.layer in (None, adapter.layer) else ():
            if axis not in axes:
                raise ValueError(
                    f"{edit!r}: {edit.target} of layer {adapter.layer} ({adapter.family}) has no axis {axis}; it has "
                    f"{', '.join(name for name in axes if name not in ('layer', 'direction'))}"
                )


def check_free_to_attach(adapters: Sequence[MixerAdapter]) -> None:
    """Refuse mixers that are taken already, or whose weights are absent or not finite."""
    for adapter in adapters:
        check_free_to_attach(adapter.parts)
        if seated(adapter.mixer) is not None:
            ours = "a probe is attached. Detach it first: leave its `with` block, or mp.detach(model)."
            other = "another tool replaced it; attach to the model as it was loaded."
            why = other if adapter.tap is None else ours
            raise ValueError(f"{adapter.name or 'the mixer'} already has a forward of its own: {why}")
        with held(adapter.mixer):
            _check_weights(adapter)


def _check_weights(adapter: MixerAdapter) -> None:
    for name, parameter in adapter.mixer.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"layer {adapter.layer}: {name} is on the meta device, and no hook of accelerate on the mixer brings"
                " it: load the weights, or offload with hooks on each module (no preload_module_classes)"
            )
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"layer {adapter.layer}: weight {name} holds {bad} NaN or infinite values")
