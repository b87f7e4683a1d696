"""Scans at the ends of float32: no NaN where the mathematics has none, and the bounds of docs/numerics.md."""

import math

import numpy as np
import pytest
import torch

from mamba_probe.kernels.scan import Emit, cpu_compile, selective_scan

FAMILIES = ("mamba1", "mamba2", "s4d")
VARIANTS = ("euler", "zoh", "softplus", "softplus, limits", "log_decay", "seq_idx")


def scan(backend):
    return lambda emit=(), **given: selective_scan(**given, emit=Emit(emit), backend=backend)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_finite_and_right(stress, family, variant, backend):
    assert not stress.answered(scan(backend), family, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_and_right(stress, family, variant):
    assert not stress.differentiated(stress.through(scan("cpu")), family, variant)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_specification(stress, family, variant):
    assert not stress.differentiated(stress.through(scan("naive")), family, variant)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch asks, and hides it
@pytest.mark.parametrize("family", ["mamba1", "s4d"])
def test_the_compiled_loop(stress, family):
    with cpu_compile("always"):
        assert not stress.answered(scan("cpu"), family, "euler")
        assert not stress.differentiated(stress.through(scan("cpu")), family, "euler")


def test_the_interpreted_kernels(interpreted):
    lines = interpreted("interpreted_stress.py", "mamba2", "log_decay")
    assert lines == ["held mamba2 log_decay answers", "held mamba2 log_decay gradients"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_interpreted_kernels_on_the_whole_grid(interpreted, family, variant):
    lines = interpreted("interpreted_stress.py", family, variant)
    assert lines
    assert all(line.startswith("held") for line in lines), lines


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_stands_still_and_is_reset_exactly(stress, family, backend):
    stress.stands_still(scan(backend), family)
    stress.is_reset(scan(backend), family)


def test_a_planted_fault_is_seen(stress):
    """One denormal lost, one NaN, or one digit in 2^-17 of one case alone."""
    given = stress.draw("mamba1", "euler")
    wanted, cases = stress.exact(**given), stress.names("mamba1", "euler")
    for case, fault in (("denormal x", 0.0), ("delta 1e4", math.nan), ("x 1e30", 1 + 2.0**-16)):
        h = torch.from_numpy(wanted["h"].astype(np.float32))
        at = slice(*(stress.HEADS * (cases.index(case) + i) for i in (0, 1)))
        h[:, :, at] *= fault
        assert set(stress.violations({"h": h}, wanted, "mamba1", cases)) == {(case, "h")}


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("n_token", [4096, pytest.param(2**20, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_a_geometric_series(stress, scalar, n_token, rate):
    stress.is_geometric(scan("cpu"), scalar, n_token, rate)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("n_token", [4096, pytest.param(2**20, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_delta_cumsum_loses_nothing(stress, scalar, n_token):
    """Of a million steps over nine orders of magnitude, against math.fsum: float64 to the end."""
    delta = 10 ** (9 * torch.rand(1, n_token, 1, generator=torch.Generator().manual_seed(0)) - 6)
    given = stress.constant(scalar, n_token, 1.0) | {"delta": delta}
    found = selective_scan(**given, emit=Emit(("delta_cumsum",), tokens=[n_token - 1]), backend="cpu")
    exact = math.fsum(delta.double().flatten().tolist())
    assert abs(found.emission.delta_cumsum.item() - exact) <= n_token * 2.0**-53 * exact


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zoh_past_the_range_of_delta_A(stress, family, backend):
    """B_bar is -B / A, though delta A = -1e40 is no float32."""
    given = stress.draw(family, "zoh", 4) | {"discretization": "zoh"}
    given["delta"] = torch.full_like(given["delta"], 1e10)
    given["A"] = torch.full_like(given["A"], -1e30)
    found = scan(backend)(("B_bar", "A_bar"), **given).emission
    B = given["B"].expand(1, 4, *given["B"].shape[-2:]).repeat_interleave(stress.HEADS, 2)
    torch.testing.assert_close(found.B_bar, B / 1e30, rtol=1e-6, atol=0)
    assert not found.A_bar.any()


def test_what_is_past_float32_is_not_finite_and_stays_in_its_head(stress):
    """delta x = 1e42 is no float32; other heads do not see it, and neither do tokens before it of A (head, state)."""
    given = stress.draw("mamba1", "euler")
    plain = selective_scan(**given).y
    given["x"][:, 20, 0], given["delta"][:, 20, 0] = 1e38, 1e4
    found = selective_scan(**given).y
    assert not found[:, 20, 0].isfinite().all()
    assert torch.equal(found[:, :, 1:], plain[:, :, 1:])
    assert torch.equal(found[:, :20, 0], plain[:, :20, 0])


def test_matrix_products_need_C_B_in_range(stress):
    """Of A (head,), C_t B_s is a float32 of its own: 1e60 is none, though (B x) C is; naive takes it."""
    given = {name: value * 1.0 for name, value in stress.constant(True, 3, 1.0).items()}
    given |= {"x": given["x"] * 1e-30, "B": given["B"] * 1e30, "C": given["C"] * 1e30}
    assert selective_scan(**given, backend="naive").y.isfinite().all()
    assert not selective_scan(**given, backend="cpu").y.isfinite().any()
