"""Layers of mamba_ssm and fla for tests: stand-ins where those packages cannot run, and a float64 reference.

Neither package is needed: their layers import compiled kernels, and run on a GPU alone. A stand-in has the real one's
class path, parameters, options and ways through, and calls the same functions of its module with the same layouts; it
is written from the equations. The reference is numpy, and shares no code with the stand-ins or the package.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = dict[str, np.ndarray]

SHARED = ("ssm_kernels", "fla_cache")
"""What the stand-ins import, under names that are nobody's."""
STANDINS = {
    "mamba_ssm.modules.mamba_simple": "mamba_simple.py",
    "mamba_ssm.modules.mamba2": "mamba2.py",
    "fla.layers.mamba": "fla_mamba.py",
    "fla.layers.mamba2": "fla_mamba2.py",
}


def _load(name: str, path: str) -> ModuleType:
    spec = spec_from_file_location(name, Path(__file__).parent / "standins" / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for _name in SHARED:
    sys.modules[_name] = _load(_name, f"{_name}.py")

standins = {name: _load(name, path) for name, path in STANDINS.items()}
"""The modules by the real ones' names."""


def perturbed(layer: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * (0.1 if name.endswith("A_log") else 0.2)
    return layer.eval()


class InferenceParams:
    """mamba_ssm's, as far as its layers look."""

    def __init__(self) -> None:
        self.seqlen_offset, self.key_value_memory_dict = 0, {}


class LanguageModel(nn.Module):
    """Layers with residuals between an embedding and a head, in mamba_ssm's names."""

    def __init__(self, layers: list[nn.Module], width: int = 24):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(61, width)
        self.backbone.layers = nn.ModuleList(layers)
        self.backbone.norm_f = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, 61, bias=False)

    def forward(self, input_ids: torch.Tensor, inference_params: Any = None, num_last_tokens: int = 0) -> Any:
        hidden: Any = self.backbone.embedding(input_ids)
        for layer in self.backbone.layers:
            hidden = hidden + layer(hidden, inference_params=inference_params)
        hidden = self.backbone.norm_f(hidden)[:, -num_last_tokens:]
        return type("Output", (), {"logits": self.lm_head(hidden)})()

    def generate(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Greedy."""
        params, last = InferenceParams(), ids
        with torch.no_grad():
            for _ in range(count):
                logits = self(last, inference_params=params, num_last_tokens=1).logits
                params.seqlen_offset += last.shape[1]
                last = logits.argmax(-1)
                ids = torch.cat([ids, last], 1)
        return ids


# -- the reference -----------------------------------------------------------------------------------------------------


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def convolved(u: np.ndarray, w: Arrays, without: str) -> np.ndarray:
    if without == "conv":
        return silu(u)
    taps = w["conv1d.weight"].shape[-1]
    padded = np.pad(u, ((0, 0), (taps - 1, 0), (0, 0)))
    summed = sum(padded[:, tap : tap + u.shape[1]] * w["conv1d.weight"][:, 0, tap] for tap in range(taps))
    return silu(summed + w.get("conv1d.bias", 0))


def recurred(x: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, ...]:
    """x (b, t, head, p), delta (b, t, head), A (head, n), B and C (b, t, head, n): h and C h of every token."""
    h = np.zeros((*x[:, 0].shape, B.shape[-1]))
    states, ys = [], []
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, :, None] * A)[:, :, None]
        h = decay * h + np.einsum("bh,bhp,bhn->bhpn", delta[:, t], x[:, t], B[:, t])
        states.append(h)
        ys.append(np.einsum("bhpn,bhn->bhp", h, C[:, t]))
    return np.stack(states, 1), np.stack(ys, 1)


def reference(layer: Any, u: Any, valid: np.ndarray, without: str = "", clamped: int | None = None) -> Arrays:
    """Every quantity of a layer; `without` is ablated, delta is clamped in the first `clamped` tokens (None: all)."""
    w = {name: tensor.detach().double().numpy() for name, tensor in layer.named_parameters()}
    made = np.asarray(u, np.float64) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    build = second if type(layer).__name__ == "Mamba2" else first
    return build(layer, w, made, valid[..., None].astype(float), without, clamped)


def first(layer: Any, w: Arrays, made: np.ndarray, mask: np.ndarray, without: str, clamped: int | None) -> Arrays:
    channels, n = w["A_log"].shape
    x, z = made[..., :channels], made[..., channels:]
    x = convolved(x * mask, w, without) * mask
    low = x @ w["x_proj.weight"].T
    rank = low.shape[-1] - 2 * n
    delta = np.logaddexp(0, low[..., :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    B, C = low[..., rank : rank + n], low[..., rank + n :]
    delta, B, C = (0 * t if without == name else t for name, t in {"delta": delta, "B": B, "C": C}.items())
    A = -np.exp(w["A_log"]) * (without != "decay")
    h, y = recurred(x[..., None], delta, A, *(np.repeat(t[:, :, None], channels, 2) for t in (B, C)))
    y = y[..., 0] + w["D"] * x
    gate = 1 if without == "gate" else silu(z)
    out = (y * gate) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)
    return {
        "delta": delta,
        "B": B[:, :, None],
        "C": C[:, :, None],
        "x": x,
        "z": z,
        "h": h[..., 0, :],
        "y": y,
        "out": out,
    }


def second(layer: Any, w: Arrays, made: np.ndarray, mask: np.ndarray, without: str, clamped: int | None) -> Arrays:
    p = getattr(layer, "headdim", None) or layer.head_dim
    g = getattr(layer, "ngroups", None) or layer.n_groups
    inner, heads = w["out_proj.weight"].shape[1], len(w["A_log"])
    grouped = (len(w["conv1d.weight"]) - inner) // 2
    z, xBC, dt = np.split(made, [inner, made.shape[-1] - heads], -1)
    x, B, C = np.split(convolved(xBC * mask, w, without) * mask, [inner, inner + grouped], -1)
    delta = np.logaddexp(0, dt + w["dt_bias"])
    delta[:, :clamped] = np.clip(delta[:, :clamped], *layer.dt_limit)
    delta, B, C = (0 * t if without == name else t for name, t in {"delta": delta, "B": B, "C": C}.items())
    x, z = (t.reshape(*t.shape[:2], heads, p) for t in (x, z))
    B, C = (t.reshape(*t.shape[:2], g, -1) for t in (B, C))
    A = -np.exp(w["A_log"])[:, None] * (without != "decay")
    h, y = recurred(x, delta, A, *(np.repeat(t, heads // g, 2) for t in (B, C)))
    y = y + w["D"].reshape(heads, -1) * x
    gate = np.ones_like(z) if without == "gate" else silu(z)
    mixed = y * (1 if layer.rmsnorm and layer.norm_before_gate else gate)
    if layer.rmsnorm:
        groups = mixed.reshape(*y.shape[:2], g, -1)
        groups = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + layer.norm.eps)
        mixed = groups.reshape(y.shape) * w["norm.weight"].reshape(heads, p)
        mixed = mixed * gate if layer.norm_before_gate else mixed
    out = mixed.reshape(*y.shape[:2], -1) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)
    return {"delta": delta, "B": B, "C": C, "x": x, "z": z, "h": h, "y": y, "out": out}
