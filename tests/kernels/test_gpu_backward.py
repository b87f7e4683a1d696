"""The Triton backward, compiled, at real sizes on a CUDA device, against autograd of the float64 naive scan there.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import pytest
import torch

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan.backward import Upstream, backward, choose_tile

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

STATES = ("A_bar", "B_bar", "h")
SIZES = {"wide": (2, 2048, 1, (768, 1, 16)), "odd": (1, 4097, 1, (500, 1, 16)), "groups": (1, 1500, 2, (64, 2, 64))}


def drawn(oracle, size):
    batch, token, group, rows = SIZES[size]
    return oracle.draw(None, batch, token, group, shape=(*rows, False), device="cuda")


def holds(gradients, given, emit=None):
    print(gradients.compare(given, lambda a, upstream: backward(a, gradients.saved(a), upstream), emit))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_hold_the_bound(oracle, gradients, size, dtype):
    holds(gradients, oracle.cast(drawn(oracle, size), dtype, gradients.NARROW))


@pytest.mark.parametrize("size", ["odd", "groups"])
def test_gradients_of_what_was_emitted(oracle, gradients, size):
    emit = Emit(("delta", "y", *STATES), tokens=range(0, SIZES[size][1], 61), channels=(41, 3, 17))
    holds(gradients, drawn(oracle, size), emit)


@pytest.mark.parametrize(
    "features", [("zoh",), ("seq_idx", "constant"), ("log_decay", "zoh"), ("log_decay", "seq_idx")]
)
def test_gradients_of_features(oracle, gradients, features):
    given = oracle.draw(None, 1, 1500, 1, shape=(256, 1, 16, False), device="cuda")
    holds(gradients, oracle.featured(given, features))


def test_long_memory_and_a_reset(oracle, gradients):
    given = drawn(oracle, "odd") | {"delta_limits": (0.0, float("inf"))}
    given["A"][:250] = -1e-6
    given["delta"][:, 2000] = 1e4
    given["B"][:, 2000] = 0.0
    holds(gradients, given)


@pytest.mark.parametrize("state", [1, 2, 12, 64, 256])
@pytest.mark.parametrize("token", [1, 63, 64, 65, 700])
def test_any_length_and_state(oracle, gradients, token, state):
    holds(gradients, oracle.draw(None, 2, token, 1, shape=(100, 1, state, False), device="cuda"))


def test_float64_gradients(oracle, gradients):
    given = oracle.draw(None, 2, 150, 2, shape=(8, 3, 5, False), device="cuda")
    holds(gradients, oracle.cast(given, torch.float64), Emit(("delta", "y", *STATES)))


def test_the_same_bits_again(oracle, gradients):
    given = oracle.draw(None, 4, 4096, shape=(5120, 1, 16, False), device="cuda")
    a = gradients.checked(oracle.cast(given, torch.bfloat16, gradients.NARROW))
    states, up = gradients.saved(a), Upstream(out=torch.randn_like(a.x))
    assert choose_tile(a).warps == 2
    gradients.assert_same(*(backward(a, states, up) for _ in range(2)))
