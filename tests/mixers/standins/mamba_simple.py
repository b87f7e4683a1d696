"""In the place of mamba_ssm.modules.mamba_simple: its parameters, options, and the ways through its forward."""

from typing import Any

import torch
import torch.nn.functional as F
from ssm_kernels import mamba_inner_fn, selective_scan_fn, selective_state_update
from torch import Tensor, nn

causal_conv1d_fn: Any = None
causal_conv1d_update: Any = None


class Mamba(nn.Module):
    """Of mamba_ssm: everything at once where causal_conv1d is installed, else apart; single tokens by `step`."""

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, conv_bias: bool = True,
        bias: bool = False, use_fast_path: bool = True, layer_idx: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, -(-d_model // 16)
        self.use_fast_path, self.layer_idx, self.activation, self.act = use_fast_path, layer_idx, "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        seqlen = hidden_states.shape[1]
        conv_state = ssm_state = None
        if inference_params is not None:
            conv_state, ssm_state = self._cached(inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = (hidden_states @ self.in_proj.weight.T).mT
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias[:, None]
        A = -torch.exp(self.A_log.float())
        if self.use_fast_path and causal_conv1d_fn is not None and inference_params is None:
            return mamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, A, None, None, self.D.float(),
                delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )  # fmt: skip
        x, z = xz.chunk(2, dim=1)
        if conv_state is not None:
            conv_state.copy_(F.pad(x, (self.d_conv - seqlen, 0)))
        if causal_conv1d_fn is None:
            x = self.act(self.conv1d(x)[..., :seqlen])
        else:
            x = causal_conv1d_fn(
                x=x, weight=self.conv1d.weight[:, 0], bias=self.conv1d.bias, activation=self.activation
            )
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = selective_scan_fn(
            x, (dt @ self.dt_proj.weight.T).mT, A, B.mT, C.mT, self.D.float(), z=z,
            delta_bias=self.dt_proj.bias.float(), delta_softplus=True, return_last_state=ssm_state is not None,
        )  # fmt: skip
        if ssm_state is not None:
            y, last_state = y
            ssm_state.copy_(last_state)
        return self.out_proj(y.mT)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert hidden_states.shape[1] == 1
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        if causal_conv1d_update is None:
            conv_state.copy_(conv_state.roll(-1, -1))
            conv_state[..., -1] = x
            x = (conv_state * self.conv1d.weight[:, 0]).sum(-1)
            x = self.act(x if self.conv1d.bias is None else x + self.conv1d.bias)
        else:
            x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = selective_state_update(
            ssm_state, x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), B, C, self.D, z=z,
            dt_bias=self.dt_proj.bias, dt_softplus=True,
        )  # fmt: skip
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def _cached(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            weight = self.conv1d.weight
            cache[self.layer_idx] = tuple(weight.new_zeros(batch, self.d_inner, n) for n in (self.d_conv, self.d_state))
        return cache[self.layer_idx]
