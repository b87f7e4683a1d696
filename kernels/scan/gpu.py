"""The backend "triton": what it refuses, the tensors it fills, and the kernel that fills them.

| A | kernel |
|---|---|
| (head, state), real | `fused`: chunks of tokens, decays of every state |
| (head,), real | `chunked`: matrix products within a chunk |

mass and mass_distance are `mass`'s, after either. Forward only.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from mamba_probe.kernels.emission import STATE_SIZED, Emission
from mamba_probe.kernels.scan import chunked, fused, mass
from mamba_probe.kernels.scan.arguments import Arguments

__all__ = ["buffers", "check_device", "scan"]


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    _check_arguments(a)
    device, (_, n_token, n_head, _) = a.x.device, a.x.shape
    out = torch.empty(a.x.shape, dtype=a.x.dtype, device=device)
    last = torch.empty(a.state_shape, dtype=a.dtype, device=device)
    emitted = buffers(a)
    token_slot = _slots(a.emit.tokens, n_token, device)
    head_slot = _slots(a.emit.channels, n_head, device)
    with torch.cuda.device_of(a.x):
        (chunked if a.scalar_A else fused).launch(a, out, last, emitted, token_slot, head_slot)
        mass.launch(a, emitted, token_slot, head_slot)
    inputs = {name: a.emit.tokens_of(vars(a)[name]).clone() for name in "BC" if name in a.emit.variables}
    return out, last, Emission(**emitted, **inputs)


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run."""
    compiled = isinstance(fused.scan_kernel, triton.JITFunction)
    if compiled and device.type != "cuda":
        raise ValueError(
            f'backend "triton" needs CUDA tensors; `x` is on {device}: use backend="cpu", or set '
            "TRITON_INTERPRET=1 before the first import of triton to interpret the kernel (slow, for tests)"
        )


def _check_arguments(a: Arguments) -> None:
    if a.A.is_complex():
        raise ValueError('backend "triton" does not support complex A yet: use backend="cpu"')
    check_device(a.x.device)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in a.tensors()):
        raise ValueError(
            'backend "triton" is forward only for now, and an input requires grad: '
            'use backend="cpu", or call under torch.no_grad()'
        )


def buffers(a: Arguments) -> dict[str, Tensor]:
    """Uninitialised outputs of what was asked for; B and C are inputs and need none."""
    if not a.emit.variables:
        return {}
    head_channel, state = a.x.shape[3], a.B.shape[3]
    tails = {
        "delta": (),
        "delta_cumsum": (),
        "A_bar": () if a.scalar_A else (state,),
        "B_bar": (state,),
        "h": (head_channel, state),
        "y": (head_channel,),
        "energy": (head_channel,),
        "mass": (),
        "mass_distance": (),
    }
    dtypes = dict.fromkeys(tails, a.dtype) | {"delta_cumsum": torch.float64}
    dtypes |= dict.fromkeys(STATE_SIZED, a.emit.dtype or a.dtype)
    return {
        name: torch.empty((len(a.x), *a.kept, *tail), dtype=dtypes[name], device=a.x.device)
        for name, tail in tails.items()
        if name in a.emit.variables
    }


def _slots(indices: Sequence[int] | None, size: int, device: torch.device) -> Tensor | None:
    """Where each token or head goes in the emission, -1 where nowhere; None where each goes to its own place."""
    if indices is None:
        return None
    slots = torch.full((size,), -1, dtype=torch.int32)
    slots[list(indices)] = torch.arange(len(indices), dtype=torch.int32)
    return slots.to(device)
