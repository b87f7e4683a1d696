import numpy as np
import pytest
import torch

from mamba_probe.constructions import keep_nth

GRID = [(16, 0), (16, 15), (64, 32), (256, 100), (1024, 0), (1024, 512), (1024, 1023)]


def tokens(length, n_tokens=16, seed=0):
    """Random rows, the token before and after any kept one being another."""
    return (np.random.default_rng(seed).integers(0, n_tokens, (2, 1)) + np.arange(length)) % n_tokens


def native(construction, ids):
    with torch.no_grad():
        return construction.model(construction.inputs(ids))[:, -1].double().numpy()


def one_hot(ids, n, n_tokens=16):
    """Return the code of the n-th token, and two zeros for the position and the constant."""
    return np.eye(n_tokens + 2)[ids[:, n]]


@pytest.mark.parametrize(("length", "n"), GRID)
def test_float64_recurrence_returns_token_n(length, n, evaluate):
    construction, ids = keep_nth(length=length, n=n, dtype=torch.float64), tokens(length)
    assert np.abs(evaluate(construction.model, construction.inputs(ids)).out[:, -1] - one_hot(ids, n)).max() <= 1e-12


@pytest.mark.parametrize(("length", "n"), GRID)
def test_transformers_float32_returns_token_n(length, n):
    construction, ids = keep_nth(length=length, n=n), tokens(length)
    out = native(construction, ids)
    assert np.abs(out - one_hot(ids, n)).max() <= 1e-6
    assert (out[:, :16].argmax(1) == ids[:, n]).all()


@pytest.mark.long
@pytest.mark.parametrize("n", [0, 8192, 16383])
def test_long_sequences(n, evaluate):
    ids = tokens(16384)
    construction = keep_nth(length=16384, n=n, dtype=torch.float64)
    assert np.abs(evaluate(construction.model, construction.inputs(ids)).out[:, -1] - one_hot(ids, n)).max() <= 1e-12
    assert np.abs(native(keep_nth(length=16384, n=n), ids) - one_hot(ids, n)).max() <= 1e-6


def test_expected_is_token_n():
    ids = tokens(64)
    assert np.array_equal(keep_nth(length=64, n=5).expected(ids), one_hot(ids, 5))


@pytest.mark.parametrize(("beta", "noted"), [(8.0, 7.8e-2), (16.0, 1.4e-3), (32.0, 4.6e-7), (64.0, 5.1e-14)])
def test_bound_holds(beta, noted, evaluate):
    construction, ids = keep_nth(length=64, n=32, beta=beta, dtype=torch.float64), tokens(64)
    error = np.abs(evaluate(construction.model, construction.inputs(ids)).out[:, -1] - one_hot(ids, 32)).max()
    assert construction.bound == pytest.approx(noted, rel=0.02)
    assert construction.bound / 4 < error <= construction.bound


def test_delta_erases_up_to_n_and_holds_after_it(evaluate):
    """At beta = 64 and A = -1: e^-96 or less before n, e^-32 at n, 1 after."""
    construction = keep_nth(length=64, n=20, dtype=torch.float64)
    delta = evaluate(construction.model, construction.inputs(tokens(64))).delta[:, :, 0]
    kept = np.exp(-delta)
    assert (construction.model.A_log == 0).all()
    assert kept[:, :20].max() < 3e-42
    assert kept[:, 20] == pytest.approx(np.exp(-32), rel=1e-10)
    assert 1 - kept[:, 21:].min() < 2e-14
    assert -np.log(kept[:, 21:]).sum(1).max() == pytest.approx(1.3e-14, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_randomised_twin_fails(seed):
    ids = tokens(64)
    out = native(keep_nth(length=64, n=20).randomised(seed), ids)
    assert np.abs(out - one_hot(ids, 20)).max() > 0.3


@pytest.mark.parametrize(
    ("name", "index", "factor"),
    [("dt_proj.bias", 3, 0.99), ("A_log", None, None), ("out_proj.weight", None, 0.9), ("x_proj.weight", None, 0.9)],
)
def test_one_broken_weight_breaks_it(name, index, factor):
    construction, ids = keep_nth(length=64, n=32), np.full((1, 64), 3)
    ids[:, 32] = 7
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        if name == "A_log":
            weight[3] = -40.0  # token 3 never decays
        elif index is not None:
            weight[index] *= factor
        else:
            weight[weight != 0] *= factor
    assert np.abs(native(construction, ids) - one_hot(ids, 32)).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 64, "n": 64}, r"0 <= n <= length - 1 \(got n = 64, length = 64\)"),
        ({"n": -1}, r"0 <= n <= length - 1 \(got n = -1"),
        ({"length": 100, "n": 3}, r"length a power of two \(got 100\)"),
        ({"n_tokens": 0}, r"n_tokens >= 1 \(got 0\)"),
        ({"beta": 0.0}, r"beta > 0 and finite \(got 0.0\)"),
        ({"profile": "events"}, r"profile='events' is not supported, expected one of \['ramp', 'event'\]"),
        ({"dtype": torch.float16}, "got torch.float16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_nth(**arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            np.zeros((1, 7), dtype=int),
            r"token_ids must be integers \(batch, token\) with 8 tokens, got int64 of \(1, 7\)",
        ),
        (np.zeros((1, 8)), "got float64"),
        (np.full((1, 8), 16), r"token_ids must be in \[0, 16\), got \[16, 16\]"),
    ],
)
def test_impossible_tokens(ids, message):
    with pytest.raises(ValueError, match=message):
        keep_nth(length=8, n=2).inputs(ids)
