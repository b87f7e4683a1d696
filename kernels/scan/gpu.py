"""The backend "triton": what it refuses, the tensors it fills, and the kernel that fills them.

| A | kernel | its backward |
|---|---|---|
| (head, state), real | `fused`: chunks of tokens, decays of every state | `backward` |
| (head,), real | `chunked`: matrix products within a chunk | `chunked_backward` |

mass and mass_distance are `mass`'s, after either, and have no gradient.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan import backward as by_token
from mamba_probe.kernels.scan import chunked, chunked_backward, fused, mass
from mamba_probe.kernels.scan.arguments import Arguments, buffers
from mamba_probe.kernels.scan.known import Known, is_plain
from mamba_probe.kernels.scan.launcher import Plans, listed, slots

__all__ = [
    "Known", "backward", "buffers", "check_arguments", "check_device", "empty_states", "fill", "is_plain", "scan",
]  # fmt: skip


NOTHING = Emission()
"""Emitted, for calls that ask for nothing."""


def scan(a: Arguments, states: Tensor | None = None, plans: Plans | None = None) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission; fills `states` where given.

    plans: what earlier calls of this form have kept (`formed`).
    """
    out, last, emitted = fill(a, states, plans)
    return out, last, Emission(**emitted, **_inputs(a)) if a.emit.variables else NOTHING


def fill(a: Arguments, states: Tensor | None, plans: Plans | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`scan`, but for B and C."""
    check_arguments(a)
    device, (_, n_token, n_head, _) = a.x.device, a.x.shape
    out = torch.empty(a.x.shape, dtype=a.x.dtype, device=device)
    last = torch.empty(a.state_shape, dtype=a.dtype, device=device)
    emitted = buffers(a)
    asked = emitted, slots(a.emit.tokens, n_token, device), slots(a.emit.channels, n_head, device)
    with torch.cuda.device_of(a.x):
        if a.scalar_A:
            chunked.launch(a, out, last, *asked, plans=plans)
        else:
            fused.launch(a, out, last, *asked, states=states, plans=plans)
        mass.launch(a, *asked, plans=plans)
    return out, last, emitted


def _inputs(a: Arguments) -> dict[str, Tensor]:
    """B and C where they are emitted: copies."""
    found = {name: vars(a)[name] for name in "BC" if name in a.emit.variables}
    if a.emit.tokens is None or not found:
        return {name: value.clone() for name, value in found.items()}
    tokens = listed(a.emit.tokens, a.x.device)
    return {name: value.index_select(1, tokens) for name, value in found.items()}


def empty_states(a: Arguments) -> list[Tensor]:
    """Where a forward leaves what its backward begins from: one tensor, for the state before every SEGMENT-th token but
    the first; none where the backward needs none."""
    if a.scalar_A:
        return []
    return [torch.empty(fused.saved_shape(a), dtype=a.dtype, device=a.x.device)]


def backward(
    a: Arguments, states: Tensor | None, upstream: Mapping[str, Tensor | None], plans: Plans | None = None
) -> dict[str, Tensor]:
    """Gradients by the names of `Arguments` (initial_state: of given_state), from those of what was answered."""
    check_arguments(a)
    given = by_token.Upstream(**upstream)
    with torch.cuda.device_of(a.x):
        return (chunked_backward if a.scalar_A else by_token).backward(a, states, given, plans=plans)


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run."""
    compiled = isinstance(fused.scan_kernel, triton.JITFunction)
    if compiled and device.type != "cuda":
        raise ValueError(
            f'backend "triton" needs CUDA tensors; `x` is on {device}: use backend="cpu", or set '
            "TRITON_INTERPRET=1 before the first import of triton to interpret the kernel (slow, for tests)"
        )


def check_arguments(a: Arguments) -> None:
    """Raises ValueError for what the kernels do not do."""
    if a.A.is_complex():
        raise ValueError('backend "triton" does not support complex A yet: use backend="cpu"')
    check_device(a.x.device)
