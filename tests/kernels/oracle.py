"""The scan in closed form, in float64 numpy, without a recurrence; and the error bound that all backends are held to.

h_t = exp(L_t) h_0 + sum over s <= t of exp(L_t - L_s) B_bar_s x_s, L_t the sum of delta A (or log_decay) up to t,
the sum over tokens s of t's own sequence only, and h_0 reaching the first sequence only.
"""

import math

import numpy as np
import torch

EMITTED = ("delta", "A_bar", "B_bar", "B", "C", "h", "y", "delta_cumsum", "energy", "mass", "mass_distance")
SHAPES = {"mamba": (6, 1, 5, False), "mamba2": (4, 3, 5, True), "mamba_heads": (4, 3, 5, False)}
"""head, head_channel, state, whether A is one scalar a head."""
STATE_LIKE = ("A", "B", "C", "initial_state", "log_decay")
FEATURES = ("complex", "constant", "zoh", "seq_idx", "log_decay")


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


def featured(arguments, features, *, seed=1):
    """Arguments of `draw`, changed so that they use the named `FEATURES`."""
    generator = torch.Generator().manual_seed(seed)
    batch, token = arguments["x"].shape[:2]
    device = arguments["x"].device
    changed = dict(arguments)
    if "log_decay" in features:
        shape = batch, token, *arguments["A"].shape
        changed["log_decay"] = -torch.exp(torch.randn(shape, generator=generator) - 2).to(device)
    if "complex" in features:
        for name in set(STATE_LIKE) & set(changed):
            imaginary = torch.randn(changed[name].shape, generator=generator).to(device)
            changed[name] = torch.complex(changed[name], imaginary)
    if "constant" in features:
        changed |= {name: changed[name][0, 0] for name in "BC"}
    if "seq_idx" in features:
        starts = torch.rand(batch, token, generator=generator) < 0.15
        changed["seq_idx"] = starts.cumsum(1).to(device) % 2 + 5  # a number may come back: only changes count
    return changed | ({"discretization": "zoh"} if "zoh" in features else {})


def cast(arguments, dtype, names=None):
    """Arguments with their floating tensors (or those in `names`) in `dtype`, complex ones in its counterpart."""
    real = {name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "seq_idx"}
    real &= set(names or arguments)
    paired = {name for name in real if arguments[name].is_complex()}
    return {
        name: value.to(dtype.to_complex() if name in paired else dtype) if name in real else value
        for name, value in arguments.items()
    }


def doubled(tensor):
    """In float64 or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def closed_form(x, delta, A, B, C, D=None, z=None, *, delta_bias=None, delta_softplus=False,
                delta_limits=(0.0, math.inf), initial_state=None, seq_idx=None, log_decay=None,
                discretization="euler"):  # fmt: skip
    """Everything a scan can answer, by name, as float64 or complex128 tensors."""
    x, delta, A, B, C = (doubled(tensor).numpy() for tensor in (x, delta, A, B, C))
    B, C = (np.broadcast_to(value, (*x.shape[:2], *value.shape[-2:])) for value in (B, C))
    heads = np.arange(x.shape[2]) // (x.shape[2] // B.shape[2])
    delta = delta if delta_bias is None else delta + delta_bias.double().numpy()
    delta = np.where(delta > 20, delta, np.logaddexp(0, delta)) if delta_softplus else delta
    delta = np.minimum(np.maximum(delta, delta_limits[0]), delta_limits[1])
    rates = delta[..., None] * (A if A.ndim == 2 else np.repeat(A[:, None], B.shape[3], 1))
    scale = delta[..., None] * (1.0 if discretization == "euler" else phi1(rates))
    if log_decay is not None:
        rates = doubled(log_decay).numpy()
        rates = rates if A.ndim == 2 else np.repeat(rates[..., None], B.shape[3], 3)
    sums = np.cumsum(rates, 1)
    order = np.zeros(x.shape[:2], int)
    if seq_idx is not None:
        order[:, 1:] = np.cumsum(np.diff(seq_idx.numpy(), axis=1) != 0, 1)
    B_bar = scale * B[:, :, heads]
    write = B_bar[:, :, :, None] * x[..., None]
    h_0 = np.zeros_like(write[:, 0]) if initial_state is None else doubled(initial_state).numpy()
    h = np.empty_like(write)
    mass, distance = np.empty(delta.shape), np.empty(delta.shape)
    for t in range(x.shape[1]):
        same = order[:, : t + 1] == order[:, t, None]
        decay = np.exp(sums[:, t, None] - sums[:, : t + 1]) * same[..., None, None]
        first = np.exp(sums[:, t]) * (order[:, t] == 0)[:, None, None]
        weight = np.abs(C[:, t, heads][:, None] * decay * B_bar[:, : t + 1]).sum(-1)
        mass[:, t] = weight.sum(1) * (2 if np.iscomplexobj(C) else 1)
        with np.errstate(invalid="ignore"):  # NaN where there is no mass
            distance[:, t] = np.einsum("bsh,s->bh", weight, t - np.arange(t + 1.0)) / weight.sum(1)
        h[:, t] = (decay[:, :, :, None] * write[:, : t + 1]).sum(1) + first[:, :, None] * h_0
    y = (C[:, :, heads][:, :, :, None] * h).sum(-1)
    y = 2 * y.real if np.iscomplexobj(y) else y
    y = y if D is None else y + D.double().numpy().reshape(x.shape[2], -1) * x
    gate = 1.0 if z is None else (z.double() * torch.sigmoid(z.double())).numpy()
    begins = np.diff(order, axis=1, prepend=0) > 0
    A_bar = np.where(begins[..., None, None], 0.0, np.exp(rates))
    A_bar = A_bar if A.ndim == 2 else A_bar[..., 0]
    found = {"out": y * gate, "last_state": h[:, -1], "delta": delta, "A_bar": A_bar, "B_bar": B_bar, "B": B, "C": C}
    found |= {"h": h, "y": y, "delta_cumsum": np.cumsum(delta, 1), "energy": (np.abs(h) ** 2).sum(-1)}
    found |= {"mass": mass, "mass_distance": distance}
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def phi1(z):
    """(exp(z) - 1) / z by numpy's expm1, 1 at 0."""
    return np.where(z == 0, 1.0, np.expm1(z) / np.where(z == 0, 1.0, z))


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
    """max|a - b| / max|b| by name, over all of `answer`, absolute where b is 0; shapes must agree."""
    for name, value in answer.items():
        assert value.shape == exact[name].shape, (name, value.shape, exact[name].shape)
    return {
        name: (doubled(value) - exact[name]).abs().max().item() / (exact[name].abs().max().item() or 1.0)
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
        absolute = (doubled(answer["A_bar"]) - exact["A_bar"]).abs().max().item()
        broken |= {} if absolute <= 2e-7 else {"A_bar, absolute": (absolute, 2e-7)}
    return broken
