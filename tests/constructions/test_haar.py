import numpy as np
import pytest
import pywt
import torch

from mamba_probe.constructions import haar

GRID = [(8, 1), (8, 3), (64, 3), (256, 3), (256, 5), (1024, 3)]


def signal(length, batch=3, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length))


def coefficients(u, levels):
    """pywt's 2^levels coarsest coefficients of each row, one row and one level at a time."""
    full = [pywt.wavedec(row, "haar", level=int(np.log2(row.size))) for row in u]
    return np.stack([np.concatenate(bands[: levels + 1]) for bands in full])


def relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def native(construction, u):
    with torch.no_grad():
        return construction.model(construction.inputs(u))[:, -1].double().numpy()


@pytest.mark.parametrize(("length", "levels"), GRID)
def test_float64_recurrence_equals_pywt(length, levels, evaluate):
    construction, u = haar(length, levels, dtype=torch.float64), signal(length)
    out = evaluate(construction.model, construction.inputs(u)).out[:, -1]
    assert relative(out[:, : 2**levels], coefficients(u, levels)) <= 1e-12
    assert not out[:, 2**levels :].any()


@pytest.mark.parametrize(("length", "levels"), GRID)
def test_transformers_float32_equals_pywt(length, levels):
    construction, u = haar(length, levels), signal(length)
    assert relative(native(construction, u)[:, : 2**levels], coefficients(u, levels)) <= 1e-6


def test_expected_is_pywt():
    u = signal(64)
    assert relative(haar(64, 3).expected(u), coefficients(u, 3)) < 1e-15


@pytest.mark.parametrize("beta", [1.0, 4.0, 8.0, 16.0])
def test_bound_holds_and_is_tight(beta, evaluate):
    """The output is linear in u: the worst u of at most 1 meets the sum of the absolute errors of a kernel."""
    length, levels = 32, 2
    construction = haar(length, levels, beta, dtype=torch.float64)
    kernels = evaluate(construction.model, construction.inputs(np.eye(length))).out[:, -1].T
    worst = np.abs(kernels - coefficients(np.eye(length), levels).T).sum(1).max()
    assert worst <= construction.bound
    if beta >= 8:
        assert worst > construction.bound / 3


def test_small_beta_misses_the_tolerance(evaluate):
    construction, u = haar(256, 3, beta=16.0, dtype=torch.float64), signal(256)
    assert relative(evaluate(construction.model, construction.inputs(u)).out[:, -1], coefficients(u, 3)) > 1e-5


def test_delta_is_one_in_its_window_and_zero_outside(evaluate):
    construction = haar(64, 2, dtype=torch.float64)
    delta = evaluate(construction.model, construction.inputs(signal(64, batch=1))).delta[0]
    for sign in ("u", "-u"):
        for k in range(4):
            channel = construction.channels.index(f"window of {sign} [{16 * k}, {16 * k + 16})")
            window = np.zeros(64)
            window[16 * k : 16 * k + 16] = 1
            assert np.abs(delta[:, channel] - window).max() < 1e-9
            assert np.ptp(delta[window == 1, channel]) < 1e-12


@pytest.mark.parametrize(("length", "levels"), [(64, 3), (256, 3)])
def test_read_out_turns_channel_kernels_into_haar_functions(length, levels, evaluate):
    """With B = C = 1 and no decay a channel's kernel is its delta: read_out @ delta is the basis, at cosine 1."""
    construction = haar(length, levels, dtype=torch.float64)
    delta = evaluate(construction.model, construction.inputs(np.zeros((1, length)))).delta[0]
    basis = coefficients(np.eye(length), levels).T
    kernels = construction.read_out @ delta.T
    assert np.abs(kernels - basis).max() < 1e-12
    cosine = (kernels * basis).sum(1) / np.linalg.norm(kernels, axis=1)
    assert np.abs(1 - cosine).max() < 1e-12


def test_channels_are_named():
    construction = haar(64, 2)
    assert len(construction.channels) == 16 == construction.read_out.shape[1]
    assert construction.channels[:3] == ["ramp down 16", "ramp down 32", "ramp down 48"]
    assert construction.channels[-2:] == ["one", "padding"]
    assert "4 x window of u, 4 x window of -u" in construction.describe()


@pytest.mark.parametrize("seed", range(3))
def test_randomised_twin_fails(seed):
    u = signal(256)
    assert relative(native(haar().randomised(seed), u), coefficients(u, 3)) > 0.3


@pytest.mark.parametrize("name", ["in_proj.weight", "conv1d.bias", "dt_proj.weight", "out_proj.weight"])
def test_one_broken_weight_breaks_it(name):
    construction, u = haar(64, 3), signal(64)
    assert relative(native(construction, u), coefficients(u, 3)) < 1e-6
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] = 0
    assert relative(native(construction, u), coefficients(u, 3)) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 100}, r"length a power of two \(got 100\)"),
        ({"length": 0}, r"length a power of two \(got 0\)"),
        ({"length": 8, "levels": 4}, r"2\*\*levels <= length \(got 2\*\*4 > 8\)"),
        ({"levels": 0}, r"levels >= 1 \(got 0\)"),
        ({"beta": -1.0}, r"beta > 0 and finite \(got -1.0\)"),
        ({"beta": float("nan")}, r"beta > 0 and finite \(got nan\)"),
        ({"variant": "A"}, r"variant='A' is not supported, expected one of \['flat-x'"),
        ({"dtype": torch.bfloat16}, "expected torch.float32 or torch.float64, got torch.bfloat16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        haar(**arguments)


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (np.zeros((1, 7)), r"u must be \(batch, token\) with 8 tokens, got shape \(1, 7\)"),
        (np.zeros(8), r"got shape \(8,\)"),
        (np.full((1, 8), np.nan), "not finite"),
    ],
)
def test_impossible_signals(u, message):
    construction = haar(8, 2)
    with pytest.raises(ValueError, match=message):
        construction.inputs(u)
    with pytest.raises(ValueError, match=message):
        construction.expected(u)
