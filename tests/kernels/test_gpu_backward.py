"""The Triton backward, compiled, at real sizes on a CUDA device, against autograd of the float64 naive scan there.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import pytest
import torch

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import arguments, fused, naive
from mamba_probe.kernels.scan.backward import Upstream, backward, choose_tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

NARROW = ("x", "delta", "B", "C", "z")
GIVEN = (*NARROW, "A", "D", "delta_bias", "initial_state", "log_decay")
STATES = ("A_bar", "B_bar", "h")
SIZES = {"wide": (2, 2048, 1, (768, 1, 16)), "odd": (1, 4097, 1, (500, 1, 16)), "groups": (1, 1500, 2, (64, 2, 64))}


def drawn(oracle, size):
    batch, token, group, rows = SIZES[size]
    return oracle.draw(None, batch, token, group, shape=(*rows, False), device="cuda")


def checked(given, emit=None):
    options = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay"))
    return arguments.check(**options | {"discretization": "euler"} | given, emit=emit)


def answers(a):
    out, last, emission = naive.scan(a)
    found = {"out": out, "last_state": last} | vars(emission)
    return {name: value for name, value in found.items() if value is not None}


def autograd(given, emit, upstream):
    given = {name: value.requires_grad_() if name in GIVEN else value for name, value in given.items()}
    found = answers(checked(given, emit))
    names = [name for name in GIVEN if name in given]
    outputs = [found[name] for name in upstream]
    grads = torch.autograd.grad(
        outputs, [given[name] for name in names], list(upstream.values()), materialize_grads=True
    )
    return dict(zip(names, grads, strict=True))


def saved(a):
    """The forward's states for the backward."""
    shape = len(a.x), (a.n_token - 1) // fused.SEGMENT, *a.state_shape[1:]
    states = torch.empty(shape, dtype=a.dtype, device="cuda")
    out, last = torch.empty_like(a.x), torch.empty(a.state_shape, dtype=a.dtype, device="cuda")
    fused.launch(arguments.Arguments(**vars(a) | {"emit": Emit()}), out, last, {}, None, None, None, states)
    return states


def holds(oracle, given, emit=None, tile=None):
    a = checked(given, emit)
    double = answers(checked(oracle.cast(given, torch.float64), emit))
    generator = torch.Generator("cuda").manual_seed(3)
    upstream = {
        name: torch.randn(value.shape, device="cuda", generator=generator).to(a.x.dtype if name == "out" else a.dtype)
        for name, value in double.items()
    }
    of = lambda dtype: {name: value.to(dtype) for name, value in upstream.items()}  # noqa: E731
    exact = autograd(oracle.cast(given, torch.float64), emit, of(torch.float64))
    plain = autograd(oracle.cast(given, torch.float32), emit, of(torch.float32))
    found = backward(a, saved(a), Upstream(**upstream), tile)
    if given["D"].ndim == 1:
        found["D"] = found["D"].sum(1)
    assert set(found) == set(exact)
    broken = {}
    for name, value in found.items():
        scale = exact[name].abs().max().clamp_min(1e-300)
        error, own = (((every[name].double() - exact[name]).abs().max() / scale).item() for every in (found, plain))
        limit = max(1e-5, 2 * own, 0.0 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps)
        print(name, f"{error:.1e} (naive {own:.1e})")
        if not error <= limit:
            broken[name] = error, limit
    assert not broken


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_hold_the_bound(oracle, size, dtype):
    holds(oracle, oracle.cast(drawn(oracle, size), dtype, NARROW))


@pytest.mark.parametrize("size", ["odd", "groups"])
def test_gradients_of_what_was_emitted(oracle, size):
    token = SIZES[size][1]
    holds(oracle, drawn(oracle, size), Emit(("delta", "y", *STATES), tokens=range(0, token, 61), channels=(41, 3, 17)))


@pytest.mark.parametrize(
    "features", [("zoh",), ("seq_idx", "constant"), ("log_decay", "zoh"), ("log_decay", "seq_idx")]
)
def test_gradients_of_features(oracle, features):
    given = oracle.featured(oracle.draw(None, 1, 1500, 1, shape=(256, 1, 16, False)), features)
    holds(oracle, {name: value.cuda() if torch.is_tensor(value) else value for name, value in given.items()})


def test_long_memory_and_a_reset(oracle):
    given = drawn(oracle, "odd") | {"delta_limits": (0.0, float("inf"))}
    given["A"][:250] = -1e-6
    given["delta"][:, 2000] = 1e4
    given["B"][:, 2000] = 0.0
    holds(oracle, given)


@pytest.mark.parametrize("state", [1, 2, 12, 64, 256])
@pytest.mark.parametrize("token", [1, 63, 64, 65, 700])
def test_any_length_and_state(oracle, token, state):
    holds(oracle, oracle.draw(None, 2, token, 1, shape=(100, 1, state, False), device="cuda"))


def test_the_same_bits_again(oracle):
    given = oracle.cast(oracle.draw(None, 4, 4096, shape=(5120, 1, 16, False), device="cuda"), torch.bfloat16, NARROW)
    a = checked(given)
    states, up = saved(a), Upstream(out=torch.randn_like(a.x))
    assert choose_tile(a).warps == 2
    first, second = (backward(a, states, up) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
