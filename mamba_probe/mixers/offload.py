"""Weights that accelerate keeps elsewhere: its hooks bring them where a module runs, and away again.

`cpu_offload`, `disk_offload` and `dispatch_model` leave parameters on the meta device between forwards. Each hook has
`pre_forward`, which puts its module's own parameters in place, and `post_forward`; accelerate itself is not needed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["held", "place", "refuse_absent"]


@contextmanager
def held(module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
    """Inside the block the parameters of `module` are in place.

    A submodule that is called inside takes its own away afterwards: read before calling, or hold again.

    >>> linear = nn.Linear(2, 3)
    >>> with held(linear):
    ...     linear.weight.is_meta
    False
    """
    parts = list(module.modules()) if recurse else [module]
    brought = []
    try:
        for part in parts:
            hook = getattr(part, "_hf_hook", None)
            if hook is not None and any(parameter.is_meta for parameter in part.parameters()):
                hook.pre_forward(part)
                brought.append((part, hook))
        yield
    finally:
        for part, hook in reversed(brought):
            hook.post_forward(part, ())


def place(module: nn.Module) -> torch.device:
    """The device that `module` runs on: its first parameter's, or where a hook brings it.

    >>> place(nn.Linear(2, 3))
    device(type='cpu')
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((found for found in devices if found is not None), device))


def refuse_absent(layer: int, what: str, given: Iterable[object]) -> None:
    """Refuse to compute with tensors on the meta device: torch convolves by such weights without complaint.

    Raises:
        ValueError: the layer, and what was to be computed.

    >>> refuse_absent(3, "scan", [torch.ones(2), None])
    """
    if any(isinstance(each, Tensor) and each.is_meta for each in given):
        raise ValueError(
            f"layer {layer}: its {what} was given tensors on the meta device: weights that are offloaded were not"
            " brought back before it. Put the hooks of accelerate on the whole model before attaching."
        )
