"""The grid of `stress` on a CUDA device, through the compiled kernels and their backward.

Products whose terms are denormal may be flushed to zero there, by the tensor cores' split and by exp2: the floor is the
smallest normal number a token. Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import math

import pytest
import torch

from mamba_probe.kernels.scan import Emit, selective_scan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

TOKEN = 300
"""Several chunks and spans of either kernel."""
FLUSHED = ("raw -87.5",)
"""delta = 1e-38 is denormal, and exp2 makes it 0 there: with A = -1e37 that is .1 of a decay's exponent."""
PAST = {"mamba2": ("sum of delta past float32",)}
"""delta C B of two tokens of a chunk is past float32: see docs/numerics.md."""
VARIANTS = ("euler", "zoh", "softplus", "softplus, limits", "log_decay", "seq_idx")


def scan(emit=(), **given):
    backend = "triton" if given["x"].is_cuda else "cpu"
    return selective_scan(**given, emit=Emit(emit), backend=backend)


def check(broken, family):
    """Nothing is broken but what is flushed, which is finite, and what is past the range."""
    assert all(math.isfinite(error) for (case, _), (error, _) in broken.items() if case in FLUSHED)
    left = {key: found for key, found in broken.items() if key[0] not in (*FLUSHED, *PAST.get(family, ()))}
    assert not left, "\n".join(f"{key}: {found}" for key, found in left.items())


@pytest.fixture(params=["cuda"])
def device(request):
    return request.param


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_answers_are_finite_and_right(stress, family, variant, device):
    check(stress.answered(scan, family, variant, TOKEN, device=device, floor=stress.NORMAL), family)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_gradients_are_finite_and_right(stress, family, variant, device):
    go_back = stress.through(scan)
    check(stress.differentiated(go_back, family, variant, TOKEN, device=device, floor=stress.NORMAL), family)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_state_stands_still_and_is_reset_exactly(stress, family, device):
    stress.stands_still(scan, family, device)
    stress.is_reset(scan, family, device)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e4, 1e30])
def test_a_million_tokens(stress, scalar, rate, device):
    """A geometric series, as in test_stress: (8 + k) 2^-23 for a memory of k tokens."""
    stress.is_geometric(scan, scalar, 2**20 if device == "cuda" else 4096, rate, device)
    torch.cuda.empty_cache()
