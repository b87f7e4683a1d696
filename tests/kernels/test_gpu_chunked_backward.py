"""The backward of A (head,), compiled, at real sizes on a CUDA device, against the float64 naive scan's autograd there.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import pytest
import torch

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import arguments, naive
from mamba_probe.kernels.scan.backward import Upstream
from mamba_probe.kernels.scan.chunked_backward import backward, choose_tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

NARROW = ("x", "delta", "B", "C", "z")
GIVEN = (*NARROW, "A", "D", "delta_bias", "initial_state", "log_decay")
OF_STEPS = ("A", "delta_bias", "log_decay")
"""Of float32 gradients those that are sums of products of x's type."""
SHAPE = (80, 64, 128, True)
EMITTED = ("delta", "A_bar", "B_bar", "y")


def drawn(oracle, token, group=1, shape=SHAPE, batch=1, features=()):
    given = oracle.featured(oracle.draw(None, batch, token, group, shape=shape), features)
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in given.items()}


def checked(given, emit=None):
    options = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay"))
    return arguments.check(**options | {"discretization": "euler"} | given, emit=emit)


def answers(a):
    out, last, emission = naive.scan(a)
    found = {"out": out, "last_state": last} | vars(emission)
    return {name: value for name, value in found.items() if value is not None}


def upstream(given, emit=None):
    """Random gradients of all that is answered."""
    a = checked(given, emit)
    with torch.no_grad():
        found = answers(a)
    generator = torch.Generator("cuda").manual_seed(3)
    return {
        name: torch.randn(value.shape, device="cuda", generator=generator).to(value.dtype)
        for name, value in found.items()
    }


def autograd(given, emit, above):
    given = {name: value.detach().requires_grad_() if name in GIVEN else value for name, value in given.items()}
    found = answers(checked(given, emit))
    names = [name for name in GIVEN if name in given]
    outputs = [found[name] for name in above]
    grads = [value.to(output.dtype) for value, output in zip(above.values(), outputs, strict=True)]
    wanted = torch.autograd.grad(outputs, [given[name] for name in names], grads, materialize_grads=True)
    return dict(zip(names, wanted, strict=True))


def moved(oracle, given, emit, above, exact, n_draw=2):
    """How far the exact gradients of `OF_STEPS` move when what is bfloat16 moves by half a unit in its last place."""
    generator = torch.Generator("cuda").manual_seed(7)

    def shaken(value):
        unit = 2 * torch.rand(value.shape, device="cuda", generator=generator, dtype=torch.float64) - 1
        return value.double() * (1 + torch.finfo(torch.bfloat16).eps / 4 * unit)

    double = oracle.cast(given, torch.float64)
    furthest = dict.fromkeys(OF_STEPS, 0.0)
    for _ in range(n_draw):
        near = double | {name: shaken(given[name]) for name in ("x", "B", "C", "z") if given[name].ndim > 2}
        found = autograd(near, emit, above | {"out": shaken(above["out"])})
        for name in furthest.keys() & found.keys():
            apart = ((found[name] - exact[name]).abs().max() / exact[name].abs().max()).item()
            furthest[name] = max(furthest[name], apart)
    return furthest


def holds(oracle, given, emit=None):
    """16-bit gradients to their eps; float32 ones that are sums of bfloat16 products to twice what rounding the inputs
    once more would change; all others to the project's bound."""
    above = upstream(given, emit)
    exact, plain = (autograd(oracle.cast(given, dtype), emit, above) for dtype in (torch.float64, torch.float32))
    found = backward(checked(given, emit), None, Upstream(**above))
    if given["D"].ndim == 1:
        found["D"] = found["D"].sum(1)
    assert set(found) == set(exact)
    broken, narrow = {}, given["x"].dtype == torch.bfloat16
    furthest = moved(oracle, given, emit, above, exact) if narrow else {}
    for name, value in found.items():
        scale = exact[name].abs().max().clamp_min(1e-300)
        error, own = (((every[name].double() - exact[name]).abs().max() / scale).item() for every in (found, plain))
        limit = max(1e-5, 2 * own, 0.0 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps)
        if narrow and name in OF_STEPS:
            limit = max(limit, 2 * furthest[name])
        print(name, f"{error:.1e} (naive {own:.1e})")
        if not error <= limit:
            broken[name] = error, limit
    assert not broken


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_hold_the_bound(oracle, group, dtype):
    holds(oracle, oracle.cast(drawn(oracle, 4096, group), dtype, NARROW))


def test_float64_gradients(oracle):
    given = oracle.cast(drawn(oracle, 150, 2, (8, 24, 33, True)), torch.float64)
    above = upstream(given)
    exact = autograd(given, None, above)
    found = backward(checked(given), None, Upstream(**above))
    assert max((found[name] - exact[name]).abs().max() / exact[name].abs().max() for name in exact) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_what_was_emitted(oracle, dtype):
    given = oracle.cast(drawn(oracle, 1500, 2, (16, 64, 64, True)), dtype, NARROW)
    holds(oracle, given, Emit((*EMITTED, "delta_cumsum"), tokens=range(0, 1500, 61), channels=(11, 3, 7)))


@pytest.mark.parametrize("features", [(), ("zoh", "log_decay"), ("seq_idx", "constant")])
def test_gradients_of_an_emitted_h(oracle, features):
    given = drawn(oracle, 700, 2, (8, 24, 64, True), features=features)
    holds(oracle, given, Emit((*EMITTED, "h"), tokens=range(0, 700, 7), channels=(5, 3)))


@pytest.mark.parametrize(
    "features", [("zoh",), ("seq_idx", "constant"), ("log_decay", "zoh"), ("log_decay", "seq_idx")]
)
def test_gradients_of_features(oracle, features):
    holds(oracle, drawn(oracle, 1500, 2, (16, 64, 128, True), 2, features))


def test_long_memory_and_a_reset(oracle):
    given = drawn(oracle, 2003, 1, (16, 64, 128, True)) | {"delta_limits": (0.0, float("inf"))}
    given["A"][:8] = -1e-6
    given["delta"][:, 1000] = 1e4
    given["B"][:, 1000] = 0.0
    holds(oracle, given)


@pytest.mark.parametrize(
    ("token", "rows", "dtype"),
    [
        (1, (80, 64, 128), torch.bfloat16),
        (1, (4, 24, 5), torch.float32),
        (63, (6, 48, 16), torch.float32),
        (63, (4, 64, 256), torch.bfloat16),
        (65, (3, 1, 1), torch.bfloat16),
        (65, (2, 128, 64), torch.float32),
        (1500, (80, 64, 128), torch.bfloat16),
        (1500, (4, 64, 256), torch.float32),
        (1500, (4, 24, 5), torch.bfloat16),
    ],
)
def test_any_length_and_size(oracle, token, rows, dtype):
    holds(oracle, oracle.cast(drawn(oracle, token, 1, (*rows, True), 2), dtype, NARROW))


def test_large_heads(oracle):
    """512 states take chunks of 16 tokens, and with 128 channels they do not fit."""
    fits, too_large = (
        oracle.cast(drawn(oracle, 100, 1, (2, channels, 512, True)), torch.bfloat16, NARROW) for channels in (64, 128)
    )
    holds(oracle, fits)
    a = checked(too_large)
    with pytest.raises(ValueError, match=r'no gradients of 128 channels and 512 states a head: use backend="cpu"'):
        backward(a, None, Upstream(out=torch.ones_like(a.x)))


def test_an_expanded_gradient(oracle):
    """That of a sum has one number and no memory of its own."""
    a = checked({name: value for name, value in drawn(oracle, 300).items() if name != "z"})
    ones = torch.ones((), device="cuda").expand(a.x.shape)
    expanded, dense = (backward(a, None, Upstream(out=out)) for out in (ones, ones.contiguous()))
    for name, value in dense.items():
        assert (expanded[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize("batch", [1, 4])
def test_the_same_bits_again(oracle, batch):
    a = checked(oracle.cast(drawn(oracle, 4096, batch=batch), torch.bfloat16, NARROW))
    assert choose_tile(a).heads < 80 or batch == 4
    given = Upstream(out=torch.randn_like(a.x))
    first, second = (backward(a, None, given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
