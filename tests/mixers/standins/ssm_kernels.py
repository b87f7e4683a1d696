"""The kernels that mamba_ssm's and fla's layers call, by their names and layouts: plain torch, token by token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENDLESS = (0.0, float("inf"))


def recurrence(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (b, t, head, p), delta (b, t, head), A (head, n), B and C (b, t, head, n), D (head, p): y, last state."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, delta, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    h = x.new_zeros((*x[:, 0].shape, B.shape[-1])) if h is None else h.to(dtype)
    made = []
    for t in range(x.shape[1]):
        write = (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        h = torch.exp(delta[:, t, :, None] * A)[:, :, None] * h + write
        made.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(made, 1)
    return y if D is None else y + D.to(dtype) * x, h


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limits: tuple[float, float] = ENDLESS) -> Tensor:
    wide = dt.to(torch.promote_types(dt.dtype, torch.float32))
    wide = wide if bias is None else wide + bias.to(wide.dtype)
    return (F.softplus(wide) if softplus else wide).clamp(*limits)


def gated(y: Tensor, z: Tensor | None, like: Tensor) -> Tensor:
    return (y if z is None else y * F.silu(z.to(y.dtype))).to(like.dtype)


# -- Mamba-1 -----------------------------------------------------------------------------------------------------------


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """u, delta, z (b, channel, t), B and C (b, n, t)."""
    step = step_size(delta.mT, delta_bias, delta_softplus)
    B, C = (tensor.mT[:, :, None].expand(-1, -1, u.shape[1], -1) for tensor in (B, C))
    y, h = recurrence(u.mT[..., None], step, A, B, C, None if D is None else D[:, None])
    y = gated(y[..., 0].mT, z, u)
    return (y, h[:, :, 0]) if return_last_state else y


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: None = None, C: None = None,
    D: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = True,
) -> Tensor:  # fmt: skip
    """xz (b, 2 channel, t): everything after in_proj at once."""
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    dt, b, c = F.linear(x.mT, x_proj_weight).split([rank, n, n], -1)
    y = selective_scan_fn(
        x, F.linear(dt, delta_proj_weight).mT, A, b.mT, c.mT, D, z, delta_bias, delta_softplus=delta_softplus
    )
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: None = None, activation: str | None = None
) -> Tensor:
    """x (b, channel, t), weight (channel, tap)."""
    assert activation in ("silu", "swish")
    taps = weight.shape[1]
    padded = F.pad(x, (taps - 1, 0))
    summed = sum(padded[..., tap : tap + x.shape[-1]] * weight[:, tap, None] for tap in range(taps))
    assert isinstance(summed, Tensor)
    return F.silu(summed if bias is None else summed + bias[:, None])


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x (b, channel); conv_state (b, channel, tap) moves on by one."""
    assert activation in ("silu", "swish")
    conv_state.copy_(conv_state.roll(-1, -1))
    conv_state[..., -1] = x
    summed = (conv_state * weight).sum(-1)
    return F.silu(summed if bias is None else summed + bias)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """state (b, channel, n), x, dt, z (b, channel), A (channel, n), B, C (b, n), D (channel); or a head before channel,
    and a group before n. Every channel has a dt and an A of its own here."""
    if state.ndim == 3:
        lifted = (None if t is None else t[None] for t in (D, dt_bias))
        D, dt_bias = lifted
        inner = selective_state_update(
            state[:, None], x[:, None], dt[:, None], A[None], B[:, None], C[:, None], D,
            None if z is None else z[:, None], dt_bias, dt_softplus,
        )  # fmt: skip
        return inner[:, 0]
    assert D is None or D.shape == x.shape[1:]
    step = step_size(dt, dt_bias, dt_softplus)
    heads = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads, 1)[:, :, None] for t in (B, C))
    state.copy_(torch.exp(step[..., None] * A) * state + (step * x)[..., None] * B)
    y = (state * C).sum(-1)
    return gated(y if D is None else y + D * x, z, x)


# -- Mamba-2 -----------------------------------------------------------------------------------------------------------


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: None = None, seq_idx: None = None,
    cu_seqlens: None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = ENDLESS,
    return_final_states: bool = False, return_varlen_states: bool = False,
) -> Any:  # fmt: skip
    """x, z (b, t, head, p), dt (b, t, head), A (head), B and C (b, t, group, n), D (head) or (head, p)."""
    assert seq_idx is None
    assert cu_seqlens is None
    step = step_size(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    D = D[:, None] if D is not None and D.ndim == 1 else D
    y, h = recurrence(x, step, A[:, None], B, C, D)
    y = gated(y, z, x)
    return (y, h) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: None = None, seq_idx: None = None, dt_limit: tuple[float, float] = ENDLESS,
    return_final_states: bool = False, activation: str = "silu", rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6, outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
    headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """zxbcdt (b, t, all of in_proj's rows): everything after in_proj at once."""
    assert outproj_weight is not None
    heads = len(A)
    p = D.shape[1] if headdim is None else headdim
    inner, n = heads * p, (len(conv1d_weight) - heads * p) // (2 * ngroups)
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * ngroups * n, heads], -1)
    xBC = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, activation=activation).mT
    x, B, C = xBC.split([inner, ngroups * n, ngroups * n], -1)
    norms = rmsnorm_weight is not None
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, p)), dt, A, B.unflatten(-1, (ngroups, n)), C.unflatten(-1, (ngroups, n)), chunk_size,
        D, None if norms else z.unflatten(-1, (heads, p)), dt_bias, dt_softplus=True, dt_limit=dt_limit,
    ).flatten(2)  # fmt: skip
    if rmsnorm_weight is not None:
        y = normed(y, z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    return F.linear(y, outproj_weight, outproj_bias)


def normed(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    gate = F.silu(z.to(wide))
    made = (y.to(wide) if norm_before_gate else y.to(wide) * gate).unflatten(-1, (groups, -1))
    made = (made * (made.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight
    return (made * gate if norm_before_gate else made).to(y.dtype)


class RMSNormGated(nn.Module):
    """RMS norm of groups of `group_size`, gated by z before or after."""

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        groups = x.shape[-1] // self.group_size
        return normed(x, z, self.weight, self.eps, groups, self.norm_before_gate)
