"""Mixers in numpy, float64, token by token, with edits: it shares no code with the package or transformers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import mamba_probe as mp

Arrays = dict[str, np.ndarray]
AXES = {
    "delta": "batch token head", "A_bar": "batch token head state", "B": "batch token group state",
    "C": "batch token group state", "x": "batch token head head_channel", "z": "batch token head head_channel",
    "y": "batch token head head_channel", "h": "batch token head head_channel state",
}  # fmt: skip
TRANSFORMERS = ("mamba", "mamba2", "zamba")
OWN = ("own mamba", "own mamba2", "own mamba2 gate", "s4d")
KINDS = (*TRANSFORMERS, *OWN)


@dataclass(frozen=True)
class Change:
    """One edit, said once: as the package's, and as numpy does it."""

    verb: str
    target: str
    value: Any = None
    where: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None

    def edit(self, source: Any = None) -> Any:
        """The package's edit; `source` is the trace that a swap takes from."""
        where: dict[str, Any] = self.where | {"layer": self.layer}
        if self.verb in ("zero", "ablate"):
            return getattr(mp, self.verb)(self.target, **where)
        if self.verb == "clamp":
            return mp.clamp(self.target, *self.value, **where)
        if self.verb == "swap":
            return mp.swap(self.target, source, **where)
        if self.verb == "freeze":
            return mp.freeze(self.target, value=self.value, **where)
        value = torch.as_tensor(self.value) if isinstance(self.value, np.ndarray) else self.value
        return getattr(mp, self.verb)(self.target, value, **where)

    def of(self, a: np.ndarray, valid: np.ndarray, other: np.ndarray | None) -> np.ndarray:
        """`a` after the edit, `other` being another run's."""
        axes, a = AXES[self.target].split(), a.copy()
        named = {("head" if name == "channel" else name): at for name, at in self.where.items()}
        chosen = [np.atleast_1d(named.get(name, np.arange(size))) for name, size in zip(axes, a.shape, strict=False)]
        chosen[1] = chosen[1][chosen[1] < a.shape[1]]
        at = np.ix_(*chosen)
        if self.verb == "scale":
            a[at] *= self.value
        elif self.verb == "clamp":
            a[at] = np.clip(a[at], *self.value)
        elif self.verb == "swap":
            assert other is not None
            a[at] = other[at]
        elif self.verb == "freeze" and self.value is None:
            seen = valid.reshape(*valid.shape, *[1] * (a.ndim - 2))
            mean = (a * seen).sum(1, keepdims=True) / seen.sum(1, keepdims=True)
            a[at] = np.broadcast_to(mean, a.shape)[at]
        else:
            a[at] = 0.0 if self.verb in ("zero", "ablate") else self.value
        return a


def silu(a: np.ndarray) -> np.ndarray:
    return a / (1 + np.exp(-a))


def conv(u: np.ndarray, w: Arrays, identity: bool) -> np.ndarray:
    if identity:
        return silu(u)
    weight = w["conv1d.weight"][:, 0]
    out = np.zeros_like(u) + w.get("conv1d.bias", 0.0)
    for tap in range(weight.shape[1]):
        lag = weight.shape[1] - 1 - tap
        out[:, lag:] += u[:, : u.shape[1] - lag] * weight[:, tap]
    return silu(out)


def parts(kind: str, mixer: Any, w: Arrays, u: np.ndarray, valid: np.ndarray, identity: bool) -> Arrays:
    """What the scan is given: x, z, delta, A, B, C, D, on the axes of a head."""
    seen = valid[..., None]
    projected = (u * seen) @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    if kind.endswith("mamba2") or kind.endswith("gate"):
        return _mamba2(mixer, w, projected, seen, identity)
    x, z = (projected[..., i::2] for i in (0, 1)) if kind == "zamba" else np.split(projected, 2, -1)
    x = conv(x, w, identity) * seen
    made = {"x": x[..., None], "z": z[..., None]}
    if kind == "s4d":
        delta = np.exp(w["kernel.log_dt"]) + np.zeros_like(x)
        A = -np.exp(w["kernel.log_A_real"]) + 1j * w["kernel.A_imag"]
        C = w["kernel.C"][..., 0] + 1j * w["kernel.C"][..., 1]
        shape = (*x.shape, A.shape[1])
        return made | {"delta": delta, "A": A, "B": np.ones(shape), "C": np.broadcast_to(C, shape), "D": w["D"]}
    by_head: dict[str, Any] = {
        "x_proj": w.get("x_proj_weight"),
        "dt_proj": w.get("dt_proj_weight"),
        "bias": w.get("dt_proj_bias"),
    }
    if by_head["x_proj"] is None:
        by_head = {"x_proj": w["x_proj.weight"], "dt_proj": w["dt_proj.weight"], "bias": w["dt_proj.bias"]}
        by_head = {name: each[None] for name, each in by_head.items()}
    A = w["A_log"].reshape(x.shape[-1], -1)
    n, rank = A.shape[1], by_head["dt_proj"].shape[2]
    found: dict[str, list[np.ndarray]] = {"delta": [], "B": [], "C": []}
    for head, mine in enumerate(np.split(x, len(by_head["x_proj"]), -1)):
        dt, B, C = np.split(mine @ by_head["x_proj"][head].T, [rank, rank + n], -1)
        found["delta"].append(np.logaddexp(0, dt @ by_head["dt_proj"][head].T + by_head["bias"][head]))
        found["B"].append(B[:, :, None])
        found["C"].append(C[:, :, None])
    return made | {name: np.concatenate(each, 2) for name, each in found.items()} | {
        "A": -np.exp(A), "D": w["D"].reshape(-1)
    }  # fmt: skip


def _mamba2(mixer: Any, w: Arrays, projected: np.ndarray, seen: np.ndarray, identity: bool) -> Arrays:
    heads, inner = len(w["A_log"]), w["out_proj.weight"].shape[1]
    groups = mixer.n_groups if hasattr(mixer, "n_groups") else mixer.sizes["n_groups"]
    n = (w["conv1d.weight"].shape[0] - inner) // (2 * groups)
    z, xBC, dt = np.split(projected, [inner, projected.shape[-1] - heads], -1)
    x, B, C = np.split(conv(xBC, w, identity) * seen, [inner, inner + groups * n], -1)
    delta = np.clip(np.logaddexp(0, dt + w["dt_bias"]), *getattr(mixer, "time_step_limit", (0, np.inf)))
    x, z = (each.reshape(*each.shape[:2], heads, -1) for each in (x, z))
    B, C = (each.reshape(*each.shape[:2], groups, n) for each in (B, C))
    return {"x": x, "z": z, "delta": delta, "A": -np.exp(w["A_log"]), "B": B, "C": C, "D": w["D"]}


def run(
    kind: str, mixer: Any, u: np.ndarray, valid: np.ndarray, changes: list[Change], other: Arrays | None = None
) -> Arrays:
    """What the mixer makes of u (batch, token, model), and every quantity as it was executed."""
    w = {name: tensor.detach().double().numpy() for name, tensor in mixer.state_dict().items()}
    out_of = {change.target for change in changes if change.verb == "ablate"}
    q = parts(kind, mixer, w, u.astype(np.float64), valid, "conv" in out_of)

    def edited(name: str, a: np.ndarray) -> np.ndarray:
        for change in changes:
            if name == "A_bar" and change.target == "decay":
                a = np.ones_like(a)
            if change.target == name:
                a = change.of(a, valid, None if other is None else other[name])
        return a

    q |= {name: edited(name, q[name]) for name in ("delta", "B", "C", "x", "z")}
    exponent = q["delta"] * q["A"] if q["A"].ndim == 1 else q["delta"][..., None] * q["A"]
    q["A_bar"] = edited("A_bar", np.exp(exponent))
    write = np.expm1(exponent) / q["A"] if kind == "s4d" else q["delta"][..., None]
    q |= _scanned(q, write, [change for change in changes if change.target == "h"], other)
    q["y"] = edited("y", q["y"])
    gate = np.ones_like(q["z"]) if "gate" in out_of else silu(q["z"])
    gated = (q["y"] * gate).reshape(*u.shape[:2], -1)
    return q | {"out": _normed(mixer, w, gated) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0.0)}


def _scanned(q: Arrays, write: np.ndarray, changes: list[Change], other: Arrays | None) -> Arrays:
    heads = q["x"].shape[2]
    B, C = (np.repeat(q[name], heads // q[name].shape[2], 2) for name in "BC")
    decay = q["A_bar"] if q["A_bar"].ndim == 4 else q["A_bar"][..., None]
    h = np.zeros((len(B), *q["x"].shape[2:], B.shape[-1]), q["A"].dtype)
    states, ys = [], []
    for t in range(B.shape[1]):
        h = decay[:, t, :, None] * h + (write * B)[:, t, :, None] * q["x"][:, t, ..., None]
        for change in changes:
            if t in np.atleast_1d(change.where["token"]):
                value, at = change.value, list(np.atleast_1d(change.where["token"])).index(t)
                value = value[:, [at]] if isinstance(value, np.ndarray) else value
                here = Change(change.verb, "h", value, change.where | {"token": 0})
                h = here.of(h[:, None], np.ones((len(h), 1)), None if other is None else other["h"][:, [t]])[:, 0]
        states.append(h)
        read = (h * C[:, t, :, None]).sum(-1)
        ys.append((2 * read.real if np.iscomplexobj(h) else read) + q["D"][:, None] * q["x"][:, t])
    return {"h": np.stack(states, 1), "y": np.stack(ys, 1)}


def _normed(mixer: Any, w: Arrays, gated: np.ndarray) -> np.ndarray:
    if "norm.weight" not in w:
        return gated
    known_wrong = hasattr(mixer, "n_groups") and "group_size" not in vars(mixer.norm)  # transformers up to 5.22
    groups = 1 if known_wrong else getattr(mixer, "n_groups", None) or mixer.norm.n_groups
    grouped = gated.reshape(*gated.shape[:2], groups, -1)
    grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + mixer.norm.variance_epsilon)
    return grouped.reshape(gated.shape) * w["norm.weight"]


def mixer(kind: str) -> Any:
    """A tiny mixer whose weights are all perturbed; our own blocks are float64."""
    torch.manual_seed(3)
    if kind in TRANSFORMERS:
        return _of_transformers(kind)
    options: dict[str, Any] = {"d_inner": 6, "d_state": 3, "layer_idx": 1}
    built = {
        "own mamba": lambda: mp.blocks.MambaBlock(4, dt_rank=2, **options),
        "own mamba2": lambda: mp.blocks.Mamba2Block(4, n_heads=4, n_groups=2, **options | {"d_inner": 8}),
        "own mamba2 gate": lambda: mp.blocks.Mamba2Block(4, n_heads=4, gated_norm=False, **options | {"d_inner": 8}),
        "s4d": lambda: mp.blocks.S4DBlock(4, **options),
    }[kind]().double()
    return perturbed(built)


def _of_transformers(kind: str) -> Any:
    import transformers as t

    if kind == "mamba":
        config = t.MambaConfig(hidden_size=4, expand=2, state_size=3, num_hidden_layers=2, time_step_rank=2)
        return perturbed(t.models.mamba.modeling_mamba.MambaMixer(config, 1))
    if kind == "mamba2":
        config = t.Mamba2Config(
            hidden_size=4, expand=2, state_size=3, num_heads=4, head_dim=2, n_groups=2, chunk_size=4,
            num_hidden_layers=2, time_step_limit=(0.05, 1.5),
        )  # fmt: skip
        return perturbed(t.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 1))
    config = t.ZambaConfig(
        hidden_size=4, mamba_expand=3, mamba_d_state=3, mamba_dt_rank=2, n_mamba_heads=3, num_hidden_layers=2,
        layers_block_type=["mamba", "mamba"], mamba_proj_bias=True,
    )  # fmt: skip
    return perturbed(t.models.zamba.modeling_zamba.ZambaMambaMixer(config, 1))


def perturbed(module: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * (0.1 if "A_log" in name else 0.4)).to(parameter.dtype))
    return module.eval()
