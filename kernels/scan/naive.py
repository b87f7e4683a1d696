"""The selective scan, one token after another: the definition that every other backend is held to.

Symbols of one token t, for head i of group g(i) = i // (head / group), channel p and state n:

    delta_t (head)              clamp(softplus(delta + bias), limits)
    A_bar_t (head, state)       exp(delta_t A)
    B_bar_t (head, state)       delta_t B_t                      Euler, as Mamba's own kernels execute it
    h_t     (head, p, state)    A_bar_t h_{t-1} + B_bar_t x_t
    y_t     (head, p)           sum_n C_t h_t + D x_t
    out_t   (head, p)           y_t silu(z_t), or y_t without z

Source: Gu & Dao 2023, "Mamba", arXiv 2312.00752 (recurrence); Dao & Gu 2024, arXiv 2405.21060 (A a scalar a head).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan.arguments import Arguments

__all__ = ["scan", "step_size"]


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    tokens = set(range(a.n_token) if a.emit.tokens is None else a.emit.tokens)
    h = a.initial_state
    delta_cumsum = 0.0
    outputs, kept = [], []
    for t in range(a.n_token):
        x, B, C = (_at(tensor, t, a) for tensor in (a.x, a.B, a.C))
        B, C = (tensor.repeat_interleave(a.heads_per_group, 1) for tensor in (B, C))
        delta = step_size(_at(a.delta, t, a), a)
        A_bar = torch.exp(delta[..., None] * (a.A if a.A.ndim == 2 else a.A[:, None]))
        B_bar = delta[..., None] * B
        h = A_bar[:, :, None] * h + B_bar[:, :, None] * x[..., None]
        y = (C[:, :, None] * h).sum(-1)
        y = y if a.D is None else y + a.D * x
        outputs.append((y if a.z is None else y * F.silu(_at(a.z, t, a))).to(a.x.dtype))
        delta_cumsum = delta_cumsum + delta.double()
        if t in tokens:
            A_bar = A_bar if a.A.ndim == 2 else A_bar[..., 0]
            kept.append({"delta": delta, "A_bar": A_bar, "B_bar": B_bar, "h": h, "y": y, "delta_cumsum": delta_cumsum})
            kept[-1] = {name: a.emit.heads_of(kept[-1][name], 1) for name in a.emit.variables if name in kept[-1]}
    emission = {name: torch.stack([step[name] for step in kept], dim=1) for name in kept[0]}
    inputs = {name: a.emit.tokens_of(vars(a)[name]).clone() for name in "BC" if name in a.emit.variables}
    return torch.stack(outputs, dim=1), h, Emission(**emission, **inputs)


def step_size(delta: Tensor, a: Arguments) -> Tensor:
    """Raw delta (..., head) of the compute dtype -> step size: + bias, softplus (identity above 20), clamp."""
    delta = delta if a.delta_bias is None else delta + a.delta_bias
    delta = F.softplus(delta, beta=1.0, threshold=20.0) if a.delta_softplus else delta
    return torch.clamp(delta, *a.delta_limits)


def _at(tensor: Tensor, t: int, a: Arguments) -> Tensor:
    """Token t in the compute dtype; contiguous, so that the bits do not depend on the strides of the whole."""
    return tensor[:, t].to(a.dtype).contiguous()
