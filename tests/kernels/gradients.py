"""Gradients by a kernel's own backward against autograd through the naive scan: of interpreted scripts and GPU tests.

The bound is the project's for gradients: max(1e-5, 2 x the error of autograd through the float32 naive scan), for 16
bits their own eps. What should be 0 must be 0.
"""

from dataclasses import replace

import torch
from oracle import cast

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import arguments, fused, naive
from mamba_probe.kernels.scan.backward import Upstream

NARROW = ("x", "delta", "B", "C", "z", "log_decay")
"""What may have 16 bits."""

GIVEN = (*NARROW, "A", "D", "delta_bias", "initial_state")


def checked(given, emit=None):
    options = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay"))
    options |= {"delta_softplus": False, "delta_limits": (0.0, float("inf")), "discretization": "euler"}
    return arguments.check(**options | given, emit=emit)


def answers(a):
    out, last, emission = naive.scan(a)
    found = {"out": out, "last_state": last} | vars(emission)
    return {name: value for name, value in found.items() if value is not None}


def draw_upstream(given, emit=None, asked=None):
    """Random gradients of what is answered, or of the `asked` part, each of its dtype."""
    with torch.no_grad():
        found = answers(checked(given, emit))
    device = given["x"].device
    generator = torch.Generator(device).manual_seed(5)
    return {
        name: torch.randn(found[name].shape, device=device, generator=generator).to(found[name].dtype)
        for name in asked or found
    }


def autograd(given, emit, upstream):
    """Gradients of everything given, by autograd through the naive scan."""
    given = {name: value.detach().requires_grad_() if name in GIVEN else value for name, value in given.items()}
    found = answers(checked(given, emit))
    names = [name for name in GIVEN if name in given]
    outputs = [found[name] for name in upstream]
    grads = [value.to(output.dtype) for value, output in zip(upstream.values(), outputs, strict=True)]
    wanted = torch.autograd.grad(outputs, [given[name] for name in names], grads, materialize_grads=True)
    return dict(zip(names, wanted, strict=True))


def saved(a, segment=fused.SEGMENT, tile=None):
    """The states that the forward of A (head, state) leaves for the backward: those before every segment but one."""
    states = a.x.new_empty((len(a.x), (a.n_token - 1) // segment, *a.state_shape[1:]), dtype=a.dtype)
    out, last = torch.empty_like(a.x), a.x.new_empty(a.state_shape, dtype=a.dtype)
    fused.launch(replace(a, emit=Emit()), out, last, {}, None, None, tile, states, segment)
    return states


def error(value, exact):
    """max|a - b| / max|b|."""
    return (value.double() - exact).abs().max().item() / (exact.abs().max().item() or 1e-300)


def compare(given, go_back, emit=None, asked=None, exactly=1e-12, allowed=None):
    """Gradients by `go_back(a, upstream)` hold the bound: those of all that is answered, or of the `asked` part.

    float64 gradients are right to `exactly`; `allowed(upstream, exact)` gives further limits, by name. Answers by name
    the error and the float32 naive scan's own.
    """
    above = draw_upstream(given, emit, asked)
    exact, plain = (autograd(cast(given, dtype), emit, above) for dtype in (torch.float64, torch.float32))
    found = go_back(checked(given, emit), Upstream(**above))
    if "D" in given and given["D"].ndim < found["D"].ndim:
        found["D"] = found["D"].sum(1)
    assert set(found) == set(exact), set(found) ^ set(exact)
    errors = {name: (error(value, exact[name]), error(plain[name], exact[name])) for name, value in found.items()}
    further = {} if allowed is None else allowed(above, exact)
    for name, value in found.items():
        assert (value.shape, value.dtype) == (given[name].shape, given[name].dtype), name
        own_eps = torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0.0
        limit = max(1e-5, 2 * errors[name][1], own_eps, further.get(name, 0.0))
        limit = exactly if value.dtype == torch.float64 else limit
        assert errors[name][0] <= limit, (name, limit, errors)
    return errors


def assert_same(found, expected):
    """The same gradients, bit by bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
