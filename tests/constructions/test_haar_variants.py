"""What each variant of the Haar block plants: its profile of delta, its bound, what breaks it and what it refuses."""

import numpy as np
import pytest
import pywt
import torch

from mamba_probe.constructions import haar
from mamba_probe.constructions.wavelets import window_sums

VARIANTS = ["flat-x", "flat-B", "ramps", "delta", "decay"]
CHANNELS = {"flat-x": 31, "flat-B": 24, "ramps": 18, "delta": 11, "decay": 68}  # T = 64, J = 3 or 6


def build(variant, length=64, levels=3, beta=64.0, dtype=torch.float64):
    return haar(length, int(np.log2(length)) if variant == "decay" else levels, beta, variant, dtype)


def noise(length, batch=3):
    return np.random.default_rng(1).standard_normal((batch, length)).clip(-3, 3)


def native(construction, u):
    with torch.no_grad():
        return construction.model(construction.inputs(u))[:, -1].double().numpy()


def error(construction, u, evaluate):
    return np.abs(evaluate(construction.model, construction.inputs(u)).out[:, -1] - construction.expected(u))


def step(length, a):
    return (np.arange(length) >= a).astype(float)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_is_pywt(variant):
    construction, u = build(variant), noise(64)
    bands = [np.concatenate(pywt.wavedec(row, "haar", level=6)) for row in u]
    kernels = 64 if variant == "decay" else 8
    assert np.allclose(construction.expected(u)[:, :kernels], np.stack(bands)[:, :kernels], atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("length", "levels"), [(2, 1), (8, 1), (8, 3), (64, 2)])
def test_small_sizes(variant, length, levels, evaluate):
    construction, u = build(variant, length, levels, beta=128.0), noise(length)
    assert error(construction, u, evaluate).max() < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_are_counted_and_named(variant):
    construction = build(variant)
    labels = [label for label in construction.channels if label != "padding"]
    assert len(labels) == CHANNELS[variant]
    assert len(construction.channels) == construction.model.intermediate_size
    assert f"error bound: {construction.bound:.2g}" in construction.describe()
    assert (construction.read_out is not None) == (variant == "flat-x")


@pytest.mark.parametrize("beta", [8.0, 16.0, 32.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bound_holds_and_is_tight(variant, beta, evaluate):
    """But for "delta" the output is linear in u: the worst u sums the absolute errors of a kernel."""
    construction = build(variant, 32, 2, beta)
    if variant == "delta":
        u = np.random.default_rng(0).choice([-1.0, 1.0], (800, 32))
        worst = error(construction, u, evaluate).max()
    else:
        worst = error(construction, np.eye(32), evaluate).sum(0).max()
    assert construction.bound / 3 < worst <= construction.bound


@pytest.mark.parametrize(
    ("beta", "largest", "total"), [(16, 2.27e-3, 4.54e-3), (32, 2.10e-5, 4.19e-5), (64, 3.52e-9, 7.03e-9)]
)
def test_two_ramps_make_a_step(beta, largest, total, evaluate):
    construction = build("ramps", beta=float(beta))
    delta = evaluate(construction.model, construction.inputs(noise(64, 1))).delta[0]
    for a in (8, 32, 56):
        early, late = (construction.channels.index(f"{kind} ramp {a}") for kind in ("early", "late"))
        gap = np.abs((delta[:, early] - delta[:, late]) * 2 / beta - step(64, a))
        assert gap.max() == pytest.approx(largest, rel=0.005)
        assert gap.sum() == pytest.approx(total, rel=0.005)


def test_kinks_on_tokens_cost_one_over_beta(evaluate):
    """The same ramps a quarter of a token earlier: their kinks at a - 1 and a - 1/2."""
    errors = []
    for beta in (16.0, 32.0, 64.0, 128.0):
        construction = build("ramps", 256, beta=beta)
        ramp = [k for k, label in enumerate(construction.channels) if " ramp " in label]
        with torch.no_grad():
            construction.model.dt_proj.bias[ramp] += beta / 4
        errors.append(error(construction, noise(256), evaluate).max() * beta)
    assert errors == pytest.approx([errors[-1]] * 4, rel=0.01)
    assert errors[-1] > 0.3


def test_u_goes_through_delta(evaluate):
    """eps u on top of the ramp after the knot, nothing before it."""
    construction, u = build("delta"), noise(64, 1)
    delta = evaluate(construction.model, construction.inputs(u)).delta[0]
    after = step(64, 24)
    ramp = 64 * (np.arange(64) - 24 + 0.5) + 4 * u[0]
    assert np.allclose(delta[:, construction.channels.index("ramp 24")], after * ramp, atol=1e-8)


def test_u_too_large_for_delta(evaluate):
    """At |u| = 8 delta would not fall to 0 before its knot; at 7.9 it nearly fails to."""
    construction, u = build("delta"), noise(64)
    assert error(construction, u, evaluate).max() < 1e-9
    assert error(construction, 7.9 * np.sign(u), evaluate).max() > 1e-4
    for call in (construction.inputs, construction.expected):
        with pytest.raises(ValueError, match=r"needs \|u\| < 8, so that eps \|u\| < beta / 2 \(got 8\)"):
            call(8 * np.sign(u))


def test_each_token_has_its_channel(evaluate):
    construction = build("decay")
    kept = np.exp(-evaluate(construction.model, construction.inputs(noise(64, 1))).delta[0])
    first = construction.channels.index("token 0")
    for n in (0, 31, 63):
        assert np.allclose(kept[:, first + n], step(64, n + 1), atol=2e-14)
    assert (construction.model.A_log == 0).all()


def test_frozen_kernels_of_flat_b_are_not_haar_functions(evaluate):
    """They are u in a window: on white noise their cosine with a Haar function is that of chance."""
    flat, u = build("flat-B", 256), noise(256, 1)
    delta = evaluate(flat.model, flat.inputs(u)).delta[0]
    read = flat.model.out_proj.weight.detach().numpy()
    kernels, basis = read @ (delta * u[0][:, None]).T, flat.expected(np.eye(256)).T
    cosine = (kernels * basis).sum(1) / np.linalg.norm(kernels, axis=1)
    assert np.abs(cosine).max() < 0.3
    assert np.abs(kernels.sum(1) - flat.expected(u)[0]).max() < 1e-12


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_randomised_twin_fails(variant):
    construction, u = build(variant, dtype=torch.float32), noise(64)
    want = construction.expected(u)
    assert np.abs(native(construction, u) - want).max() < 0.02 * np.abs(want).max()
    assert np.abs(native(construction.randomised(3), u) - want).max() > 0.3 * np.abs(want).max()


@pytest.mark.parametrize(
    "name", ["in_proj.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "out_proj.weight"]
)
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_one_broken_weight_breaks_it(variant, name, evaluate):
    construction, u = build(variant), noise(64)
    assert error(construction, u, evaluate).max() < 1e-7
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] = 0
    assert error(construction, u, evaluate).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "ramp"}, r"variant='ramp' is not supported, expected one of \['flat-x', .*did you mean 'ramps'\?"),
        ({"variant": "D"}, r"variant='D', decay used as a flat window, is not offered: .* delta_erase / delta_hold"),
        ({"variant": "flat-decay"}, 'use variant="flat-B" for flat windows'),
        ({"variant": "decay"}, r'2\*\*levels >= length for variant="decay".* \(got 2\*\*3 < 256\)'),
        ({"variant": "ramps", "length": 96}, r"length a power of two \(got 96\)"),
        ({"variant": "delta", "dtype": torch.bfloat16}, "got torch.bfloat16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"haar: .*{message}|{message}"):
        haar(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": 7}, r"window_sums: needs length % windows == 0 \(got 1000 and 7\)"),
        ({"windows": 1}, r"2 <= windows <= length \(got windows = 1, length = 1000\)"),
        ({"windows": 0}, r"2 <= windows <= length \(got windows = 0, length = 1000\)"),
        ({"variant": "decay"}, r'windows >= length for variant="decay".* \(got 8 < 1000\)'),
        ({"beta": 0.0}, r"beta > 0 and finite \(got 0.0\)"),
        ({"variant": "D"}, "window_sums: variant='D'"),
    ],
)
def test_impossible_window_sums(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_sums(**arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_window_sums(variant, evaluate):
    windows = 12 if variant == "decay" else 3
    construction, u = window_sums(12, windows, 96.0, variant, torch.float64), noise(12)
    want = np.add.reduceat(u, np.arange(0, 12, 12 // windows), axis=1)
    assert np.abs(evaluate(construction.model, construction.inputs(u)).out[:, -1] - want).max() < 1e-10
    assert np.allclose(construction.expected(u), want)
