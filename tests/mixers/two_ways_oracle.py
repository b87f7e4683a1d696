"""Tiny models of bidirectional layers, all weights perturbed, and what their layers do: numpy, from the equations."""

import numpy as np
import torch
from two_ways import KINDS, BiMambaWrapper, LanguageModel, RCPSWrapper, Vim


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 if name.endswith("_log") else 0.3) * noise)
    return model.eval()


def built(kind, seed=0):
    torch.manual_seed(seed)
    return perturbed(LanguageModel(*KINDS[kind]()), seed)


def ids_of(length=9, batch=2, seed=4):
    return torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def silu(a):
    return a / (1 + np.exp(-a))


def convolve(w, x, suffix=""):
    taps, out = w[f"conv1d{suffix}.weight"][:, 0], np.zeros_like(x) + w[f"conv1d{suffix}.bias"]
    for t in range(x.shape[1]):
        for back in range(min(taps.shape[1], t + 1)):
            out[:, t] += x[:, t - back] * taps[:, -1 - back]
    return silu(out)


def scan(w, x, z, suffix="", A="A_log"):
    """x (batch, token, channel) after the convolution."""
    n, low = w[A].shape[1], x @ w[f"x_proj{suffix}.weight"].T
    dt, B, C = np.split(low, [low.shape[-1] - 2 * n, low.shape[-1] - n], axis=-1)
    delta = np.logaddexp(0, dt @ w[f"dt_proj{suffix}.weight"].T + w[f"dt_proj{suffix}.bias"])
    A_bar, B_bar = np.exp(delta[..., None] * -np.exp(w[A])), delta[..., None] * B[:, :, None]
    h, states = np.zeros_like(A_bar[:, 0]), []
    for t in range(x.shape[1]):
        h = A_bar[:, t] * h + B_bar[:, t] * x[:, t, :, None]
        states.append(h)
    h = np.stack(states, 1)
    y = (h * C[:, :, None]).sum(-1) + w[f"D{suffix}"] * x
    return {
        "delta": delta, "A_bar": A_bar, "B_bar": B_bar, "B": B[:, :, None], "C": C[:, :, None], "x": x, "z": z, "y": y,
        "h": h, "delta_cumsum": delta.cumsum(1), "gated": y * silu(z),
    }  # fmt: skip


def flipped(made):
    return {name: array[:, ::-1] for name, array in made.items()}


def stacked(*ways):
    return {name: np.stack([way[name] for way in ways], -1) for name in ways[0]}


def weights_of(module):
    return {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


def projected(w, u):
    return np.split(u @ w["in_proj.weight"].T + w.get("in_proj.bias", 0), 2, axis=-1)


def vim(mixer, u):
    w = weights_of(mixer)
    x, z = projected(w, u)
    forward = scan(w, convolve(w, x), z)
    if mixer.bimamba_type == "v2":
        backward = scan(w, convolve(w, x[:, ::-1], "_b"), z[:, ::-1], "_b", "A_b_log")
    else:
        backward = scan(w, convolve(w, x)[:, ::-1], z[:, ::-1], "", "A_b_log")
    found = stacked(forward, flipped(backward))
    halved = 2 if mixer.bimamba_type == "v2" and mixer.if_divide_out else 1
    out = found["gated"].sum(-1) / halved @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)
    return found | {"out": out * w.get("gamma", 1)}


def one(mixer, u):
    w = weights_of(mixer)
    x, z = projected(w, u)
    found = scan(w, convolve(w, x), z)
    return found | {"out": found["gated"] @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)}


def caduceus(mixer, u):
    ways = one(mixer.mamba_fwd, u), flipped(one(mixer.mamba_rev, u[:, ::-1]))
    product = mixer.bidirectional_strategy == "ew_multiply"
    out = ways[0]["out"] * ways[1]["out"] if product else ways[0]["out"] + ways[1]["out"]
    return stacked(*ways) | {"out": out}


def rcps(mixer, u):
    given, other = np.split(u, 2, axis=-1)
    first, second = caduceus(mixer.submodule, given), flipped(caduceus(mixer.submodule, other[:, ::-1, ::-1]))
    found = {name: np.concatenate([first[name], second[name]], -1) for name in first}
    return found | {"out": np.concatenate([first["out"], second["out"][..., ::-1]], -1)}


def oracle(mixer, u):
    return {Vim: vim, BiMambaWrapper: caduceus, RCPSWrapper: rcps}[type(mixer)](mixer, u.astype(np.float64))


def apart(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()
