"""keep_nth with a marker at the kept token: the same answer as the ramp's, from another profile of decay."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import keep_nth

GRID = [(1, 0), (16, 15), (100, 37), (1024, 0), (1024, 512), (4096, 2048)]


def build(length, n, beta=40.0, dtype=torch.float64):
    return keep_nth(length=length, n=n, beta=beta, profile="event", dtype=dtype)


def tokens(length, n_tokens=16):
    return (np.array([[3], [11]]) + np.arange(length)) % n_tokens


def one_hot(ids, n, n_tokens=16):
    return np.eye(n_tokens + 2)[ids[:, n]]


def last(construction, ids, evaluate):
    return evaluate(construction.model, construction.inputs(ids)).out[:, -1]


@pytest.mark.parametrize(("length", "n"), GRID)
def test_float64_recurrence_returns_token_n(length, n, evaluate):
    construction, ids = build(length, n), tokens(length)
    error = np.abs(last(construction, ids, evaluate) - one_hot(ids, n)).max()
    assert error <= construction.bound + 4e-16  # the rounding of 1
    assert np.array_equal(construction.expected(ids), one_hot(ids, n))


@pytest.mark.parametrize(("length", "n"), GRID[:-1])
@pytest.mark.parametrize("beta", [40.0, 64.0])
def test_transformers_float32_returns_token_n(length, n, beta):
    construction, ids = build(length, n, beta, torch.float32), tokens(length)
    with torch.no_grad():
        out = construction.model(construction.inputs(ids))[:, -1].double().numpy()
    assert np.abs(out - one_hot(ids, n)).max() <= 1e-6


@pytest.mark.parametrize("beta", [8.0, 16.0, 24.0])
def test_bound_holds_and_is_tight(beta, evaluate):
    """T e^-M / M + T e^-M, met when the first token is the kept one."""
    construction, ids = build(64, 0, beta), np.r_[7, np.full(63, 2)][None]
    error = np.abs(last(construction, ids, evaluate) - one_hot(ids, 0)).max()
    assert construction.bound == pytest.approx(64 * np.exp(-beta) * (1 / beta + 1))
    assert construction.bound / 2 < error <= construction.bound


def test_decay_is_one_everywhere_but_at_n(evaluate):
    construction = build(64, 20)
    kept = np.exp(-evaluate(construction.model, construction.inputs(tokens(64))).delta)
    assert (construction.model.A_log == 0).all()
    assert kept[:, 20].max() < 5e-18
    assert 1 - np.delete(kept, 20, axis=1).min() < 1e-16


def test_it_is_the_marker_that_is_kept(evaluate):
    """The marker moved by hand to another token: that one comes out."""
    construction, ids = build(64, 20), tokens(64)
    hidden = construction.inputs(ids)
    hidden[:, 20, 16], hidden[:, 45, 16] = 0, 1
    assert np.abs(evaluate(construction.model, hidden).out[:, -1] - one_hot(ids, 45)).max() < 1e-14


def test_it_describes_itself():
    construction = build(64, 20)
    assert "16 x token, 1 x marker, 1 x one" in construction.describe()
    assert "marker s_t = 1 at token n" in construction.describe()
    assert repr(construction).startswith("Construction(keep_nth event: MambaMixer, model=18")


def test_randomised_twin_fails(evaluate):
    construction, ids = build(64, 20), tokens(64)
    assert np.abs(last(construction.randomised(1), ids, evaluate) - one_hot(ids, 20)).max() > 0.3


@pytest.mark.parametrize(
    "name", ["in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight"]
)
def test_one_broken_weight_breaks_it(name, evaluate):
    construction, ids = build(64, 20), tokens(64)
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        weight *= 0.9
    assert np.abs(last(construction, ids, evaluate) - one_hot(ids, 20)).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0, "n": 0}, r"length >= 1 \(got 0\)"),
        ({"length": 100, "n": 100}, r"0 <= n <= length - 1 \(got n = 100, length = 100\)"),
        ({"beta": float("inf")}, r"beta > 0 and finite \(got inf\)"),
        ({"n_tokens": 0}, r"n_tokens >= 1 \(got 0\)"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_nth(profile="event", **arguments)
