"""Checks before a probe acts: a backend that every mixer can use, mixers that are free, edits that mean something."""

from collections.abc import Sequence

import torch

from mamba_probe.hooks import Edit
from mamba_probe.kernels.scan import BACKENDS, check_backend, choose_backend
from mamba_probe.mixers import MixerAdapter
from mamba_probe.trace.contract import unknown_name

__all__ = ["check_editable", "check_free_to_attach", "chosen_backend"]


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
    """Refuse to edit what an S4D layer does not compute from its input."""
    for adapter in adapters:
        if edit.layer in (None, adapter.layer) and edit.target not in adapter.editable:
            raise ValueError(
                f"{edit!r}: {edit.target} of layer {adapter.layer} ({adapter.family}) is a constant weight, the same at"
                f" every token; change the module's weights instead. Editable there: {', '.join(adapter.editable)}."
            )


def check_free_to_attach(adapters: Sequence[MixerAdapter]) -> None:
    """Refuse mixers that are taken already, or whose weights are absent or not finite."""
    for adapter in adapters:
        if "forward" in adapter.mixer.__dict__:
            ours = "a probe is attached. Detach it first: leave its `with` block, or mp.detach(model)."
            other = "another tool (accelerate?) replaced it; load the model on one device."
            why = other if adapter.tap is None else ours
            raise ValueError(f"{adapter.name or 'the mixer'} already has a forward of its own: {why}")
        for name, parameter in adapter.mixer.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"layer {adapter.layer}: {name} is on the meta device (not loaded, or offloaded)")
            if not torch.isfinite(parameter).all():
                bad = int((~torch.isfinite(parameter)).sum())
                raise ValueError(f"layer {adapter.layer}: weight {name} holds {bad} NaN or infinite values")
