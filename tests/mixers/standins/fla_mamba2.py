"""In the place of fla.layers.mamba2: its parameters, its two ways through, its masks and its cache."""

from typing import Any

import torch
import torch.nn.functional as F
from fla_cache import get_layer_cache, update_layer_cache
from ssm_kernels import (
    RMSNormGated,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    recurrence,
    selective_state_update,
    step_size,
)
from torch import Tensor, nn

is_fast_path_available = False
"""Of mamba_ssm's kernels."""
DEVICE = "cuda"
"""Where those run; a test may say otherwise."""


class Mamba2(nn.Module):
    """Of fla: mamba_ssm's kernels on a GPU, else torch, which clamps single steps too and repeats groups wrongly."""

    def __init__(
        self, head_dim: int = 64, hidden_size: int = 2048, state_size: int = 128, expand: int = 2, n_groups: int = 1,
        conv_kernel: int = 4, hidden_act: str = "silu", D_has_hdim: bool = False, rmsnorm: bool = True,
        norm_before_gate: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), use_bias: bool = False,
        chunk_size: int = 256, layer_idx: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.hidden_size, self.head_dim, self.ssm_state_size, self.n_groups = (
            hidden_size,
            head_dim,
            state_size,
            n_groups,
        )
        self.intermediate_size = expand * hidden_size
        self.num_heads, self.conv_kernel_size = self.intermediate_size // head_dim, conv_kernel
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate, self.dt_limit = (
            D_has_hdim,
            rmsnorm,
            norm_before_gate,
            dt_limit,
        )
        self.activation, self.act, self.chunk_size, self.layer_idx = hidden_act, nn.SiLU(), chunk_size, layer_idx
        self.conv_dim = self.intermediate_size + 2 * n_groups * state_size
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, conv_kernel, groups=self.conv_dim, padding=conv_kernel - 1
        )
        self.in_proj = nn.Linear(hidden_size, self.intermediate_size + self.conv_dim + self.num_heads, bias=use_bias)
        self.dt_bias = nn.Parameter(torch.linspace(-3.0, -1.0, self.num_heads))
        self.A_log = nn.Parameter(torch.linspace(1.0, 8.0, self.num_heads).log())
        grouped = self.intermediate_size // n_groups
        self.norm = RMSNormGated(self.intermediate_size, 1e-5, grouped, norm_before_gate) if rmsnorm else None
        self.D = nn.Parameter(torch.ones(self.intermediate_size if D_has_hdim else self.num_heads))
        self.out_proj = nn.Linear(self.intermediate_size, hidden_size, bias=use_bias)
        self.causal_conv1d_fn = self.causal_conv1d_update = absent_triton
        self.backend = "triton"

    def _get_D(self, expand_to_head_dim: bool = False) -> Tensor:
        if self.D_has_hdim:
            return self.D.unflatten(0, (-1, self.head_dim))
        return self.D[:, None].expand(-1, self.head_dim) if expand_to_head_dim else self.D

    def cuda_kernels_forward(
        self, hidden_states: Tensor, last_state: Any = None, use_cache: bool = False,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        projected = self.in_proj(hidden_states)
        A = -torch.exp(self.A_log.float())
        limits = {} if self.dt_limit == (0.0, float("inf")) else {"dt_limit": self.dt_limit}
        weights, p, n = self.conv1d.weight.squeeze(1), self.head_dim, self.ssm_state_size
        if last_state is None and self.training and not use_cache:
            out = mamba_split_conv1d_scan_combined(
                projected, weights, self.conv1d.bias, self.dt_bias, A, D=self._get_D(), chunk_size=self.chunk_size,
                seq_idx=None, activation=self.activation, rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6, outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias, headdim=None if self.D_has_hdim else p, ngroups=self.n_groups,
                norm_before_gate=self.norm_before_gate, return_final_states=False, **limits,
            )  # fmt: skip
            return out, None, None
        gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        if last_state is not None:
            conv_state, ssm_state = last_state["conv_state"], last_state["recurrent_state"]
            gate, xBC, dt = gate[:, 0], xBC[:, 0], dt[:, 0]
            if self.backend == "triton":
                xBC, conv_state = self.causal_conv1d_update(
                    x=xBC, cache=conv_state, weight=weights, bias=self.conv1d.bias, activation=self.activation
                )
            else:
                xBC = self.causal_conv1d_update(xBC, conv_state, weights, self.conv1d.bias, self.activation)
            x, B, C = self._parts(xBC)
            y = selective_state_update(
                ssm_state, x, dt[:, :, None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n), B, C,
                self._get_D(expand_to_head_dim=True), z=None if self.rmsnorm else gate.view(-1, self.num_heads, p),
                dt_bias=self.dt_bias[:, None].expand(-1, p), dt_softplus=True,
            ).view(len(x), -1)  # fmt: skip
            y = self.norm(y, gate) if self.rmsnorm else y
            return self.out_proj(y)[:, None], conv_state, ssm_state
        xBC = masked(xBC, attention_mask)
        conv_state = F.pad(xBC.mT, (self.conv_kernel_size - xBC.shape[1], 0)) if use_cache else None
        made = self.causal_conv1d_fn(
            x=xBC if self.backend == "triton" else xBC.mT.contiguous(), weight=weights, bias=self.conv1d.bias,
            activation=self.activation,
        )  # fmt: skip
        xBC = masked(made[0] if self.backend == "triton" else made.mT, attention_mask)
        x, B, C = self._parts(xBC)
        y, ssm_state = mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=self.chunk_size, D=self._get_D(),
            z=None if self.rmsnorm else gate.unflatten(-1, (-1, p)), seq_idx=None, return_final_states=True,
            dt_bias=self.dt_bias, dt_softplus=True, **limits,
        )  # fmt: skip
        y = y.view(*y.shape[:2], -1)
        return self.out_proj(self.norm(y, gate) if self.rmsnorm else y), conv_state, ssm_state

    def torch_forward(
        self, input_states: Tensor, last_state: Any = None, use_cache: bool = False,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        gate, xBC, dt = self.in_proj(input_states).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        state, conv_state = None, None
        if last_state is None:
            xBC = masked(xBC, attention_mask)
            conv_state = F.pad(xBC.mT, (self.conv_kernel_size - xBC.shape[1], 0)) if use_cache else None
            xBC = masked(self.act(self.conv1d(xBC.mT)[..., : xBC.shape[1]].mT), attention_mask)
        else:
            state = last_state["recurrent_state"]
            conv_state = torch.cat([last_state["conv_state"][..., 1:], xBC.mT], -1)
            xBC = self.act((conv_state * self.conv1d.weight.squeeze(1)).sum(-1) + self.conv1d.bias)[:, None]
        x, B, C = self._parts(xBC)
        heads = self.num_heads // self.n_groups
        if last_state is None:
            B, C = (t.repeat(1, 1, heads, 1) for t in (B, C))
        else:
            B, C = (t.repeat_interleave(heads, 2) for t in (B, C))
        delta = step_size(dt, self.dt_bias, True, self.dt_limit)
        A, D = -torch.exp(self.A_log.float())[:, None], self._get_D(expand_to_head_dim=True)
        y, state = recurrence(x, delta, A, B, C, D, state)
        y = y.flatten(2).to(x.dtype)
        y = self.norm(y, gate) if self.norm is not None else y * self.act(gate)
        return self.out_proj(y), conv_state, state

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        use_cache: bool | None = False, output_attentions: bool | None = False, **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:  # fmt: skip
        last_state = get_layer_cache(self, past_key_values)
        if is_fast_path_available and DEVICE in self.in_proj.weight.device.type:
            made = self.cuda_kernels_forward(hidden_states, last_state, use_cache, attention_mask)
        else:
            if last_state is None:
                hidden_states = masked(hidden_states, attention_mask)
            made = self.torch_forward(hidden_states, last_state, use_cache, attention_mask)
        update_layer_cache(
            self, past_key_values, recurrent_state=made[2], conv_state=made[1], offset=hidden_states.shape[1]
        )
        return made[0], None, past_key_values

    def _parts(self, xBC: Tensor) -> tuple[Tensor, ...]:
        grouped = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, grouped, grouped], -1)
        return x.unflatten(-1, (-1, self.head_dim)), *(t.unflatten(-1, (self.n_groups, -1)) for t in (B, C))


def masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None or mask.shape != hidden.shape[:2] else hidden * mask[:, :, None]


def absent_triton(*_args: Any, **_options: Any) -> Any:
    raise RuntimeError("fla's Triton convolution needs a GPU")
