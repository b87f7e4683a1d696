"""The Haar block in Mamba-2, ramps alone: one head a ramp, no norm; against pywt and a recurrence written out here."""

import numpy as np
import pytest
import pywt
import torch
from scipy.special import expit

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.constructions import haar, window_sums

FLOAT64 = {64: 1.6e-14, 256: 2.2e-12, 1024: 2.7e-12}  # relative errors that were given, levels = 3, beta = 128
FLOAT32 = {64: 6.4e-5, 256: 1.6e-4, 1024: 4.8e-3}


def build(length=64, levels=3, beta=128.0, dtype=torch.float64):
    return haar(length, levels, beta, "ramps", dtype, mixer="mamba2")


def noise(length, batch=33):
    return np.random.default_rng(0).standard_normal((batch, length))


def recurrence(construction, u):
    """The block token by token in float64: what it returns last, and delta (batch, token, head)."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in construction.model.state_dict().items()}
    hidden, heads = np.asarray(construction.inputs(u), np.float64), w["A_log"].size
    n_channel, taps = 2 * heads, w["conv1d.weight"][:, 0]
    window, h, deltas = np.zeros((len(u), *taps.shape)), np.zeros((len(u), heads, 2)), []
    for t in range(u.shape[1]):
        z, xbc, dt = np.split(hidden[:, t] @ w["in_proj.weight"].T, [n_channel, 2 * n_channel + 2], axis=1)
        window = np.concatenate([window[..., 1:], xbc[..., None]], axis=-1)
        xbc = (window * taps).sum(-1) + w["conv1d.bias"]
        x, b, c = np.split(xbc * expit(xbc), [n_channel, n_channel + 1], axis=1)
        deltas.append(np.logaddexp(0, dt + w["dt_bias"]))
        step = deltas[-1][..., None]
        h = np.exp(-np.exp(w["A_log"])[:, None] * step) * h + step * b[:, None] * x.reshape(h.shape)
    y = (h * c[:, None] + w["D"][:, None] * x.reshape(h.shape)).reshape(len(u), n_channel)
    return (y * z * expit(z)) @ w["out_proj.weight"].T, np.stack(deltas, axis=1)


def coefficients(u, levels):
    bands = [pywt.wavedec(row, "haar", level=int(np.log2(row.size))) for row in u]
    return np.stack([np.concatenate(band[: levels + 1]) for band in bands])


def last(construction, u, backend="cpu"):
    construction.model.backend = backend
    with torch.no_grad():
        return construction.model(construction.inputs(u))[:, -1].double().numpy()


def relative(got, want):
    """Return the lower quartile over rows of the largest error relative to the row's largest value."""
    return np.quantile(np.abs(got - want).max(1) / np.abs(want).max(1), 0.25)


@pytest.mark.parametrize("length", FLOAT64)
def test_float64_is_within_three_times_the_error_given(length):
    construction, u = build(length), noise(length)
    want = coefficients(u, 3)
    assert relative(recurrence(construction, u)[0], want) <= 3 * FLOAT64[length]
    assert relative(last(construction, u), want) <= 3 * FLOAT64[length]
    assert np.allclose(construction.expected(u), want, atol=1e-13)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("length", FLOAT32)
def test_float32_is_within_three_times_the_error_given(length, backend):
    construction, u = build(length, dtype=torch.float32), noise(length)
    assert relative(last(construction, u, backend), coefficients(u, 3)) <= 3 * FLOAT32[length]


def test_the_block_is_ours_and_has_no_norm():
    construction = build()
    assert type(construction.model) is blocks.Mamba2Block
    assert repr(construction) == "Construction(haar ramps: Mamba2Block, model=8, channel=30, state=1, head=15, float64)"
    assert "norm.weight" not in construction.model.state_dict()
    assert len(construction.channels) == 30
    assert construction.channels[:2] == ["u in sum [0, 64)", "-u in sum [0, 64)"]
    assert "There is no norm before it" in construction.describe()


def test_with_the_norm_the_coefficients_lose_their_size():
    construction, u = build(), noise(64, 4)
    normed = blocks.Mamba2Block(8, n_heads=15, d_inner=30, d_state=1).double()
    normed.load_state_dict({"norm.weight": torch.ones(30), **construction.model.state_dict()})
    with torch.no_grad():
        once, ten = (normed(construction.inputs(factor * u))[:, -1].numpy() for factor in (1, 10))
    assert np.allclose(10 * last(construction, u), last(construction, 10 * u), rtol=1e-8)
    assert np.abs(ten).max() < 2 * np.abs(once).max()


@pytest.mark.parametrize("beta", [8.0, 16.0, 32.0])
def test_bound_holds_and_is_tight(beta):
    """The output is linear in u: the worst u sums the absolute errors of a kernel."""
    construction = build(32, 2, beta)
    worst = np.abs(recurrence(construction, np.eye(32))[0] - coefficients(np.eye(32), 2)).sum(0).max()
    assert construction.bound / 3 < worst <= construction.bound


@pytest.mark.parametrize(("length", "levels"), [(2, 1), (8, 1), (8, 3), (64, 2)])
def test_small_sizes(length, levels):
    construction, u = build(length, levels), noise(length, 3)
    assert np.abs(recurrence(construction, u)[0] - construction.expected(u)).max() < 1e-10
    assert not construction.expected(u)[:, 2**levels :].any()


@pytest.mark.parametrize("length", [64, 256])
def test_read_out_turns_the_heads_kernels_into_haar_functions(length):
    """With B = C = 1 and no decay the kernel of a head is its delta."""
    construction = build(length)
    kernels = construction.read_out @ recurrence(construction, noise(length, 1))[1][0].T
    basis = coefficients(np.eye(length), 3).T
    assert np.abs(kernels - basis).max() < 1e-10


def test_sums_of_windows():
    construction, u = window_sums(1000, 8, 96.0, "ramps", torch.float64, mixer="mamba2"), noise(1000, 3)
    want = u.reshape(3, 8, 125).sum(-1)
    assert np.abs(last(construction, u) - want).max() < 1e-8
    assert np.allclose(construction.expected(u), want)
    assert construction.name == "window_sums ramps"


def test_it_loads_from_a_directory(tmp_path):
    construction, u = build(dtype=torch.float32), noise(64, 3)
    loaded = mp.load(construction.save(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(construction.inputs(u)), construction.model(construction.inputs(u)))


def test_randomised_twin_fails():
    construction, u = build(), noise(64, 3)
    assert relative(last(construction.randomised(3), u), construction.expected(u)) > 0.3


@pytest.mark.parametrize("name", ["in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "out_proj.weight"])
def test_one_broken_weight_breaks_it(name):
    construction, u = build(beta=64.0), noise(64, 3)
    assert relative(last(construction, u), construction.expected(u)) < 1e-7
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] = 0
    assert relative(last(construction, u), construction.expected(u)) > 1e-3


@pytest.mark.parametrize("call", [haar, window_sums])
@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("flat-x", "variant='flat-x' is not offered with mixer='mamba2': its delta needs silu features, which dt of"),
        ("flat-B", "variant='flat-B' is not offered with mixer='mamba2': its delta needs silu features, which dt of"),
        ("delta", "variant='delta' is not offered with mixer='mamba2'; use variant=\"ramps\", or mixer=\"mamba1\""),
        ("decay", "variant='decay' is not offered with mixer='mamba2'; use variant=\"ramps\", or mixer=\"mamba1\""),
        ("ramp", r"variant='ramp' is not supported, .*did you mean 'ramps'\?"),
    ],
)
def test_other_variants_are_refused(call, variant, message):
    with pytest.raises(ValueError, match=f"^{call.__name__}: {message}"):
        call(variant=variant, mixer="mamba2")


def test_other_mixers_are_refused():
    with pytest.raises(ValueError, match=r"haar: mixer='s4d' is not supported, expected one of \['mamba1', 'mamba2'\]"):
        haar(mixer="s4d")
