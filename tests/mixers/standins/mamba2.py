"""In the place of mamba_ssm.modules.mamba2: its parameters, options, and the ways through its forward."""

from typing import Any

import torch
import torch.nn.functional as F
from ssm_kernels import (
    RMSNormGated,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from torch import Tensor, nn

causal_conv1d_fn: Any = None
causal_conv1d_update: Any = None


class Mamba2(nn.Module):
    """Of mamba_ssm: everything at once, or apart; single tokens by `step`."""

    def __init__(
        self, d_model: int, d_state: int = 128, d_conv: int = 4, expand: int = 2, headdim: int = 64,
        d_ssm: int | None = None, ngroups: int = 1, D_has_hdim: bool = False, rmsnorm: bool = True,
        norm_before_gate: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), bias: bool = False,
        chunk_size: int = 256, use_mem_eff_path: bool = True, layer_idx: int | None = None,
        process_group: Any = None,
    ):  # fmt: skip
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups, self.nheads, self.D_has_hdim, self.rmsnorm = ngroups, self.d_ssm // headdim, D_has_hdim, rmsnorm
        self.norm_before_gate, self.dt_limit, self.chunk_size = norm_before_gate, dt_limit, chunk_size
        self.use_mem_eff_path, self.layer_idx, self.process_group = use_mem_eff_path, layer_idx, process_group
        self.activation, self.act = "silu", nn.SiLU()
        grouped = 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + grouped + self.nheads, bias=bias)
        mixed = self.d_ssm + grouped
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.linspace(-3.0, -1.0, self.nheads))
        self.A_log = nn.Parameter(torch.linspace(1.0, 8.0, self.nheads).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads))
        if rmsnorm:
            self.norm = RMSNormGated(self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(
        self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:  # fmt: skip
        conv_state = ssm_state = None
        if inference_params is not None:
            conv_state, ssm_state = self._cached(inference_params, len(u))
            if inference_params.seqlen_offset > 0:
                return self.step(u, conv_state, ssm_state)[0]
        zxbcdt = self.in_proj(u)
        A = -torch.exp(self.A_log.float())
        limits = {} if self.dt_limit == (0.0, float("inf")) else {"dt_limit": self.dt_limit}
        D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
        if self.use_mem_eff_path and inference_params is None:
            return mamba_split_conv1d_scan_combined(
                zxbcdt, self.conv1d.weight[:, 0], self.conv1d.bias, self.dt_bias, A, D=D, chunk_size=self.chunk_size,
                seq_idx=seq_idx, activation=self.activation,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6, outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias, headdim=None if self.D_has_hdim else self.headdim,
                ngroups=self.ngroups, norm_before_gate=self.norm_before_gate, **limits,
            )  # fmt: skip
        z, xBC, dt = self._parted(zxbcdt)
        if conv_state is not None:
            conv_state.copy_(F.pad(xBC.mT, (self.d_conv - xBC.shape[1], 0)))
        if causal_conv1d_fn is None:
            xBC = self.act(self.conv1d(xBC.mT).mT[:, : -(self.d_conv - 1)])
        else:
            xBC = causal_conv1d_fn(
                xBC.mT, self.conv1d.weight[:, 0], bias=self.conv1d.bias, activation=self.activation, seq_idx=seq_idx
            ).mT
        x, B, C = self._parts(xBC)
        y = mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=self.chunk_size, D=D,
            z=None if self.rmsnorm else z.unflatten(-1, (-1, self.headdim)), dt_bias=self.dt_bias, dt_softplus=True,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens, **limits, return_final_states=ssm_state is not None,
            return_varlen_states=cu_seqlens is not None and inference_params is not None,
        )  # fmt: skip
        if ssm_state is not None:
            y, last_state, *_ = y
            ssm_state.copy_(last_state)
        y = y.flatten(2)
        return self.out_proj(self.norm(y, z) if self.rmsnorm else y)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = self._parted(self.in_proj(hidden_states[:, 0]))
        if causal_conv1d_update is None:
            conv_state.copy_(conv_state.roll(-1, -1))
            conv_state[..., -1] = xBC
            xBC = self.act((conv_state * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        else:
            xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        x, B, C = self._parts(xBC)
        p, n, A = self.headdim, self.d_state, -torch.exp(self.A_log.float())
        y = selective_state_update(
            ssm_state, x, dt[..., None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n), B, C,
             self.D[:, None].expand(-1, p), z=None if self.rmsnorm else z.unflatten(-1, (-1, p)),
            dt_bias=self.dt_bias[:, None].expand(-1, p), dt_softplus=True,
        ).flatten(1)  # fmt: skip
        y = self.norm(y, z) if self.rmsnorm else y
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def _parted(self, made: Tensor) -> tuple[Tensor, ...]:
        return made.split([self.d_ssm, self.d_ssm + 2 * self.ngroups * self.d_state, self.nheads], -1)

    def _parts(self, xBC: Tensor) -> tuple[Tensor, ...]:
        grouped = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, grouped, grouped], -1)
        return x.unflatten(-1, (-1, self.headdim)), *(t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))

    def _cached(self, inference_params: Any, batch: int) -> tuple[Tensor, Tensor]:
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            weight = self.conv1d.weight
            states = weight.new_zeros(batch, self.nheads, self.headdim, self.d_state)
            cache[self.layer_idx] = weight.new_zeros(batch, self.d_conv, len(weight)).mT, states
        return cache[self.layer_idx]
