"""The reference models through our own scan, each backend and precision: the tolerances that were given for them."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.constructions import haar, keep_nth

TOLERANCE = {  # of the error relative to the largest output of a row
    ("haar", torch.float64): 1e-12,
    ("haar", torch.float32): 1e-6,
    ("ramps", torch.float64): 1e-8,
    ("ramps", torch.float32): 1e-3,
    ("keep", torch.float64): 1e-12,
    ("keep", torch.float32): 1e-6,
}
HAAR = {
    "flat-x": ("haar", {}),
    "flat-B": ("haar", {"variant": "flat-B"}),
    "ramps": ("ramps", {"variant": "ramps"}),
    "ramps, mamba2": ("ramps", {"variant": "ramps", "mixer": "mamba2"}),
}
PRECISIONS = [torch.float64, torch.float32]


def through(construction, backend, given):
    """The last token's output through `backend` of our scan."""
    with mp.attach(construction.model, backend=backend) as probe, torch.no_grad():
        assert probe.backend == backend
        return construction.model(construction.inputs(given))[:, -1].double().numpy()


def worst(out, want):
    return (np.abs(out - want).max(1) / np.abs(want).max(1)).max()


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("variant", HAAR)
def test_haar(variant, dtype, backend):
    kind, more = HAAR[variant]
    construction = haar(256, 3, 64.0, dtype=dtype, **more)
    u = np.random.default_rng(0).standard_normal((4, 256))
    assert worst(through(construction, backend, u), construction.expected(u)) <= TOLERANCE[kind, dtype]


def kept(mixer, profile, dtype, backend, length):
    """The error at any place of the kept token; Mamba-2's norm is transformers', in float32 whatever the dtype."""
    ids = np.random.default_rng(1).integers(0, 16, (2, length))
    tolerance = TOLERANCE["keep", dtype if mixer == "mamba1" else torch.float32]
    for n in (0, length // 2, length - 1):
        construction = keep_nth(length=length, n=n, profile=profile, dtype=dtype, mixer=mixer)
        out, want = through(construction, backend, ids), construction.expected(ids)
        assert worst(out, want) <= tolerance
        assert (out[:, :16].argmax(1) == ids[:, n]).all()


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("profile", ["ramp", "event"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_keep(mixer, profile, dtype, backend):
    kept(mixer, profile, dtype, backend, 1024)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_keep_at_the_longest(mixer, dtype, backend):
    kept(mixer, "ramp", dtype, backend, 16384)
