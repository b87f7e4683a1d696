"""In the place of fla.layers.mamba: its parameters, its two ways through, its masks and its cache."""

from typing import Any

import torch
import torch.nn.functional as F
from fla_cache import get_layer_cache, update_layer_cache
from ssm_kernels import mamba_inner_fn, recurrence, selective_scan_fn, selective_state_update, step_size
from torch import Tensor, nn

is_fast_path_available = False
"""Of mamba_ssm's kernels."""
DEVICE = "cuda"
"""Where those run; a test may say otherwise."""


class Mamba(nn.Module):
    """Of fla: mamba_ssm's kernels on a GPU, else a loop. Its convolution is Triton's, or causal_conv1d's."""

    def __init__(
        self, hidden_size: int, state_size: int = 16, conv_kernel: int = 4, use_conv_bias: bool = True,
        intermediate_size: int = 48, use_bias: bool = False, hidden_act: str = "silu", layer_idx: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.hidden_size, self.ssm_state_size, self.conv_kernel_size = hidden_size, state_size, conv_kernel
        self.intermediate_size, self.dt_rank = intermediate_size, -(-hidden_size // 16)
        self.use_bias, self.use_conv_bias, self.layer_idx = use_bias, use_conv_bias, layer_idx
        self.activation, self.act = hidden_act, nn.SiLU()
        inner = intermediate_size
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner, padding=conv_kernel - 1, bias=use_conv_bias)
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=use_bias)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)
        self.causal_conv1d_fn = self.causal_conv1d_update = absent_triton
        self.backend = "triton"

    def cuda_kernels_forward(
        self, hidden_states: Tensor, last_state: Any = None, use_cache: bool | None = False,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        projected = self.in_proj(hidden_states).mT
        A, D, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()
        if self.training and not use_cache:
            out = mamba_inner_fn(
                projected, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, A, None, None, D, delta_bias=bias, delta_softplus=True,
            )  # fmt: skip
            return out, None, None
        x, gate = projected.chunk(2, 1)
        masks = attention_mask is not None and last_state is None
        x = x * attention_mask[:, None] if masks else x
        weights = self.conv1d.weight.view(self.conv1d.weight.size(0), self.conv1d.weight.size(2))
        conv_state = ssm_state = None
        if last_state is not None:
            conv_state, ssm_state = last_state["conv_state"], last_state["recurrent_state"]
            if self.backend == "triton":
                made = self.causal_conv1d_update(
                    x=x.mT, cache=conv_state, weight=weights, bias=self.conv1d.bias, activation=self.activation
                )
                x, conv_state = made[0].mT, made[1]
            else:
                x = self.causal_conv1d_update(x[..., 0], conv_state, weights, self.conv1d.bias, self.activation)
                x = x[..., None]
        elif self.backend == "triton":
            made = self.causal_conv1d_fn(
                x=x.mT, weight=weights, bias=self.conv1d.bias, activation=self.activation,
                output_final_state=bool(use_cache),
            )  # fmt: skip
            x, conv_state = made[0].mT, made[1]
        else:
            conv_state = self._build_conv_state(x) if use_cache else None
            x = self.causal_conv1d_fn(x, weights, self.conv1d.bias, activation=self.activation)
        x = x * attention_mask[:, None] if masks else x
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.ssm_state_size, self.ssm_state_size], -1)
        dt = self.dt_proj.weight @ dt.mT
        if last_state is not None:
            y = selective_state_update(
                ssm_state, x[..., 0], dt[..., 0], A, B[:, 0], C[:, 0], self.D, gate[..., 0], bias, dt_softplus=True
            )[..., None]
        else:
            y, ssm_state = selective_scan_fn(
                x, dt, A, B.mT, C.mT, D, gate, bias, delta_softplus=True, return_last_state=True
            )
        return self.out_proj(y.mT), conv_state, ssm_state

    def slow_forward(
        self, input_states: Tensor, last_state: Any = None, use_cache: bool | None = False,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        x, gate = self.in_proj(input_states).mT.chunk(2, 1)
        masks = attention_mask is not None and last_state is None
        x = x * attention_mask[:, None] if masks else x
        state = None
        if last_state is None:
            conv_state = self._build_conv_state(x) if use_cache else None
            x = self.act(self.conv1d(x)[..., : x.shape[-1]])
        else:
            conv_state, state = last_state["conv_state"], last_state["recurrent_state"][:, :, None]
            conv_state = torch.cat([conv_state[..., 1:], x], -1)
            summed = (conv_state * self.conv1d.weight[:, 0]).sum(-1, keepdim=True)
            x = self.act(summed if self.conv1d.bias is None else summed + self.conv1d.bias[:, None])
        x = x * attention_mask[:, None] if masks else x
        dt, B, C = self.x_proj(x.mT).split([self.dt_rank, self.ssm_state_size, self.ssm_state_size], -1)
        delta = step_size(self.dt_proj(dt), None, softplus=True)
        B, C = (t[:, :, None].expand(-1, -1, self.intermediate_size, -1) for t in (B, C))
        y, state = recurrence(x.mT[..., None], delta, -torch.exp(self.A_log.float()), B, C, self.D[:, None], state)
        y = y[..., 0].to(x.dtype) * self.act(gate).mT
        return self.out_proj(y), conv_state, state[:, :, 0]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None,
        use_cache: bool | None = False, output_attentions: bool | None = False, **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:  # fmt: skip
        last_state = get_layer_cache(self, past_key_values)
        if is_fast_path_available and DEVICE in self.x_proj.weight.device.type:
            made = self.cuda_kernels_forward(hidden_states, last_state, use_cache, attention_mask, **kwargs)
        else:
            made = self.slow_forward(hidden_states, last_state, use_cache, attention_mask, **kwargs)
        if use_cache and past_key_values is not None:
            update_layer_cache(
                self, past_key_values, recurrent_state=made[2], conv_state=made[1], offset=hidden_states.shape[1]
            )
        return made[0], None, past_key_values

    def _build_conv_state(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.conv_kernel_size - x.shape[-1], 0)).contiguous()


def absent_triton(*_args: Any, **_options: Any) -> Any:
    raise RuntimeError("fla's Triton convolution needs a GPU")
