"""The row of hidden attention against the recurrence it sums up, in every parameterisation."""

import numpy as np
import pytest

from mamba_probe.analyses.common import attention_row

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
