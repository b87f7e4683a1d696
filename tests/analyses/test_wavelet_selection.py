"""Kernels of a frozen layer against the primitive `attention_row`; a span's angles against their definition."""

import numpy as np
import pytest
import scipy.linalg

from mamba_probe.analyses.common import attention_row
from mamba_probe.analyses.wavelet_alignment import core
from mamba_probe.analyses.wavelet_alignment.selection import frozen
from mamba_probe.analyses.wavelet_alignment.span import Span

WINDOW, HEADS = 64, 6


def layer(kind: str):
    """delta (source, head), A, B, C (token, group, state) and groups; `shared`: one decay for all states (Mamba-2)."""
    generator = np.random.default_rng(3)
    delta = generator.uniform(0.0, 0.2, (WINDOW, HEADS))
    if kind == "complex":
        A = -generator.uniform(0.1, 2.0, (HEADS, 4)) + 1j * generator.uniform(0.0, 9.0, (HEADS, 4))
        B, C = (generator.standard_normal((1, HEADS, 4)) + 1j for _ in "BC")
        return delta, A, B, C, np.arange(HEADS)
    A = -generator.uniform(0.1, 4.0, (HEADS, 1 if kind == "shared" else 4))
    B, C = (generator.standard_normal((WINDOW, 2, 4)) for _ in "BC")
    return delta, A, B, C, np.repeat([0, 1], HEADS // 2)


@pytest.mark.parametrize("zoh", [False, True])
@pytest.mark.parametrize("kind", ["own", "shared", "complex"])
@pytest.mark.parametrize("window", [4, 8, 32, 64])
def test_frozen_weights_are_those_of_the_primitive(kind, zoh, window):
    delta, A, B, C, groups = layer(kind)
    mean, elapsed = delta.mean(axis=0), delta.mean(axis=0) * np.arange(window - 1, -1, -1.0)[:, None]
    B_mean, C_mean = (values.mean(axis=0) for values in (B, C))
    plain = attention_row(np.tile(mean, (window, 1)), elapsed, A, B_mean[None], C_mean, groups, zoh)
    found = frozen(mean, A, C_mean * B_mean, groups, zoh, window)
    np.testing.assert_allclose(found, plain.T, rtol=1e-11, atol=1e-14 * np.abs(plain).max())


@pytest.mark.parametrize("n_kernels", [1, 5, 40])
@pytest.mark.parametrize("rotated", [3, 32, 4096])
def test_angles_after_rotation_are_those_of_the_span(monkeypatch, n_kernels, rotated):
    monkeypatch.setattr(core, "ROTATED", rotated)
    coefficient = np.random.default_rng(n_kernels).standard_normal((n_kernels, 64))
    coefficient[-1] = coefficient[0]
    coarse = np.arange(64) % 9 == 0
    span = Span(n_kernels, 64)
    span.add(coefficient)
    found, rank = core.coarse_cosines(span, coarse)
    basis = scipy.linalg.orth(coefficient.T)
    assert rank == basis.shape[1] == max(1, n_kernels - 1)
    np.testing.assert_allclose(found, scipy.linalg.svdvals(basis[coarse]), atol=1e-12)
