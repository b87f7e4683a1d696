"""An independent float64 reference: numpy, from the equations, sharing no code with the package or transformers."""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

Arrays = dict[str, np.ndarray]


def _load(name: str, path: str) -> Any:
    spec = spec_from_file_location(name, Path(__file__).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STANDING_BY = ("cells", "mamba1_families", "mamba2_families", "libraries", "two_ways", "two_ways_oracle")
"""What the tests here import."""
for _name in STANDING_BY:
    _load(_name, f"{_name}.py")


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def softplus(a: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, a)


def conv(u: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """u (batch, token, channel), weight (channel, 1, tap): the last tap is the current token."""
    out = np.zeros_like(u) + bias
    for tap in range(weight.shape[-1]):
        lag = weight.shape[-1] - 1 - tap
        out[:, lag:] += u[:, : u.shape[1] - lag] * weight[:, 0, tap]
    return silu(out)


def recur(x: np.ndarray, delta: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray) -> Arrays:
    """x (b, t, head, p), delta (b, t, head), A (head, n), B and C (b, t, head, n), D (head)."""
    h = np.zeros((*x.shape[0:1], *x.shape[2:], A.shape[-1]))
    states, ys = [], []
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, :, None] * A)[:, :, None]
        write = (delta[:, t, :, None] * B[:, t])[:, :, None] * x[:, t, :, :, None]
        h = decay * h + write
        states.append(h)
        ys.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return {"h": np.stack(states, 1), "y": np.stack(ys, 1)}


def mamba(mixer: Any, w: Arrays, u: np.ndarray, mask: np.ndarray) -> Arrays:
    n, inner = mixer.ssm_state_size, mixer.intermediate_size
    xz = (u * mask) @ w["in_proj.weight"].T
    x, z = xz[..., :inner], xz[..., inner:]
    x = conv(x, w["conv1d.weight"], w["conv1d.bias"]) * mask
    low = x @ w["x_proj.weight"].T
    rank = low.shape[-1] - 2 * n
    delta = softplus(low[..., :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    B, C = low[..., rank : rank + n], low[..., rank + n :]
    per_channel = [np.repeat(t[:, :, None], inner, axis=2) for t in (B, C)]
    made = recur(x[..., None], delta, -np.exp(w["A_log"]), *per_channel, w["D"])
    out = (made["y"][..., 0] * silu(z)) @ w["out_proj.weight"].T
    return {
        "delta": delta, "B": B[:, :, None], "C": C[:, :, None], "x": x, "z": z, "out": out,
        "y": made["y"][..., 0], "h": made["h"][:, :, :, 0],
    }  # fmt: skip


def mamba2(mixer: Any, w: Arrays, u: np.ndarray, mask: np.ndarray) -> Arrays:
    heads, p, g, n = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    zxbcdt = (u * mask) @ w["in_proj.weight"].T
    z, xbc, dt = np.split(zxbcdt, [heads * p, zxbcdt.shape[-1] - heads], axis=-1)
    xbc = conv(xbc, w["conv1d.weight"], w["conv1d.bias"]) * mask
    x, B, C = np.split(xbc, [heads * p, heads * p + g * n], axis=-1)
    delta = np.clip(softplus(dt + w["dt_bias"]), *mixer.time_step_limit)
    x, z4 = (t.reshape(*t.shape[:2], heads, p) for t in (x, z))
    B, C = (t.reshape(*t.shape[:2], g, n) for t in (B, C))
    per_head = [np.repeat(t, heads // g, axis=2) for t in (B, C)]
    made = recur(x, delta, -np.exp(w["A_log"])[:, None], *per_head, w["D"])
    grouping = 1 if norms_as_one(mixer) else g
    gated = (made["y"].reshape(z.shape) * silu(z)).reshape(*z.shape[:2], grouping, -1)
    normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + mixer.layer_norm_epsilon)
    out = (normed.reshape(z.shape) * w["norm.weight"]) @ w["out_proj.weight"].T
    return {"delta": delta, "B": B, "C": C, "x": x, "z": z4, "out": out, "y": made["y"], "h": made["h"]}


def norms_as_one(mixer: Any) -> bool:
    """Whether this release is known to be wrong about the norm of a mixer: up to 5.22 it takes all groups as one."""
    return getattr(mixer, "n_groups", 1) > 1 and "group_size" not in vars(mixer.norm)


def reference_mixer(mixer: nn.Module, u: np.ndarray, mask: np.ndarray | None) -> Arrays:
    w = {name: tensor.double().numpy() for name, tensor in mixer.state_dict().items()}
    valid = np.ones((*u.shape[:2], 1)) if mask is None else mask[..., None].astype(float)
    return {"MambaMixer": mamba, "Mamba2Mixer": mamba2}[type(mixer).__name__](mixer, w, u.astype(np.float64), valid)


def reference_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The whole language model in float64."""

    def rms(u: np.ndarray, norm: Any) -> np.ndarray:
        scale = np.sqrt((u**2).mean(-1, keepdims=True) + norm.variance_epsilon)
        return u / scale * norm.weight.detach().double().numpy()

    u = model.backbone.embeddings.weight.detach().double().numpy()[ids]
    for block in model.backbone.layers:
        u = u + reference_mixer(block.mixer, rms(u, block.norm), mask)["out"]
    return rms(u, model.backbone.norm_f) @ model.lm_head.weight.detach().double().numpy().T


@pytest.fixture
def float64_mixer() -> Callable[..., Arrays]:
    return reference_mixer


@pytest.fixture
def known_wrong() -> Callable[[Any], bool]:
    return lambda model: norms_as_one(model.backbone.layers[0].mixer)


@pytest.fixture
def float64_logits() -> Callable[..., np.ndarray]:
    return reference_logits


@pytest.fixture
def every_family() -> dict[str, Callable[..., Any]]:
    """A builder of a tiny language model of each of transformers' ten mixer classes."""
    second = sys.modules["mamba2_families"]
    own = {kind: partial(second.build, kind) for kind in ("bamba", "zamba2", "granite", "nemotron_h", "falcon_h1")}
    return _load("tiny", "../conftest.py").BUILDERS | sys.modules["mamba1_families"].BUILDERS | own
