"""Tiny hybrids of transformers with Mamba-2 mixers, every weight perturbed, and a float64 reference of each mixer.

The reference is numpy, from the equations and the model's configuration; it shares no code with the package, and none
with transformers' mixers.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

Arrays = dict[str, np.ndarray]

CHUNK, TAPS = 16, 4
BY_GROUP = "group_size" in inspect.signature(BambaRMSNormGated).parameters
"""Whether this release norms each group of Bamba and Granite by itself: 5.23 does, older ones take all as one."""
KINDS = ("bamba", "zamba2", "granite", "nemotron_h", "falcon_h1", "falcon_h1 norm first", "falcon_h1 no norm")
LAYERS = {"bamba": [0, 2, 3], "zamba2": [0, 1, 2, 3], "granite": [0, 2], "nemotron_h": [1, 4]}
"""The model's own numbers of its Mamba-2 layers; Falcon-H1 has one in each of two."""

_MAMBA: dict[str, Any] = {"mamba_n_heads": 6, "mamba_d_state": 8, "mamba_chunk_size": CHUNK}
_MAMBA |= {"time_step_limit": (0.6, 1.5)}
_SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}


def build(kind: str, groups: int = 2, bias: bool = True, seed: int = 0) -> Any:
    """A tiny language model of this kind."""
    family, _, variant = kind.partition(" ")
    torch.manual_seed(seed)
    made = {"bamba": bamba, "zamba2": zamba2, "granite": granite, "nemotron_h": nemotron_h}
    model = falcon_h1(groups, bias, variant) if family == "falcon_h1" else made[family](groups, bias)
    return perturbed(model, seed)


def norms_as_one(kind: str, groups: int = 2) -> bool:
    """Whether this release is known to be wrong about the norm of such a model."""
    return not BY_GROUP and groups > 1 and kind in ("bamba", "granite")


def mixes_single_tokens(kind: str) -> bool:
    """Whether this release is known to drop the token axis of one token, so that rows mix: Falcon-H1 up to 5.22."""
    norm = FalconH1RMSNormGated(4)
    return kind in ("falcon_h1", "falcon_h1 norm first") and norm(torch.ones(1, 1, 4)).ndim < 3


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * (0.1 if name.endswith("A_log") else 0.2)
    return model.eval()


def bamba(groups: int, bias: bool) -> nn.Module:
    options = {"mamba_n_groups": groups, "mamba_proj_bias": bias, "num_hidden_layers": 4, "attn_layer_indices": [1]}
    return transformers.BambaForCausalLM(transformers.BambaConfig(**_SIZES | _MAMBA | options))


def granite(groups: int, bias: bool) -> nn.Module:
    options = {"mamba_n_groups": groups, "mamba_proj_bias": bias, "num_hidden_layers": 3, "num_local_experts": 2}
    options |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts_per_tok": 1}
    options |= {"shared_intermediate_size": 16, "position_embedding_type": "rope", "rms_norm_eps": 1e-4}
    options |= {"embedding_multiplier": 1.5, "logits_scaling": 1.7, "residual_multiplier": 0.6}
    return transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**_SIZES | _MAMBA | options))


def zamba2(groups: int, bias: bool) -> nn.Module:
    options = {"mamba_ngroups": groups, "add_bias_linear": bias, "n_mamba_heads": 6, "mamba_d_state": 8}
    options |= {"chunk_size": CHUNK, "time_step_min": 0.4, "time_step_max": 1.0}
    options |= {"num_key_value_heads": 4, "adapter_rank": 4}
    options |= {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
    options |= {"num_hidden_layers": 4, "use_mem_rope": True, "use_shared_attention_adapter": True}
    options |= {"rms_norm_eps": 1e-3}  # not the mixer's
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**_SIZES | options))


def nemotron_h(groups: int, bias: bool) -> nn.Module:
    options = {"n_groups": groups, "use_bias": bias, "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 8}
    options |= {"chunk_size": CHUNK, "time_step_min": 0.4, "time_step_max": 1.0, "head_dim": 8, "n_routed_experts": 4}
    options |= {"time_step_limit": (0.0, 0.5)}  # which the mixer does not read
    options |= {"layers_block_type": ["full_attention", "linear_attention", "moe", "mlp", "linear_attention"]}
    options |= {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "layer_norm_epsilon": 1e-4}
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**_SIZES | options))


def falcon_h1(groups: int, bias: bool, variant: str) -> nn.Module:
    options = {"mamba_n_groups": groups, "mamba_proj_bias": bias, "projectors_bias": bias, "num_hidden_layers": 2}
    options |= {"mamba_d_ssm": 36, "head_dim": 8, "mamba_rms_norm": variant != "no norm"}
    options |= {"mamba_norm_before_gate": variant == "norm first", "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 0.9]}
    options |= {"ssm_in_multiplier": 0.8, "ssm_out_multiplier": 1.1, "lm_head_multiplier": 0.6, "key_multiplier": 0.9}
    options |= {"embedding_multiplier": 1.4, "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.2}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**_SIZES | _MAMBA | options))


@dataclass(frozen=True)
class Spec:
    """A mixer's sizes, limits and norm, as the configuration states them."""

    heads: int
    channels: int
    groups: int
    states: int
    limits: tuple[float, float]
    epsilon: float
    norm: str = "gate first"
    norm_groups: int = 1
    rows: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Multipliers of z, x, B, C and dt."""
    scale: float = 1.0
    """Multiplier of the input."""


def spec_of(config: Any) -> Spec:
    endless = float("inf")
    if config.model_type == "zamba2":
        sizes = (config.n_mamba_heads, config.mamba_headdim, config.mamba_ngroups, config.mamba_d_state)
        return Spec(*sizes, (config.time_step_min, endless), 1e-5, norm_groups=sizes[2])
    if config.model_type == "nemotron_h":
        sizes = (config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size)
        return Spec(*sizes, (config.time_step_min, endless), config.layer_norm_epsilon, norm_groups=sizes[2])
    sizes = (config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups, config.mamba_d_state)
    own = (config.time_step_limit, config.rms_norm_eps)
    if config.model_type != "falcon_h1":
        return Spec(*sizes, *own, norm_groups=sizes[2] if BY_GROUP else 1)
    norm = "gate first" if not config.mamba_norm_before_gate else "norm first"
    norm = norm if config.mamba_rms_norm else "no norm"
    return Spec(*sizes, *own, norm, sizes[2], tuple(config.ssm_multipliers), config.ssm_in_multiplier)


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def convolved(u: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """u (batch, token, channel), weight (channel, 1, tap): the last tap is the current token."""
    taps = weight.shape[-1]
    padded = np.pad(u, ((0, 0), (taps - 1, 0), (0, 0)))
    return silu(sum(padded[:, tap : tap + u.shape[1]] * weight[:, 0, tap] for tap in range(taps)) + bias)


def recurred(x: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, ...]:
    """x (b, t, head, p), delta (b, t, head), A (head), B and C (b, t, head, n): h and C h of every token."""
    h = np.zeros((*x.shape[:1], *x.shape[2:], B.shape[-1]))
    states, ys = [], []
    for t in range(x.shape[1]):
        write = np.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        h = np.exp(delta[:, t] * A)[..., None, None] * h + write
        states.append(h)
        ys.append(np.einsum("bhpn,bhn->bhp", h, C[:, t]))
    return np.stack(states, 1), np.stack(ys, 1)


def reference(
    mixer: nn.Module, spec: Spec, u: np.ndarray, valid: np.ndarray, without: str = "", clamped: int | None = None
) -> Arrays:
    """Every quantity of one mixer; `without` is ablated, delta is clamped in the first `clamped` tokens (None: all).

    u (batch, token, model), valid (batch, token): padding is zero before in_proj and after the convolution.
    """
    w = {name: tensor.detach().double().numpy() for name, tensor in mixer.named_parameters()}
    heads, p, g, n = spec.heads, spec.channels, spec.groups, spec.states
    mask, inner = valid[..., None].astype(float), heads * p
    made = (np.where(valid[..., None], u, 0) * spec.scale) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    parts = np.split(made, np.cumsum([inner, inner, g * n, g * n]), axis=-1)
    z, x, B, C, dt = (part * multiplier for part, multiplier in zip(parts, spec.rows, strict=True))
    xBC = np.concatenate([x, B, C], -1)
    xBC = silu(xBC) if without == "conv" else convolved(xBC, w["conv1d.weight"], w.get("conv1d.bias", 0))
    x, B, C = np.split(xBC * mask, np.cumsum([inner, g * n]), axis=-1)
    delta = np.logaddexp(0, dt + w["dt_bias"])
    delta[:, :clamped] = np.clip(delta[:, :clamped], *spec.limits)
    delta, B, C = (0 * t if without == name else t for name, t in {"delta": delta, "B": B, "C": C}.items())
    x, z = (t.reshape(*t.shape[:2], heads, p) for t in (x, z))
    B, C = (t.reshape(*t.shape[:2], g, n) for t in (B, C))
    A = np.zeros(heads) if without == "decay" else -np.exp(w["A_log"])
    h, y = recurred(x, delta, A, *(np.repeat(t, heads // g, axis=2) for t in (B, C)))
    y = y + w["D"][:, None] * x
    gate = np.ones_like(z) if without == "gate" else silu(z)
    out = gated(spec, y, gate, w) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)
    return {"delta": delta, "B": B, "C": C, "x": x, "z": z, "h": h, "y": y, "out": out}


def gated(spec: Spec, y: np.ndarray, gate: np.ndarray, w: Arrays) -> np.ndarray:
    flat = (*y.shape[:2], -1)
    if spec.norm == "no norm":
        return (y * gate).reshape(flat)
    made = (y if spec.norm == "norm first" else y * gate).reshape(*y.shape[:2], spec.norm_groups, -1)
    made = (made / np.sqrt((made**2).mean(-1, keepdims=True) + spec.epsilon)).reshape(flat) * w["norm.weight"]
    return made * gate.reshape(flat) if spec.norm == "norm first" else made


def mixers(model: nn.Module) -> dict[int, Any]:
    """Mamba-2 mixers by their layer's number: what has an A_log."""
    return {m.layer_idx: m for m in model.modules() if isinstance(m, nn.Module) and "A_log" in m._parameters}


def logits_in_float64(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """The language model in float64: the reference's mixers and plain RMS norms, the rest the library's in float64."""
    exact, spec = copy.deepcopy(model).double(), spec_of(model.config)
    exact.set_experts_implementation("eager")  # the grouped one takes no float64
    for mixer in mixers(exact).values():
        mixer.forward = _as_module(mixer, spec)
    for norm in (m for m in exact.modules() if type(m).__name__.endswith("RMSNorm")):
        norm.forward = _rms(norm)
    with torch.no_grad():
        return exact(ids, attention_mask=mask, use_cache=False).logits.numpy()


def _as_module(mixer: nn.Module, spec: Spec) -> Any:
    def forward(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        u = hidden_states.numpy()
        valid = np.ones(u.shape[:2], bool) if attention_mask is None else attention_mask.bool().numpy()
        return torch.from_numpy(reference(mixer, spec, u, valid)["out"])

    return forward


def _rms(norm: Any) -> Any:
    return lambda u: norm.weight * u * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm.variance_epsilon)
