"""Scans at the ends of float32, all in one call, and what they answer, by a recurrence in numpy's longdouble.

A case is HEADS heads with a group of their own: one call holds every case, and shows whether one reaches another.
longdouble holds 1e4932: nothing here overflows or underflows in it.
"""

import math

import numpy as np
import torch

FAMILIES = ("mamba1", "mamba2", "s4d")
HEADS, STATE = 2, 3
NORMAL, SMALLEST = 2.0**-126, 2.0**-149
"""The smallest normal float32, and the smallest of all."""
STATE_LIKE = ("A", "B", "C", "initial_state", "log_decay")
GRADIENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "log_decay")

CASES = {  # what differs from normal draws with delta in 0.05 .. 1 and A in -2 .. -0.5; a pair scales a normal draw
    "plain": {},
    "delta 0": {"delta": 0.0},
    "delta 0, A -1e30": {"delta": 0.0, "A": -1e30},
    "delta 0, A -3.4e38": {"delta": 0.0, "A": -3.4e38},
    "delta 1e4": {"delta": 1e4},
    "a reset, long memory": {"delta": ("once", 1e4), "A": -1e-3, "imag": 1e-3},
    "a reset of 1e37": {"delta": ("first", 1e4), "initial_state": (1e37,)},
    "A -1e30": {"A": -1e30},
    "A -1e-30": {"A": -1e-30},
    "A 0": {"A": 0.0},
    "A +0.01": {"A": 0.01},
    "delta 1e-30, A -1e30": {"delta": 1e-30, "A": -1e30},
    "delta 1e30, A -1e-30": {"delta": 1e30, "A": -1e-30, "imag": 1e-30, "x": (1e-30,)},
    "delta 1e7, A -1e30": {"delta": 1e7, "A": -1e30},
    "sum of delta past float32": {"delta": 2e37, "A": 0.0, "imag": 0.0, "x": (1e-30,)},
    "denormal delta": {"delta": 1e-40},
    "denormal delta, A -1e36": {"delta": 1e-39, "A": -1e36},
    "denormal A": {"A": -1e-40},
    "denormal x": {"x": (1e-39,), "initial_state": 0.0},
    "denormal B": {"B": (1e-39,), "initial_state": 0.0},
    "denormal C": {"C": (1e-39,), "D": 0.0},
    "denormal initial_state": {"initial_state": (1e-39,), "x": 0.0},
    "denormal D and z": {"D": (1e-39,), "z": (1e-39,)},
    "x 1e30": {"x": (1e30,)},
    "initial_state 1e36": {"initial_state": (1e36,)},
    "B 1e30, C 1e-30": {"B": (1e30,), "C": (1e-30,)},
    "B 1e-30, C 1e30": {"B": (1e-30,), "C": (1e30,)},
    "forgotten within a chunk": {"delta": 5.0, "A": -3.0},
    "one state forgets, one keeps": {"A": [-1e30, -1e-30, 0.0]},
    "z at its ends": {"z": [-1e30, -1e4, -100.0, -88.0, 0.0, 100.0, 1e4, 1e30]},
    "tiny imaginary": {"imag": 1e-30},
    "unit circle": {"A": -1e-30, "imag": 3.0},
    "large imaginary": {"imag": 1e3},
    "A -1e30 + 1e30i": {"A": -1e30, "imag": 1e30},
    "0 + 1e-30i": {"A": 0.0, "imag": 1e-30},
}
RAW = {  # of softplus: raw delta, before delta_bias
    "raw 0": {"delta": 0.0},
    "raw -1e4": {"delta": -1e4},
    "raw -1e4, A -1e36": {"delta": -1e4, "A": -1e36},
    "raw -3e38": {"delta": -3e38},
    "raw -95": {"delta": -95.0},
    "raw -87.5": {"delta": -87.5, "A": -1e37},
    "raw -80": {"delta": -80.0, "A": -1e34},
    "raw 20 and beside it": {"delta": [19.999, 20.0, 20.001]},
    "raw 1e4": {"delta": 1e4},
    "raw 1e30": {"delta": 1e30, "x": (1e-30,), "A": -1e-30, "imag": 1e-30},
    "bias 1e4 of raw -1e4": {"delta": -1e4, "delta_bias": 1e4},
    "bias -1e4 of raw 1": {"delta": 1.0, "delta_bias": -1e4},
}
LOG = {  # of log_decay, which is delta A where none is named
    "log_decay -inf": {"log_decay": -math.inf},
    "log_decay 0": {"log_decay": 0.0, "A": -1e30},
    "log_decay -inf once": {"log_decay": ("once", -math.inf)},
    "log_decay -1e-45": {"log_decay": -1e-45},
    "log_decay -1e38": {"log_decay": -1e38},
    "log_decay, delta 0": {"delta": 0.0},
}
VARIANTS = {  # cases, options of the call
    "euler": (CASES, {}),
    "zoh": (CASES, {"discretization": "zoh"}),
    "softplus": (RAW, {"delta_softplus": True}),
    "softplus, limits": (RAW, {"delta_softplus": True, "delta_limits": (1e-3, 0.1), "discretization": "zoh"}),
    "log_decay": (LOG, {}),
    "seq_idx": (CASES, {}),
}
COMPLEX = ("tiny imaginary", "unit circle", "large imaginary", "A -1e30 + 1e30i", "0 + 1e-30i")
LOOSE = {"large imaginary": 200.0, "raw 20 and beside it": 20.0}
"""Times the bound: delta |A| is rounded as one number, and so is what it decays or turns by."""
SUMS = ("A", "D", "delta_bias")
"""Gradients that are sums over tokens, whose terms may cancel: 16 times the bound."""
BEYOND = {("delta 1e30, A -1e-30", "A"): "zoh: delta squared is past float32"}
"""Gradients without a promise."""


def names(family, variant, shared=None):
    """The cases of a call: all, those that can share one group, or those that cannot."""
    cases = VARIANTS[variant][0]
    chosen = [name for name in cases if family == "s4d" or name not in COMPLEX]
    return [name for name in chosen if shared is None or shared == {"B", "C"}.isdisjoint(cases[name])]


def draw(family, variant, token=40, shared=None, *, seed=0, device="cpu"):
    """Arguments of one call that holds the cases of a variant, float32; `shared`: as of `names`, B and C too."""
    rng, cases = np.random.default_rng(seed), VARIANTS[variant][0]
    built = [_case(rng, family, variant, cases[name], token) for name in names(family, variant, shared)]
    group_wise, found = {"B", "C"}, {}
    for name in built[0]:
        parts = [case[name] for case in built[: 1 if shared and name in group_wise else None]]
        axis = 0 if parts[0].shape[0] != 1 or name in ("A", "D", "delta_bias") else 2
        axis = 1 if name == "initial_state" else 0 if name in group_wise and family == "s4d" else axis
        whole = np.concatenate(parts, axis)
        found[name] = torch.from_numpy(whole.astype(np.complex64 if np.iscomplexobj(whole) else np.float32)).to(device)
    if variant == "seq_idx":
        found["seq_idx"] = (torch.arange(token, device=device)[None] > token // 2).long()
    return found | VARIANTS[variant][1]


def _case(rng, family, variant, case, token):
    """The arguments of one case, by name, in float64."""
    channel = 2 if family == "mamba2" else 1
    decays = (HEADS,) if family == "mamba2" else (HEADS, STATE)
    of_group = (1, STATE) if family == "s4d" else (1, token, 1, STATE)
    shapes = {
        "x": (1, token, HEADS, channel), "delta": (1, token, HEADS), "A": decays, "B": of_group, "C": of_group,
        "D": (HEADS,), "z": (1, token, HEADS, channel), "delta_bias": (HEADS,),
        "initial_state": (1, HEADS, channel, STATE),
    }  # fmt: skip
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found["delta"] = rng.uniform(0.05, 1.0, shapes["delta"]) * (1 if family != "s4d" else 0.2)
    found["A"] = -rng.uniform(0.5, 2.0, decays)
    found["delta_bias"] *= 0.0
    for name in set(case) - {"imag", "log_decay"}:
        found[name] = _special(case[name], found[name])
    if family == "s4d":
        for name in ("B", "C", "initial_state"):
            size = np.abs(found[name]).max()
            found[name] = found[name] + 1j * size * rng.uniform(-1, 1, found[name].shape)
        found["A"] = found["A"] + 1j * np.broadcast_to(case.get("imag", rng.uniform(0, 3, decays)), decays)
    if variant == "log_decay":
        rates = found["delta"][..., None] * found["A"].reshape(HEADS, -1)
        rates = rates if len(decays) == 2 else rates[..., 0]
        found["log_decay"] = _special(case.get("log_decay", (1.0,)), rates)
    return found


def _special(value, drawn):
    """A number, a list that fills the tokens or A's last axis, a scale of the draw, or a number at one token."""
    if isinstance(value, list):
        along = 1 if drawn.ndim > 2 else -1
        values = np.resize(value, drawn.shape[along])
        return drawn * 0 + (values.reshape(1, -1, *[1] * (drawn.ndim - 2)) if along == 1 else values)
    if isinstance(value, float):
        return np.full_like(drawn, value)
    if value[0] in ("once", "first"):
        changed = drawn.copy()
        changed[:, 0 if value[0] == "first" else drawn.shape[1] // 2] = value[1]
        return changed
    return drawn * value[0]


def exact(x, delta, A, B, C, D, z, *, delta_bias, initial_state, delta_softplus=False, delta_limits=(0.0, math.inf),
          seq_idx=None, log_decay=None, discretization="euler"):  # fmt: skip
    """Everything a scan can answer, by name, in longdouble."""
    given = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    x, raw, A, B, C, D, z, bias, h = (_long(tensor) for tensor in given)
    n_token, per_group = x.shape[1], x.shape[2] // B.shape[-2]
    B, C = (np.repeat(np.broadcast_to(value, (1, n_token, *value.shape[-2:])), per_group, 2) for value in (B, C))
    A = A if A.ndim == 2 else A[:, None]
    raw = raw + bias
    delta = np.where(raw > 20, raw, np.logaddexp(0, raw)) if delta_softplus else raw
    delta = np.clip(delta, *map(np.longdouble, delta_limits))
    rates = delta[..., None] * A
    A_bar = np.exp(rates if log_decay is None else _long(log_decay).reshape(*rates.shape[:3], -1))
    if seq_idx is not None:
        A_bar[:, 1:][np.diff(seq_idx.cpu().numpy(), axis=1) != 0] = 0
    B_bar = delta[..., None] * (1 if discretization == "euler" else _phi1(rates)) * B
    m = d = np.zeros((1, x.shape[2], B.shape[-1]), np.longdouble)
    steps = []
    for t in range(n_token):
        h = A_bar[:, t, :, None] * h + B_bar[:, t, :, None] * x[:, t, ..., None]
        m, d = abs(A_bar[:, t]) * m + abs(B_bar[:, t]), abs(A_bar[:, t]) * (d + m)
        y = (C[:, t, :, None] * h).sum(-1)
        y = (2 * y.real if np.iscomplexobj(y) else y) + D[:, None] * x[:, t]
        gate = np.exp(-np.logaddexp(0, -z[:, t]))
        near, far = ((abs(C[:, t]) * each).sum(-1) * (2 if np.iscomplexobj(C) else 1) for each in (m, d))
        steps.append({"out": y * z[:, t] * gate, "y": y, "h": h, "mass": near, "far": far})
    found = {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}
    found |= {"last_state": h, "delta": delta, "B_bar": B_bar, "delta_cumsum": np.cumsum(delta, 1)}
    found["A_bar"] = A_bar if len(given[2].shape) == 2 else A_bar[..., 0]
    found["mass_distance"] = found.pop("far") / np.where(found["mass"] == 0, np.nan, found["mass"])
    return found


def _long(tensor):
    value = tensor.detach().cpu().numpy()
    return value.astype(np.clongdouble if np.iscomplexobj(value) else np.longdouble)


def _phi1(z):
    """(exp(z) - 1) / z: by 30 terms of its series below 1, where longdouble loses nothing."""
    small, series = np.where(abs(z) < 1, z, 0), np.ones_like(z)
    for k in range(30, 1, -1):
        series = 1 + small / k * series
    return np.where(abs(z) < 1, series, (np.exp(z) - 1) / np.where(z == 0, 1, z))


def by_case(name, value, family, n_case):
    """An answer or a gradient cut into its cases."""
    axis = {"last_state": 1, "initial_state": 1, "A": 0, "D": 0, "delta_bias": 0}.get(name, 2)
    axis = 0 if name in ("B", "C") and family == "s4d" else axis
    return np.split(value, n_case, axis)


def violations(found, wanted, family, cases, floor=16 * SMALLEST):
    """By (case, name): the error and its bound, 8 + token times 2^-23 of max|b| (and what `LOOSE` says) plus `floor`.

    What should be finite must be; a distance counts where there is mass in float32's range.
    """
    broken, count = {}, 8 + wanted["out"].shape[1]
    far = (wanted["mass"] > 1e-30) & (wanted["mass"] < 1e36)
    wanted = wanted | {"mass_distance": np.where(far, wanted["mass_distance"], np.nan)}
    for name, value in found.items():
        value = value.detach().cpu().numpy()
        assert value.shape == wanted[name].shape, (name, value.shape, wanted[name].shape)
        pairs = zip(*(by_case(name, each, family, len(cases)) for each in (value, wanted[name])), strict=True)
        for case, (have, want) in zip(cases, pairs, strict=True):
            if name == "mass_distance":
                have, want = have[np.isfinite(want)], want[np.isfinite(want)]
            size = abs(want).max(initial=0)
            assert np.isfinite(size), (case, name, "the oracle")
            if size > 3e38:
                continue  # beyond float32: nothing is promised
            error = abs(have - want).max(initial=0)
            limit = count * (size * 2.0**-23 * LOOSE.get(case, 1.0) + floor) * (16 if name in SUMS else 1)
            if not error <= limit and (case, name) not in BEYOND:
                broken[case, name] = float(error), float(limit)
    return broken


def upstream(wanted, *, seed=3, device="cpu"):
    """Gradients of the output and of the last state, float32."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in ("out", "last_state"):
        value = rng.standard_normal(wanted[name].shape)
        value = value + 1j * rng.standard_normal(value.shape) if np.iscomplexobj(wanted[name]) else value
        kind = np.complex64 if np.iscomplexobj(value) else np.float32
        found[name] = torch.from_numpy(value.astype(kind)).to(device)
    return found


def leaves(arguments, dtype=torch.float32):
    """The same arguments, each of them a leaf, in `dtype` or its complex counterpart."""
    found = dict(arguments)
    for name in set(GRADIENTS) & set(found):
        kind = dtype.to_complex() if found[name].is_complex() else dtype
        found[name] = found[name].detach().to(kind).requires_grad_()
    return found


def gradients(found, given, above):
    """By name, of leaves `given`, from `above` of the output and the last state."""
    asked = [name for name in GRADIENTS if name in given]
    pairs = (found["out"], above["out"].to(found["out"].dtype)), (
        found["last_state"], above["last_state"].to(found["last_state"].dtype))  # fmt: skip
    outputs, grads = zip(*pairs, strict=True)
    every = torch.autograd.grad(outputs, [given[name] for name in asked], grads, materialize_grads=True)
    return dict(zip(asked, every, strict=True))


def exact_gradients(arguments, above):
    """By name, in float64: torch's autograd of a plain recurrence."""
    given = leaves({name: value.cpu() if torch.is_tensor(value) else value for name, value in arguments.items()},
                   torch.float64)  # fmt: skip
    found = gradients(_recurrence(**given), given, {name: value.cpu() for name, value in above.items()})
    return {name: value.numpy() for name, value in found.items()}


def _recurrence(x, delta, A, B, C, D, z, *, delta_bias, initial_state, delta_softplus=False,
                delta_limits=(0.0, math.inf), seq_idx=None, log_decay=None, discretization="euler"):  # fmt: skip
    n_token, per_group, h, outs = x.shape[1], x.shape[2] // B.shape[-2], initial_state, []
    B, C = (each.expand(1, n_token, *each.shape[-2:]).repeat_interleave(per_group, 2) for each in (B, C))
    A = A if A.ndim == 2 else A[:, None]
    delta = delta + delta_bias
    if delta_softplus:
        delta = torch.where(delta > 20, delta, torch.logaddexp(delta, torch.zeros_like(delta)))
    delta = delta.clamp(*delta_limits)[..., None]
    rates = delta * A
    A_bar = torch.exp(rates if log_decay is None else log_decay.reshape(*rates.shape[:3], -1))
    if seq_idx is not None:
        begins = torch.nn.functional.pad(seq_idx.cpu().diff(dim=1) != 0, (1, 0))
        A_bar = torch.where(begins[..., None, None], 0, A_bar)
    scale = delta if discretization == "euler" else _zoh(delta, A, rates)
    for t in range(n_token):
        h = A_bar[:, t, :, None] * h + (scale[:, t] * B[:, t])[:, :, None] * x[:, t, ..., None]
        y = (C[:, t, :, None] * h).sum(-1)
        outs.append((2 * y.real if y.is_complex() else y) + D[:, None] * x[:, t])
    return {"out": torch.stack(outs, 1) * torch.nn.functional.silu(z), "last_state": h}


def _zoh(delta, A, rates):
    """(exp(r) - 1) / A, by 20 terms of its series within 1."""
    near = rates.abs() < 1
    small, large, series = rates.masked_fill(~near, 0), rates.masked_fill(near, 1), torch.ones_like(rates)
    for k in range(20, 1, -1):
        series = 1 + small / k * series
    return torch.where(near, delta * series, (torch.exp(large) - 1) / A.expand_as(rates).masked_fill(near, 1))


EMITTED = ("delta", "A_bar", "B_bar", "h", "y", "delta_cumsum", "mass", "mass_distance")


def answered(scan, family, variant, token=40, shared=None, device="cpu", floor=16 * SMALLEST):
    """What breaks the bound of a call's answers and of what is emitted; `scan` takes arguments and names to emit."""
    given = draw(family, variant, token, shared, device=device)
    with np.errstate(all="ignore"):
        wanted = exact(**given)
    result = scan(**given, emit=EMITTED)
    found = {name: getattr(result.emission, name) for name in EMITTED}
    found |= {"out": result.y, "last_state": result.last_state}
    return violations(found, wanted, family, names(family, variant, shared), floor)


def differentiated(go_back, family, variant, token=40, shared=None, device="cpu", floor=16 * SMALLEST):
    """The same of the gradients, by name, that `go_back` finds of the arguments from those of out and last_state."""
    given = draw(family, variant, token, shared, device=device)
    with np.errstate(all="ignore"):
        wanted = exact(**given)
    above = upstream(wanted, device=device)
    found = go_back(given, above)
    wanted |= exact_gradients(given, above)
    if shared:  # sums over cases
        found = {name: value for name, value in found.items() if name not in ("B", "C")}
    return violations(found, wanted, family, names(family, variant, shared), floor)


def through(scan):
    """`go_back` by torch's autograd of a scan."""

    def go_back(given, above):
        given = leaves(given)
        result = scan(**given)
        return gradients({"out": result.y, "last_state": result.last_state}, given, above)

    return go_back


def stands_still(scan, family, device="cpu"):
    """delta = 0 keeps the state to the bit, whatever A is; and nothing is written."""
    given = draw(family, "euler", device=device)
    given["delta"] = torch.zeros_like(given["delta"])
    found = scan(**given, emit=("A_bar", "B_bar", "h"))
    assert torch.equal(found.last_state, given["initial_state"])
    assert (found.emission.h == given["initial_state"][:, None]).all()
    assert (found.emission.A_bar == 1).all()
    assert not found.emission.B_bar.any()


def is_reset(scan, family, device="cpu"):
    """delta = 1e4 leaves of the state what was written last, to the bit of its two products."""
    given = draw(family, "euler", device=device)
    given["delta"] = torch.full_like(given["delta"], 1e4)
    given["A"] = torch.full_like(given["A"], -1.0)
    given["x"], given["B"] = torch.ones_like(given["x"]), given["B"].real.sign().to(given["B"].dtype)
    found = scan(**given, emit=("A_bar", "h"))
    B = given["B"].expand(1, given["x"].shape[1], *given["B"].shape[-2:]).repeat_interleave(HEADS, 2)
    assert not found.emission.A_bar.any()
    assert (found.emission.h == 1e4 * B[:, :, :, None]).all()


def constant(scalar, n_token, rate, device="cpu"):
    """One head, delta 2^-10 and x, B and C 1."""
    one = torch.ones(1, n_token, 1, 1, device=device)
    A = torch.full((1,) if scalar else (1, 1), -rate, device=device)
    return {"x": one, "delta": one[..., 0] * 2.0**-10, "A": A, "B": one, "C": one}


def is_geometric(scan, scalar, n_token, rate, device="cpu"):
    """y_t = delta (1 - a^t) / (1 - a): each token rounds a and the sum once, and a memory of k tokens adds k of them.

    Error <= (8 + k) 2^-23, k = min(tokens, 1 / (delta rate)).
    """
    found = scan(**constant(scalar, n_token, rate, device), emit=("delta_cumsum",))
    step = 2.0**-10 * float(np.float32(rate))
    count = np.arange(1.0, n_token + 1)
    exact = count / 1024 if step < 1e-20 else np.expm1(-step * count) / np.expm1(-step) / 1024
    error = np.abs(found.y.flatten().double().cpu().numpy() - exact).max() / exact.max()
    assert error <= (8 + min(n_token, 1 / step if step else math.inf)) * 2.0**-23, error
    assert found.emission.delta_cumsum.flatten()[-1].item() == n_token / 1024
