"""The ideal signatures of the Haar blocks against their effective kernels, one forward pass a token of the input."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.analyses import lti_limits, wavelet_alignment
from mamba_probe.constructions import haar, window_sums

LENGTH = 64
VARIANTS = {
    "flat-x": {},
    "flat-B": {"variant": "flat-B"},
    "ramps": {"variant": "ramps", "beta": 128.0},
    "delta": {"variant": "delta", "beta": 128.0},
    "decay": {"variant": "decay", "levels": 6},
    "ramps, mamba2": {"variant": "ramps", "beta": 128.0, "mixer": "mamba2"},
}


def build(variant, length=LENGTH):
    return haar(**{"length": length, "dtype": torch.float64} | VARIANTS[variant])


def effective_kernels(construction, length):
    """d out / d u, (kernel, token), by differences: the first output is that of u = 0."""
    u = np.concatenate([np.zeros((1, length)), np.eye(length)])
    with torch.no_grad():
        out = torch.cat([construction.model(row)[:, -1] for row in construction.inputs(u).split(33)]).numpy()
    kernels = (out[1:] - out[0]).T
    return kernels[np.abs(construction.expected(np.eye(length))).sum(0) > 0]


def measured(kernels, ideal, constant):
    """Signatures by name; `constant` kernels have no step, and are left out of the index."""
    cosine = (kernels * ideal).sum(1) / np.linalg.norm(kernels, axis=1) / np.linalg.norm(ideal, axis=1)
    stepped = kernels[~constant]
    span = np.linalg.qr(kernels.T)[0]
    outside = ideal.T - span @ (span.T @ ideal.T)
    return {
        "kernel_cosine": cosine,
        "discontinuity_index": np.abs(np.diff(stepped, axis=1)).max(1) / np.ptp(stepped, axis=1),
        "capture_residual": np.linalg.norm(outside) ** 2 / np.linalg.norm(ideal) ** 2,
    }


def haar_functions(levels, length):
    """(kernel, token), coarsest first, from their definition."""
    rows = [np.full(length, length**-0.5)]
    for level in range(levels):
        width = length >> level
        for k in range(2**level):
            row = np.zeros(length)
            row[k * width : k * width + width // 2] = width**-0.5
            row[k * width + width // 2 : (k + 1) * width] = -(width**-0.5)
            rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_effective_kernels_are_the_haar_functions(variant):
    construction, levels = build(variant), VARIANTS[variant].get("levels", 3)
    kernels, ideal = effective_kernels(construction, LENGTH), haar_functions(levels, LENGTH)
    found = measured(kernels, ideal, np.arange(len(ideal)) == 0)
    for name, values in found.items():
        assert np.abs(values - construction.signatures[name]).max() < 1e-9, name


@pytest.mark.parametrize("variant", ["flat-x", "flat-B", "ramps", "ramps, mamba2"])
def test_effective_kernels_are_the_windows(variant):
    construction = window_sums(60, 5, **{"dtype": torch.float64} | VARIANTS[variant])
    kernels, ideal = effective_kernels(construction, 60), np.kron(np.eye(5), np.ones(12))
    found = measured(kernels, ideal, np.zeros(5, bool))
    assert construction.signatures.keys() == found.keys()
    for name, values in found.items():
        assert np.abs(values - construction.signatures[name]).max() < 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_randomised_twin_has_none_of_them(variant):
    construction, ideal = build(variant), haar_functions(3, LENGTH)
    twin = construction.randomised(1)
    assert not twin.signatures
    kernels = effective_kernels(twin, LENGTH)[:8]
    found = measured(kernels, ideal, np.arange(8) == 0)
    assert np.abs(found["kernel_cosine"]).max() < 0.8
    assert found["capture_residual"] > 0.1


@pytest.mark.parametrize(("variant", "tolerance"), [("flat-x", 1e-6), ("ramps, mamba2", 1e-6)])
def test_frozen_kernels_of_a_recording_after_the_read_out(variant, tolerance):
    construction = build(variant, 128)
    with mp.attach(construction.model) as probe:
        trace = probe.record(construction.inputs(np.random.default_rng(0).standard_normal((2, 128))))
    result = wavelet_alignment.measure(trace, read_out=construction.read_out, level=3)
    for name in ("layer_best_cosine", "layer_scaling_cosine"):
        assert result[name].item() == pytest.approx(construction.signatures[name], abs=tolerance)
    assert result["best_cosine"].isel(kernel=slice(1, None)).min().item() > 1 - tolerance


@pytest.mark.parametrize("variant", ["flat-B", "ramps", "delta", "decay"])
def test_frozen_kernels_without_a_read_out_are_not_claimed(variant):
    construction = build(variant)
    assert construction.read_out is None
    assert not {"layer_best_cosine", "layer_scaling_cosine"} & construction.signatures.keys()


def test_states_a_time_invariant_layer_would_need():
    """For 10 % error of each wavelet kernel at 256 tokens; the constant one needs a single state."""
    kernels = effective_kernels(build("flat-x", 256), 256)
    result = lti_limits.measure(kernels, n_states=(4,), fits=("fourier",))
    assert result["lti_order"].values.tolist() == [1, 20, 20, 20, 18, 43, 43, 18]


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_told(variant):
    construction = build(variant)
    assert len(construction.states) == 1
    assert f"states: 1 x {construction.states[0]}" in construction.describe()
    assert "ideal signatures: kernel_cosine 1, discontinuity_index 1, capture_residual 0" in construction.describe()
