"""The scan in closed form, in float64 numpy, without a recurrence; and the error bound that all backends are held to.

h_t = exp(A cum_t) h_0 + sum over s <= t of exp(A (cum_t - cum_s)) delta_s B_s x_s, cum the cumulative delta.
"""

import math

import numpy as np
import torch

EMITTED = ("delta", "A_bar", "B_bar", "B", "C", "h", "y", "delta_cumsum")
SHAPES = {"mamba": (6, 1, 5, False), "mamba2": (4, 3, 5, True), "mamba_heads": (4, 3, 5, False)}
"""head, head_channel, state, whether A is one scalar a head."""


def draw(family, batch, token, group=1, *, seed=0, device="cpu", shape=None):
    """Random arguments of a scan, float32: every optional one given, decays from nearly none to nearly all."""
    head, head_channel, state, scalar = shape or SHAPES[family]
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(device)

    return {
        "x": normal(batch, token, head, head_channel),
        "delta": normal(batch, token, head) - 2,
        "A": -torch.exp(1.5 * (normal(head) if scalar else normal(head, state))),
        "B": normal(batch, token, group, state),
        "C": normal(batch, token, group, state),
        "D": normal(head, head_channel) if scalar else normal(head),
        "z": normal(batch, token, head, head_channel),
        "delta_bias": normal(head),
        "delta_softplus": True,
        "delta_limits": (0.01, 2.5),
        "initial_state": normal(batch, head, head_channel, state),
    }


def cast(arguments, dtype, names=None):
    """Arguments with their tensors (or those in `names`) in `dtype`."""
    chosen = {name for name, value in arguments.items() if isinstance(value, torch.Tensor)} & set(names or arguments)
    return {name: value.to(dtype) if name in chosen else value for name, value in arguments.items()}


def closed_form(x, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_softplus=False,
                delta_limits=(0.0, math.inf), initial_state=None):  # fmt: skip
    """Everything a scan can answer, by name, as float64 tensors."""
    x, delta, A, B, C = (tensor.double().numpy() for tensor in (x, delta, A, B, C))
    heads = np.arange(x.shape[2]) // (x.shape[2] // B.shape[2])
    delta = delta if delta_bias is None else delta + delta_bias.double().numpy()
    delta = np.where(delta > 20, delta, np.logaddexp(0, delta)) if delta_softplus else delta
    delta = np.minimum(np.maximum(delta, delta_limits[0]), delta_limits[1])
    rates = A if A.ndim == 2 else np.repeat(A[:, None], B.shape[3], 1)
    cum = np.cumsum(delta, 1)
    B_bar = delta[..., None] * B[:, :, heads]
    write = B_bar[:, :, :, None] * x[..., None]
    h_0 = np.zeros_like(write[:, 0]) if initial_state is None else initial_state.double().numpy()
    h = np.empty_like(write)
    for t in range(x.shape[1]):
        decay = np.exp(rates * (cum[:, t, None] - cum[:, : t + 1])[..., None])
        h[:, t] = (decay[:, :, :, None] * write[:, : t + 1]).sum(1)
        h[:, t] += np.exp(rates * cum[:, t][..., None])[:, :, None] * h_0
    y = (C[:, :, heads][:, :, :, None] * h).sum(-1)
    y = y if D is None else y + D.double().numpy().reshape(x.shape[2], -1) * x
    gate = 1.0 if z is None else (z.double() * torch.sigmoid(z.double())).numpy()
    A_bar = np.exp(delta * A) if A.ndim == 1 else np.exp(delta[..., None] * A)
    found = {"out": y * gate, "last_state": h[:, -1], "delta": delta, "A_bar": A_bar, "B_bar": B_bar, "B": B, "C": C}
    found |= {"h": h, "y": y, "delta_cumsum": cum}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def chosen(answer, tokens, channels):
    """The part of a full answer that Emit(..., tokens, channels) asks for."""
    part = dict(answer)
    for name in EMITTED:
        part[name] = answer[name][:, list(tokens)]
        part[name] = part[name] if name in "BC" else part[name][:, :, list(channels)]
    return part


def by_name(result):
    """A ScanResult as a dict of what it holds."""
    emitted = {name: getattr(result.emission, name) for name in EMITTED}
    found = {"out": result.y, "last_state": result.last_state} | emitted
    return {name: value for name, value in found.items() if value is not None}


def errors(answer, exact):
    """max|a - b| / max|b| by name, over all of `answer`; shapes must agree."""
    for name, value in answer.items():
        assert value.shape == exact[name].shape, (name, value.shape, exact[name].shape)
    return {
        name: ((value.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
        for name, value in answer.items()
    }


def violations(answer, exact, naive, *, bound=1e-6, out_bound=None):
    """What breaks the bound: max(bound, 2 x the float32 naive's own error); A_bar also absolute 2e-7."""
    found, own = errors(answer, exact), errors(naive, exact)
    limits = {name: max(bound, 2 * own[name]) for name in found}
    if out_bound is not None:
        limits["out"] = out_bound
    broken = {name: (value, limits[name]) for name, value in found.items() if not value <= limits[name]}
    if "A_bar" in answer:
        absolute = (answer["A_bar"].double() - exact["A_bar"]).abs().max().item()
        broken |= {} if absolute <= 2e-7 else {"A_bar, absolute": (absolute, 2e-7)}
    return broken
