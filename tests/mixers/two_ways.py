"""Stand-ins for Vim's Mamba, mamba_ssm's, and Caduceus' modules around it: their names and equations, in plain torch.

Each class says it is of the module that the real one is of. `FUSED` counts the calls of the fused kernels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

FUSED = []


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    taps = weight.shape[1]
    return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=len(weight)))


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x[:, :, None]], -1))
    return F.silu((conv_state * weight).sum(-1) + bias)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    narrow, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
    u, delta, B, C, z = (each.to(wide) for each in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias[:, None])
    state, ys = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[-1]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[:, None, :, t] * u[:, :, t, None]
        ys.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    y = (torch.stack(ys, -1) * F.silu(z)).to(narrow)
    return (y, state) if return_last_state else y


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    raise AssertionError("no step is taken in both directions")


def _moving(xz, conv, conv_bias, x_proj, dt_proj):
    """x after the convolution, dt, B, C and z, (batch, ..., token)."""
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv[:, 0], conv_bias, activation="silu")
    rank, low = dt_proj.shape[1], x_proj @ x
    states = (len(x_proj) - rank) // 2
    return x, dt_proj @ low[:, :rank], low[:, rank : rank + states], low[:, rank + states :], z


def mamba_inner_fn_no_out_proj(
    xz, conv, conv_bias, x_proj, dt_proj, A, B=None, C=None, D=None, delta_bias=None, delta_softplus=True
):
    FUSED.append("mamba_inner_fn_no_out_proj")
    x, dt, B, C, z = _moving(xz, conv, conv_bias, x_proj, dt_proj)
    return selective_scan_fn(x, dt, A, B, C, D, z, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, A_b, B=None, C=None, D=None, delta_bias=None,
    delta_softplus=True,
):  # fmt: skip
    FUSED.append("bimamba_inner_fn")
    x, dt, B, C, z = _moving(xz, conv, conv_bias, x_proj, dt_proj)
    y = selective_scan_fn(x, dt, A, B, C, D, z, delta_bias, delta_softplus)
    x, dt, B, C, z = (each.flip(-1) for each in (x, dt, B, C, z))
    back = selective_scan_fn(x, dt, A_b, B, C, D, z, delta_bias, delta_softplus)
    return F.linear((y + back.flip(-1)).mT, out_proj, out_bias)


def mamba_inner_fn(
    xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, B=None, C=None, D=None, delta_bias=None,
    delta_softplus=True,
):  # fmt: skip
    FUSED.append("mamba_inner_fn")
    x, dt, B, C, z = _moving(xz, conv, conv_bias, x_proj, dt_proj)
    return F.linear(selective_scan_fn(x, dt, A, B, C, D, z, delta_bias, delta_softplus).mT, out_proj, out_bias)


class _Sizes(nn.Module):
    def __init__(self, d_model, d_state=5, d_conv=4, dt_rank=3, bias=False, layer_idx=None, use_fast_path=True):
        super().__init__()
        self.d_inner, self.d_state, self.d_conv, self.dt_rank = 2 * d_model, d_state, d_conv, dt_rank
        self.d_model, self.layer_idx, self.use_fast_path, self.activation = d_model, layer_idx, use_fast_path, "silu"
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.act = nn.SiLU()
        self._way("", A="A_log")

    def _way(self, suffix, A):
        inner = self.d_inner
        low = self.dt_rank + 2 * self.d_state
        self._only_A(A)
        setattr(self, f"conv1d{suffix}", nn.Conv1d(inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1))
        setattr(self, f"x_proj{suffix}", nn.Linear(inner, low, bias=False))
        setattr(self, f"dt_proj{suffix}", nn.Linear(self.dt_rank, inner))
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))

    def _only_A(self, name):
        rows = torch.arange(1.0, self.d_state + 1).repeat(self.d_inner, 1)
        setattr(self, name, nn.Parameter(torch.log(rows)))

    def _xz(self, hidden_states):
        xz = self.in_proj.weight @ hidden_states.mT
        return xz if self.in_proj.bias is None else xz + self.in_proj.bias[:, None]


class Vim(_Sizes):
    __module__, __qualname__ = "mamba_ssm.modules.mamba_simple", "Mamba"

    def __init__(self, d_model, bimamba_type="v2", if_divide_out=False, init_layer_scale=None, **sizes):
        super().__init__(d_model, **sizes)
        self.bimamba_type, self.if_divide_out, self.init_layer_scale = bimamba_type, if_divide_out, init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))
        if bimamba_type == "v2":
            self._way("_b", A="A_b_log")
        else:
            self._only_A("A_b_log")

    def forward(self, hidden_states, inference_params=None):
        xz, A = self._xz(hidden_states), -torch.exp(self.A_log.float())
        if self.use_fast_path and inference_params is None and self.bimamba_type == "v1":
            out = bimamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, A, -torch.exp(self.A_b_log.float()), None, None,
                self.D.float(), delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )  # fmt: skip
        elif self.use_fast_path and inference_params is None:
            y = mamba_inner_fn_no_out_proj(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, A, None, None,
                self.D.float(), delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )  # fmt: skip
            back = mamba_inner_fn_no_out_proj(
                xz.flip([-1]), self.conv1d_b.weight, self.conv1d_b.bias, self.x_proj_b.weight, self.dt_proj_b.weight,
                -torch.exp(self.A_b_log.float()), None, None, self.D_b.float(),
                delta_bias=self.dt_proj_b.bias.float(), delta_softplus=True,
            )  # fmt: skip
            y = (y + back.flip([-1])).mT
            out = F.linear(y / 2 if self.if_divide_out else y, self.out_proj.weight, self.out_proj.bias)
        else:
            x, z = xz.chunk(2, 1)
            x = causal_conv1d_fn(x, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
            dt, B, C = self.x_proj(x.mT).mT.split([self.dt_rank, self.d_state, self.d_state], 1)
            y = selective_scan_fn(
                x, self.dt_proj.weight @ dt, A, B, C, self.D.float(), z=z, delta_bias=self.dt_proj.bias.float(),
                delta_softplus=True,
            )  # fmt: skip
            out = self.out_proj(y.mT)
        return out if self.init_layer_scale is None else out * self.gamma


class Mamba(_Sizes):
    __module__, __qualname__ = "mamba_ssm.modules.mamba_simple", "Mamba"

    def forward(self, hidden_states, inference_params=None):
        xz, A = self._xz(hidden_states), -torch.exp(self.A_log.float())
        if self.use_fast_path and causal_conv1d_fn is not None and inference_params is None:
            return mamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, A, None, None, self.D.float(),
                delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )  # fmt: skip
        x, z = xz.chunk(2, 1)
        x = causal_conv1d_fn(x=x, weight=self.conv1d.weight[:, 0], bias=self.conv1d.bias, activation=self.activation)
        dt, B, C = self.x_proj(x.mT).mT.split([self.dt_rank, self.d_state, self.d_state], 1)
        y = selective_scan_fn(
            x, self.dt_proj.weight @ dt, A, B, C, self.D.float(), z=z, delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True, return_last_state=False,
        )  # fmt: skip
        return self.out_proj(y.mT)

    def step(self, hidden_states, conv_state, ssm_state):
        x = causal_conv1d_update(hidden_states, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        return selective_state_update(ssm_state, x, x, self.A_log, x, x)


class BiMambaWrapper(nn.Module):
    __module__ = "transformers_modules.kuleshov.modeling_caduceus"

    def __init__(self, d_model, bidirectional=True, bidirectional_strategy="add", bidirectional_weight_tie=True, **of):
        super().__init__()
        self.bidirectional, self.bidirectional_strategy = bidirectional, bidirectional_strategy
        self.mamba_fwd = Mamba(d_model, **of)
        self.mamba_rev = Mamba(d_model, **of) if bidirectional else None
        if bidirectional and bidirectional_weight_tie:
            for name in ("in_proj", "out_proj"):
                first, second = getattr(self.mamba_fwd, name), getattr(self.mamba_rev, name)
                second.weight, second.bias = first.weight, first.bias

    def forward(self, hidden_states, inference_params=None):
        out = self.mamba_fwd(hidden_states, inference_params=inference_params)
        if not self.bidirectional:
            return out
        back = self.mamba_rev(hidden_states.flip(dims=(1,)), inference_params=inference_params).flip(dims=(1,))
        return out * back if self.bidirectional_strategy == "ew_multiply" else out + back


class RCPSWrapper(nn.Module):
    __module__ = "transformers_modules.kuleshov.modeling_rcps"

    def __init__(self, submodule):
        super().__init__()
        self.submodule = submodule

    @staticmethod
    def rc(x):
        return torch.flip(x, dims=[-2, -1])

    def forward(self, x, **kwargs):
        given, other = x.chunk(2, -1)
        return torch.cat([self.submodule(given, **kwargs), self.rc(self.submodule(self.rc(other), **kwargs))], -1)


class _Block(nn.Module):
    def __init__(self, mixer, width):
        super().__init__()
        self.mixer, self.norm = mixer, nn.LayerNorm(width)

    def forward(self, hidden):
        return hidden + self.mixer(self.norm(hidden))


class Output(NamedTuple):
    logits: torch.Tensor


class LanguageModel(nn.Module):
    """A masked language model of bidirectional layers: embedding, blocks, last norm, unembedding."""

    def __init__(self, mixers, width, vocab=12):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(_Block(mixer, width) for mixer in mixers)
        self.norm_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return Output(self.lm_head(self.norm_f(hidden)))


WIDTH = 6


def _vim(**options):
    return [Vim(WIDTH, **options) for _ in range(2)], WIDTH  # Vim's own models number them; a bare one has None


def _caduceus(**options):
    return [BiMambaWrapper(WIDTH, layer_idx=layer, **options) for layer in range(2)], WIDTH


def _rcps(**options):
    layers, width = _caduceus(**options)
    return [RCPSWrapper(layer) for layer in layers], 2 * width


KINDS = {
    "vim": lambda: _vim(),
    "vim, divided and scaled": lambda: _vim(if_divide_out=True, init_layer_scale=0.5, bias=True),
    "vim v1": lambda: _vim(bimamba_type="v1", if_divide_out=True, bias=True),
    "caduceus": lambda: _caduceus(bias=True),
    "caduceus, untied product": lambda: _caduceus(
        bidirectional_strategy="ew_multiply", bidirectional_weight_tie=False, bias=True
    ),
    "caduceus, slow path": lambda: _caduceus(use_fast_path=False),
    "rcps": lambda: _rcps(),
}
"""Models by what is special about them: (mixers, features)."""
