"""The row of hidden attention against the recurrence it sums up, in every parameterisation."""

import numpy as np
import pytest

from mamba_probe.analyses.common import attention, attention_row

TOKENS, HEADS, STATES = 37, 6, 5


def parts(family: str, rng: np.random.Generator):
    n_groups = {"mamba": 1, "mamba2": 2, "s4d": HEADS}[family]
    delta = rng.uniform(0.01, 1.5, (TOKENS, HEADS))
    A = -rng.uniform(0.05, 2.0, (HEADS, 1 if family == "mamba2" else STATES))
    B, C = rng.standard_normal((2, TOKENS, n_groups, STATES))
    if family == "s4d":
        delta[:] = delta[0]
        A = A + 1j * rng.standard_normal(A.shape)
        B, C = (values + 1j * rng.standard_normal(values.shape) for values in (B, C))
        B[:], C[:] = B[0], C[0]
    return delta, A, B, C, np.arange(HEADS) // (HEADS // n_groups)


@pytest.mark.parametrize("zoh", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "s4d"])
def test_weights_times_inputs_are_what_the_recurrence_reads(family: str, zoh: bool) -> None:
    rng = np.random.default_rng(5)
    delta, A, B, C, groups = parts(family, rng)
    x = rng.standard_normal((TOKENS, HEADS))
    h = np.zeros((HEADS, STATES), dtype=complex)
    for t in range(TOKENS):
        z = delta[t][:, None] * A
        write = (np.exp(z) - 1) / A if zoh else delta[t][:, None]
        h = np.exp(z) * h + write * B[t][groups] * x[t][:, None]
    read = (C[-1][groups] * h).sum(1)
    cumulative = np.cumsum(delta, axis=0)
    row = attention_row(delta, cumulative[-1] - cumulative, A, B, C[-1], groups, zoh)
    np.testing.assert_allclose((row * x).sum(0), 2 * read.real if family == "s4d" else read.real, rtol=1e-10)


def test_a_constant_input_vector_stands_for_all_sources() -> None:
    delta, A, B, C, groups = parts("s4d", np.random.default_rng(1))
    elapsed = np.cumsum(delta, axis=0)[::-1]
    whole, one = (attention_row(delta, elapsed, A, given, C[0], groups, True) for given in (B, B[:1]))
    np.testing.assert_array_equal(whole, one)


@pytest.mark.parametrize("tile", [1, 7, 64, 2**14])
@pytest.mark.parametrize("zoh", [False, True])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "s4d"])
def test_tiles_leave_out_nothing_that_float64_holds(family: str, zoh: bool, tile: int, monkeypatch) -> None:
    """Decays from 1 through subnormal numbers to 0, of a source now near and now far: as the formula all at once."""
    rng = np.random.default_rng(2)
    delta, A, B, C, groups = parts(family, rng)
    A[1:3] *= 400  # these die within a few tokens
    A[0] = A[0].imag * 1j if family == "s4d" else 0.0  # and this never
    elapsed = rng.permutation(np.cumsum(delta, axis=0)[::-1] * 30)
    exponent = elapsed[..., None] * A
    write = np.expm1(delta[..., None] * A) / np.where(A == 0, 1, A) if zoh else delta[..., None]
    write = np.where(A == 0, delta[..., None], write)
    terms = np.exp(exponent) * write * (B * C[0])[:, groups]
    whole = terms.sum(axis=-1)
    assert ((np.abs(np.exp(exponent)) < 1e-308) & (exponent.real > -745)).any()
    monkeypatch.setattr(attention, "TILE", tile)
    row = attention_row(delta, elapsed, A, B, C[0], groups, zoh)
    wanted = 2 * whole.real if family == "s4d" else whole
    np.testing.assert_array_less(np.abs(row - wanted), 1e-13 * np.abs(terms).sum(axis=-1) + 1e-320)
    alive = (exponent.real > -700).any(axis=-1)
    assert (row[alive] != 0).all()
    assert (row[(exponent.real < -746).all(axis=-1)] == 0).all()


def test_the_smallest_number_of_float64_is_kept() -> None:
    one = np.ones((2, 1, 1))
    row = attention_row(one[:, 0], np.array([[745.1], [0.0]]), -one[0], one, one[0], np.array([0]))
    assert row.ravel().tolist() == [5e-324, 1.0]
