"""The backward of A (head,), compiled, at real sizes on a CUDA device, against the float64 naive scan's autograd there.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import pytest
import torch

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan.backward import Upstream
from mamba_probe.kernels.scan.chunked_backward import backward, choose_tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

OF_STEPS = ("A", "delta_bias", "log_decay")
"""Of float32 gradients those that are sums of products of x's type."""
SHAPE = (80, 64, 128, True)
EMITTED = ("delta", "A_bar", "B_bar", "y")


def drawn(oracle, token, group=1, shape=SHAPE, batch=1, features=()):
    return oracle.featured(oracle.draw(None, batch, token, group, shape=shape, device="cuda"), features)


def moved(oracle, gradients, given, emit, above, exact, n_draw=8):
    """How far the exact gradients of `OF_STEPS` move when what is bfloat16 moves by up to half a unit in its last
    place: the root mean square over draws, of the element that moves most, over the largest gradient."""
    generator = torch.Generator("cuda").manual_seed(7)

    def shaken(value):
        unit = 2 * torch.rand(value.shape, device="cuda", generator=generator, dtype=torch.float64) - 1
        return value.double() * (1 + torch.finfo(torch.bfloat16).eps / 4 * unit)

    double = oracle.cast(given, torch.float64)
    squares = {name: torch.zeros_like(exact[name]) for name in OF_STEPS if name in exact}
    for _ in range(n_draw):
        near = double | {name: shaken(given[name]) for name in ("x", "B", "C", "z") if given[name].ndim > 2}
        found = gradients.autograd(near, emit, above | {"out": shaken(above["out"])})
        for name, total in squares.items():
            total += (found[name] - exact[name]).square() / n_draw
    return {name: (total.max().sqrt() / exact[name].abs().max()).item() for name, total in squares.items()}


def holds(oracle, gradients, given, emit=None):
    """But for gradients of bfloat16 inputs that are float32 and sums of bfloat16 products. Their error is of rounding
    that has no bias, as is what `moved` measures: they are held to four of its standard deviations. (What the products
    round was 1.2 of them, over 14 draws of two heads.)"""

    def allowed(above, exact):
        spread = moved(oracle, gradients, given, emit, above, exact)
        return {name: 4 * value for name, value in spread.items()}

    narrow = given["x"].dtype == torch.bfloat16
    back = lambda a, upstream: backward(a, None, upstream)  # noqa: E731
    print(gradients.compare(given, back, emit, allowed=allowed if narrow else None))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_hold_the_bound(oracle, gradients, group, dtype):
    holds(oracle, gradients, oracle.cast(drawn(oracle, 4096, group), dtype, gradients.NARROW))


def test_float64_gradients(oracle, gradients):
    given = oracle.cast(drawn(oracle, 150, 2, (8, 24, 33, True)), torch.float64)
    holds(oracle, gradients, given, Emit(EMITTED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_what_was_emitted(oracle, gradients, dtype):
    given = oracle.cast(drawn(oracle, 1500, 2, (16, 64, 64, True)), dtype, gradients.NARROW)
    holds(oracle, gradients, given, Emit((*EMITTED, "delta_cumsum"), tokens=range(0, 1500, 61), channels=(11, 3, 7)))


@pytest.mark.parametrize("features", [(), ("zoh", "log_decay"), ("seq_idx", "constant")])
def test_gradients_of_an_emitted_h(oracle, gradients, features):
    given = drawn(oracle, 700, 2, (8, 24, 64, True), features=features)
    holds(oracle, gradients, given, Emit((*EMITTED, "h"), tokens=range(0, 700, 7), channels=(5, 3)))


@pytest.mark.parametrize(
    "features", [("zoh",), ("seq_idx", "constant"), ("log_decay", "zoh"), ("log_decay", "seq_idx")]
)
def test_gradients_of_features(oracle, gradients, features):
    holds(oracle, gradients, drawn(oracle, 1500, 2, (16, 64, 128, True), 2, features))


def test_long_memory_and_a_reset(oracle, gradients):
    given = drawn(oracle, 2003, 1, (16, 64, 128, True)) | {"delta_limits": (0.0, float("inf"))}
    given["A"][:8] = -1e-6
    given["delta"][:, 1000] = 1e4
    given["B"][:, 1000] = 0.0
    holds(oracle, gradients, given)


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
def test_any_length_and_size(oracle, gradients, token, rows, dtype):
    holds(oracle, gradients, oracle.cast(drawn(oracle, token, 1, (*rows, True), 2), dtype, gradients.NARROW))


def test_large_heads(oracle, gradients):
    """512 states take chunks of 16 tokens, and with 128 channels they do not fit."""
    fits, too_large = (
        oracle.cast(drawn(oracle, 100, 1, (2, channels, 512, True)), torch.bfloat16, gradients.NARROW)
        for channels in (64, 128)
    )
    holds(oracle, gradients, fits)
    a = gradients.checked(too_large)
    with pytest.raises(ValueError, match=r'no gradients of 128 channels and 512 states a head: use backend="cpu"'):
        backward(a, None, Upstream(out=torch.ones_like(a.x)))


def test_an_expanded_gradient(oracle, gradients):
    """That of a sum has one number and no memory of its own."""
    a = gradients.checked({name: value for name, value in drawn(oracle, 300).items() if name != "z"})
    ones = torch.ones((), device="cuda").expand(a.x.shape)
    expanded, dense = (backward(a, None, Upstream(out=out)) for out in (ones, ones.contiguous()))
    for name, value in dense.items():
        assert (expanded[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize("batch", [1, 4])
def test_the_same_bits_again(oracle, gradients, batch):
    a = gradients.checked(oracle.cast(drawn(oracle, 4096, batch=batch), torch.bfloat16, gradients.NARROW))
    assert (choose_tile(a).heads < 80) == (batch == 1), "a sum over blocks of heads too"
    given = Upstream(out=torch.randn_like(a.x))
    gradients.assert_same(*(backward(a, None, given) for _ in range(2)))
