"""Tiny models of the Mamba-1 family, every weight perturbed, and their float64 reference in numpy.

The reference is written from each class's equations and parameters; it shares no code with the package, and of
transformers only what stands between the mixers (embedding, attention, MLP) of a whole model, run in float64.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = dict[str, np.ndarray]


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if name.endswith("A_log") else 0.15))
    return model.eval()


def falcon(seed: int = 0, bias: bool = False, **options: Any) -> nn.Module:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 3,
        "mixer_rms_eps": 1e-3, "use_bias": bias, "use_conv_bias": not bias,
    }  # fmt: skip
    return perturbed(FalconMambaForCausalLM(FalconMambaConfig(**sizes | options)), seed)


def jamba(seed: int = 0, bias: bool = False, **options: Any) -> nn.Module:
    """Attention in layer 1; experts in layer 1 and 3."""
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "mamba_d_state": 8, "num_hidden_layers": 4, "mamba_dt_rank": 3,
        "attn_layer_period": 3, "attn_layer_offset": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1, "rms_norm_eps": 1e-3,
        "mamba_proj_bias": bias, "mamba_conv_bias": not bias,
    }  # fmt: skip
    model = JambaForCausalLM(JambaConfig(**sizes | options))
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return perturbed(model, seed)


def zamba(seed: int = 0, bias: bool = False, **options: Any) -> nn.Module:
    """Every layer a mixer, layers 1 and 3 behind the shared attention; three heads."""
    from transformers import ZambaConfig, ZambaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 61, "hidden_size": 24, "mamba_d_state": 8, "num_hidden_layers": 4, "mamba_dt_rank": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 32, "n_mamba_heads": 3,
        "mamba_proj_bias": bias, "mamba_conv_bias": not bias,
    }  # fmt: skip
    return perturbed(ZambaForCausalLM(ZambaConfig(**sizes | options)), seed)


BUILDERS: dict[str, Callable[..., nn.Module]] = {"falcon": falcon, "jamba": jamba, "zamba": zamba}
LAYERS = {"falcon": [0, 1], "jamba": [0, 2, 3], "zamba": [0, 1, 2, 3]}


def mixers(model: nn.Module) -> dict[int, Any]:
    """The mixers by their true layer number: their place in the list of layers."""
    base: Any = getattr(model, "backbone", None) or model.model
    found = {}
    for number, layer in enumerate(base.layers):
        layer = getattr(layer, "mamba_decoder", layer)
        mixer = getattr(layer, "mixer", None) or getattr(layer, "mamba", None)
        if mixer is not None:
            found[number] = mixer
    return found


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def softplus(a: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, a)


def rms(a: np.ndarray, eps: float) -> np.ndarray:
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + eps)


def short_conv(u: np.ndarray, w: Arrays) -> np.ndarray:
    """u (batch, token, channel); the last tap of conv1d is the current token."""
    weight = w["conv1d.weight"][:, 0]
    out = np.zeros_like(u) + w.get("conv1d.bias", 0.0)
    for tap in range(weight.shape[1]):
        lag = weight.shape[1] - 1 - tap
        out[:, lag:] += u[:, : u.shape[1] - lag] * weight[:, tap]
    return silu(out)


def recur(x: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray) -> Arrays:
    """One head: x, delta (batch, token, channel), A (channel, state), B, C (batch, token, state), D (channel)."""
    h, states = np.zeros((len(x), *A.shape)), []
    for t in range(x.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        states.append(h)
    stacked = np.stack(states, 1)
    return {"h": stacked, "y": np.einsum("btcn,btn->btc", stacked, C) + D * x}


def norms_of(mixer: Any, w: Arrays) -> list[Callable[[np.ndarray], np.ndarray]]:
    """What dt, B and C go through after x_proj."""
    kind = type(mixer).__name__
    if kind == "FalconMambaMixer":
        return [lambda a: rms(a, mixer.config.mixer_rms_eps)] * 3
    eps = mixer.config.rms_norm_eps
    return [lambda a, n=n: rms(a, eps) * w[f"{n}_layernorm.weight"] for n in ("dt", "b", "c")]


def one_head(mixer: Any, w: Arrays, u: np.ndarray, mask: np.ndarray) -> Arrays:
    """FalconMambaMixer and JambaMambaMixer."""
    projected = (u * mask) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    x, z = np.split(projected, 2, axis=-1)
    x = short_conv(x, w) * mask
    n = w["A_log"].shape[1]
    low = x @ w["x_proj.weight"].T
    rank = low.shape[-1] - 2 * n
    parts = low[..., :rank], low[..., rank : rank + n], low[..., rank + n :]
    dt, B, C = (norm(part) for norm, part in zip(norms_of(mixer, w), parts, strict=True))
    delta = softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    made = recur(x, delta, -np.exp(w["A_log"]), B, C, w["D"])
    out = (made["y"] * silu(z)) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)
    return made | {"delta": delta, "B": B[:, :, None], "C": C[:, :, None], "x": x, "z": z, "out": out}


def many_heads(mixer: Any, w: Arrays, u: np.ndarray, mask: np.ndarray) -> Arrays:
    """ZambaMambaMixer: in_proj's rows are x0, z0, x1, z1, ...; head by head from x_proj on."""
    projected = (u * mask) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    x, z = projected[..., 0::2], projected[..., 1::2]
    x = short_conv(x, w) * mask
    n_heads, per_head, n = w["A_log"].shape
    heads = []
    for i in range(n_heads):
        mine = x[..., i * per_head : (i + 1) * per_head]
        low = mine @ w["x_proj_weight"][i].T
        rank = low.shape[-1] - 2 * n
        dt, B, C = low[..., :rank], low[..., rank : rank + n], low[..., rank + n :]
        delta = softplus(dt @ w["dt_proj_weight"][i].T + w["dt_proj_bias"][i])
        made = recur(mine, delta, -np.exp(w["A_log"][i]), B, C, w["D"][i])
        heads.append(made | {"delta": delta, "B": B[:, :, None], "C": C[:, :, None]})
    joined = {name: np.concatenate([head[name] for head in heads], axis=2) for name in heads[0]}
    out = (joined["y"] * silu(z)) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)
    return joined | {"x": x, "z": z, "out": out}


def reference_mixer(mixer: nn.Module, u: np.ndarray, mask: np.ndarray | None) -> Arrays:
    w = {name: tensor.double().numpy() for name, tensor in mixer.state_dict().items()}
    valid = np.ones((*u.shape[:2], 1)) if mask is None else mask[..., None].astype(float)
    make = many_heads if type(mixer).__name__ == "ZambaMambaMixer" else one_head
    return make(mixer, w, u.astype(np.float64), valid)


def reference_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """The whole language model in float64: its mixers from above, its norms without the library's rounding."""
    exact = copy.deepcopy(model).double()
    padding = None if mask is None else mask.numpy()
    for mixer in mixers(exact).values():
        mixer.forward = lambda hidden_states, mixer=mixer, **_: torch.as_tensor(
            reference_mixer(mixer, hidden_states.numpy(), padding)["out"]
        )
    inside = {id(part) for mixer in mixers(exact).values() for part in mixer.modules()}
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm") and id(module) not in inside:
            module.forward = lambda a, norm=module: norm.weight * torch.as_tensor(rms(a.numpy(), norm.variance_epsilon))
        if hasattr(module, "residual_in_fp32"):
            module.residual_in_fp32 = False
    with torch.no_grad():
        return exact(ids, attention_mask=mask, use_cache=False).logits.numpy()
