"""Limits of time-invariant kernels: bounds by sums and brute force, fits against them, the rates of a jump."""

import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import pywt
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.analyses import lti_limits
from mamba_probe.analyses.lti_limits import core, fits

STATES = (4, 8, 16, 32, 64)
STEP_BOUND = (0.1587, 0.1125, 0.0796, 0.0563, 0.0398)
STEP_FITS = {
    "s4d_real": (0.2692, 0.1971, 0.1459, 0.1311, 0.1270),
    "s4d_lin": (0.2577, 0.1855, 0.1325, 0.0942, 0.0706),
    "fourier": (0.2229, 0.1587, 0.1125, 0.0795, 0.0562),
    "optimised": (0.1865, 0.1250, 0.0858, 0.0656, 0.0477),
}
WITHIN = {"s4d_real": 0.05, "s4d_lin": 0.02, "fourier": 0.02, "optimised": 0.02}


def step(n_lags: int, at: float = 0.5) -> np.ndarray:
    return ((np.arange(n_lags) + 0.5) / n_lags < at).astype(float)


def spike(n_lags: int, lag: int) -> np.ndarray:
    return np.eye(n_lags)[lag]


def exponentials(n_modes: int, n_lags: int, seed: int) -> np.ndarray:
    """A real kernel of exactly `n_modes` exponentials, from a recurrence: no call to exp."""
    generator = np.random.default_rng(seed)
    state, decay = generator.standard_normal(n_modes), generator.uniform(-1.0, 1.0, n_modes)
    found = []
    for _ in range(n_lags):
        found.append(state.sum())
        state = decay * state
    return np.array(found)


def haar_wavelets(n_lags: int, levels: int) -> np.ndarray:
    """The 2^levels - 1 coarsest wavelets in the order of wavedec."""
    found = []
    empty = [np.zeros_like(part) for part in pywt.wavedec(np.zeros(n_lags), "haar")]
    for level in range(1, levels + 1):
        for shift in range(len(empty[level])):
            parts = [part.copy() for part in empty]
            parts[level][shift] = 1.0
            found.append(pywt.waverec(parts, "haar"))
    return np.array(found)


def brute_bound(kernel: np.ndarray, n_states: int) -> float:
    """The bound with the Hankel matrix written out entry by entry and the whole spectrum summed."""
    p = (len(kernel) + 1) // 2
    q = len(kernel) + 1 - p
    matrix = np.array([[kernel[i + j] for j in range(q)] for i in range(p)])
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix @ matrix.T)[::-1], 0.0))
    return float(np.sqrt(np.sum(sigma[n_states:] ** 2) / min(p, q)) / np.linalg.norm(kernel))


# ---- bounds


def test_step_bound_is_the_sum_it_stands_for_and_the_printed_row() -> None:
    n = np.arange(1, 2_000_001)
    for count, printed in zip(STATES, STEP_BOUND, strict=True):
        tail = np.sum((2.0 * n[count:] - 1) ** -2) + 1 / (4 * n[-1])
        found = core.step_lower_bound([count])[0]
        assert found == pytest.approx(2 / np.pi * np.sqrt(tail), rel=1e-9)
        assert round(float(found), 4) == printed
    assert core.step_lower_bound([0])[0] == pytest.approx(np.sqrt(0.5))
    assert core.step_lower_bound([10_000])[0] == pytest.approx(1 / (np.pi * 100), rel=1e-4)


def test_hankel_bound_of_a_sampled_step_tends_to_the_closed_form() -> None:
    found = core.hankel_lower_bound(step(1024), STATES, subranges=False)
    np.testing.assert_allclose(found, core.step_lower_bound(STATES), rtol=6e-3)
    assert np.polyfit(np.log(STATES), np.log(found), 1)[0] == pytest.approx(-0.5, abs=0.01)


@pytest.mark.parametrize("n_lags", [2, 3, 8, 21])
def test_hankel_bound_agrees_with_brute_force(n_lags: int) -> None:
    kernel = np.random.default_rng(n_lags).standard_normal(n_lags)
    counts = list(range(n_lags))
    found = core.hankel_lower_bound(kernel, counts, subranges=False)
    np.testing.assert_allclose(found, [brute_bound(kernel, n) for n in counts], atol=1e-7)


def test_subranges_are_bounds_of_the_parts() -> None:
    kernel = np.random.default_rng(3).standard_normal(32)
    energy = np.linalg.norm(kernel)
    parts = [(start, size) for size in (32, 16, 8, 4) for start in range(0, 33 - size, size // 4)]
    for count in (0, 1, 3, 7):
        by_hand = []
        for start, size in parts:
            part = kernel[start : start + size]
            by_hand.append(brute_bound(part, count) * np.linalg.norm(part) / energy)
        assert core.hankel_lower_bound(kernel, [count])[0] == pytest.approx(max(by_hand), abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_lags=st.integers(8, 40), n_modes=st.integers(1, 4), subranges=st.booleans())
def test_no_sum_of_exponentials_goes_below_the_bound(seed: int, n_lags: int, n_modes: int, subranges: bool) -> None:
    generator = np.random.default_rng(seed)
    kernel = generator.standard_normal(n_lags)
    exponent = generator.uniform(-30, 5, n_modes) + 1j * generator.uniform(-50, 50, n_modes)
    bound = core.hankel_lower_bound(kernel, [n_modes], subranges=subranges)[0]
    assert fits.project(kernel, exponent).error >= bound - 1e-12
    assert fits.fit_optimised(kernel, n_modes, seed).error >= bound - 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_modes=st.integers(1, 6), scale=st.sampled_from([1e-200, 1.0, 1e200]))
def test_exponentials_are_never_excluded_whatever_their_scale(seed: int, n_modes: int, scale: float) -> None:
    kernel = exponentials(n_modes, 64, seed)
    np.testing.assert_allclose(core.hankel_lower_bound(kernel * scale, [n_modes]), 0.0, atol=1e-12)
    assert core.lti_order(kernel * scale) <= n_modes
    assert core.lti_order(kernel * scale) == core.lti_order(kernel)


def test_bound_never_rises_with_states_and_ends_at_zero() -> None:
    found = core.hankel_lower_bound(np.random.default_rng(0).standard_normal(50), range(80))
    assert np.all(np.diff(found) <= 0)
    assert found[0] <= 1.0
    assert found[25:].max() == 0.0


@pytest.mark.parametrize(("n_tokens", "lag"), [(64, 31), (64, 5), (33, 32), (40, 0)])
def test_keep_bound_is_the_hankel_bound_of_the_best_range(n_tokens: int, lag: int) -> None:
    reach = min(lag + 1, n_tokens - lag)
    around = spike(n_tokens, lag)[lag - reach + 1 : lag + reach]
    for count in range(1, reach + 2):
        expected = np.sqrt(max(1 - count / reach, 0))
        assert core.keep_lower_bound(n_tokens, lag, [count])[0] == pytest.approx(expected)
        if len(around) > 1:
            assert core.hankel_lower_bound(around, [count], subranges=False)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("n_tokens", "counts", "measured", "bound"), [
    (64, (4, 16, 64), (0.968, 0.853, 0.0), (0.935, 0.707, 0.0)),
    pytest.param(256, (4, 16, 64, 256), (0.992, 0.968, 0.853, 0.0), (0.984, 0.935, 0.707, 0.0), marks=pytest.mark.long),
])  # fmt: skip
def test_keeping_one_token_needs_as_many_states_as_tokens(
    n_tokens: int, counts: tuple[int, ...], measured: tuple[float, ...], bound: tuple[float, ...]
) -> None:
    kernel = spike(n_tokens, n_tokens // 2 - 1)
    least = core.keep_lower_bound(n_tokens, n_tokens // 2 - 1, counts)
    assert least.round(3).tolist() == list(bound)
    np.testing.assert_allclose(core.hankel_lower_bound(kernel, counts), least, atol=1e-12)
    for count, low, high in zip(counts, least, measured, strict=True):
        assert low - 1e-12 <= fits.fit_optimised(kernel, count).error <= high + 5e-4


# ---- orders


def test_lti_order_of_the_wavelets_and_of_real_kernels() -> None:
    assert [core.lti_order(w) for w in haar_wavelets(256, 3)] == [20, 20, 20, 18, 43, 43, 18]
    generator = np.random.default_rng(0)
    orders = []
    for _ in range(20):
        rate = np.exp(generator.uniform(np.log(1e-3), np.log(0.1))) * np.arange(1, 17)
        kernel = np.exp(-np.outer(np.arange(256), rate)) @ generator.standard_normal(16)
        orders.append(core.lti_order(kernel))
    assert np.median(orders) <= 2
    assert max(orders) <= 3


def test_lti_order_is_the_first_count_that_the_bound_admits() -> None:
    kernel = step(128, 1 / 3)
    bound = core.hankel_lower_bound(kernel, range(65))
    for error in (0.5, 0.1, 0.03):
        order = core.lti_order(kernel, error)
        assert bound[order] <= error < bound[order - 1]


# ---- fits


@pytest.mark.parametrize("name", [name for name in STEP_FITS if name != "optimised"])
def test_fits_of_the_step_reach_the_printed_rates(name: str) -> None:
    found = [fits.FITS[name](step(512), count).error for count in STATES]
    np.testing.assert_allclose(found, STEP_FITS[name], rtol=WITHIN[name])
    modes = np.array(STATES) + (name == "fourier")
    assert np.all(found >= core.hankel_lower_bound(step(512), modes))


@pytest.mark.long
@pytest.mark.parametrize("n_lags", [256, 1024])
def test_optimised_modes_of_the_step_lie_between_the_bound_and_the_printed_row(n_lags: int) -> None:
    counts = STATES if n_lags == 1024 else STATES[:4]
    found = [fits.fit_optimised(step(n_lags), count).error for count in counts]
    assert np.all(found >= core.hankel_lower_bound(step(n_lags), counts))
    assert np.all(found <= np.array(STEP_FITS["optimised"][: len(counts)]) * 1.005)


def test_fourier_is_the_partial_sum_of_a_square_wave() -> None:
    for count in STATES[:3]:
        j = np.arange(1, 200_001)
        missed = np.sum((2.0 * j[count // 2 :] - 1) ** -2) * 8 / np.pi**2 / 2
        assert fits.fit_fourier(step(2048), count).error == pytest.approx(np.sqrt(missed), rel=2e-3)


@pytest.mark.parametrize("name", fits.FITS)
def test_a_fit_says_the_error_of_its_own_kernel(name: str) -> None:
    target = np.random.default_rng(1).standard_normal(48)
    fit = fits.FITS[name](target, 6)
    assert len(fit.exponent) == 6 + (name == "fourier")
    assert fit.error == pytest.approx(np.linalg.norm(target - fit.kernel) / np.linalg.norm(target))
    columns = np.stack([np.exp(exponent * np.arange(48) / 48) for exponent in fit.exponent], axis=1)
    again = columns @ np.linalg.lstsq(columns, target.astype(complex), rcond=1e-13)[0]
    np.testing.assert_allclose(
        fit.kernel, again, atol=1e-3 if name == "s4d_real" else 1e-6
    )  # real decays: condition 1e10


@pytest.mark.parametrize("name", fits.FITS)
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_errors_do_not_depend_on_scale(name: str, scale: float) -> None:
    target = step(32, 0.3)
    fit = fits.FITS[name](target * scale, 4)
    assert fit.error == pytest.approx(fits.FITS[name](target, 4).error, rel=1e-4)
    missed = np.linalg.norm(fit.kernel / scale - target) / np.linalg.norm(target)
    assert missed == pytest.approx(fit.error, rel=1e-6)
    assert core.n_term_haar(target * scale, [3])[0] == pytest.approx(core.n_term_haar(target, [3])[0])


def test_optimised_finds_planted_modes_and_repeats() -> None:
    exponent = np.array([-1.0 + 7j, -1.0 - 7j, -4.0 + 40j, -4.0 - 40j])
    target = (np.exp(np.outer(np.arange(64) / 64, exponent)) @ np.array([1 - 1j, 1 + 1j, 0.5j, -0.5j])).real
    found = fits.fit_optimised(target, 4)
    assert found.error < 1e-10
    np.testing.assert_allclose(np.sort_complex(found.exponent), np.sort_complex(exponent), atol=1e-6)
    noisy = target + 0.1 * np.random.default_rng(0).standard_normal(64)
    assert fits.fit_optimised(noisy, 4, seed=3).error == fits.fit_optimised(noisy, 4, seed=3).error


def test_optimised_exponents_are_a_local_minimum() -> None:
    target = step(64, 0.3)
    best = fits.fit_optimised(target, 4)
    generator = np.random.default_rng(0)
    for _ in range(50):
        move = 1e-2 * (generator.standard_normal(4) + 1j * generator.standard_normal(4))
        assert fits.project(target, best.exponent + move).error >= best.error - 1e-7


def test_pieces_and_a_smooth_signal_with_a_jump_keep_the_rate_of_a_jump() -> None:
    """Within 3 of rates measured on other random pieces and another jump of the same kind."""
    level = np.random.default_rng(0).standard_normal(8)
    pieces = np.repeat(level, 64)
    bound = core.hankel_lower_bound(pieces, STATES)
    fourier = np.array([fits.fit_fourier(pieces, count).error for count in STATES])
    assert np.all((bound > np.array([0.274, 0.169, 0.120, 0.086, 0.060]) / 3) & (bound < fourier))
    ratio = fourier / np.array([0.604, 0.544, 0.350, 0.244, 0.176])
    assert np.all((ratio > 1 / 3) & (ratio < 3))
    at = (np.arange(512) + 0.5) / 512
    jump = np.sin(2 * np.pi * at) + (at >= 1 / 3)
    haar = core.n_term_haar(jump, (6, 10, 18, 34, 66))
    ratio = haar / np.array([0.259, 0.165, 0.104, 0.050, 0.025])
    assert np.all((ratio > 1 / 3) & (ratio < 3))
    assert np.polyfit(np.log((6, 10, 18, 34, 66)), np.log(haar), 1)[0] == pytest.approx(-0.98, abs=0.15)


# ---- Haar


def test_n_term_haar_is_brute_force_over_subsets_of_the_basis() -> None:
    signal = np.random.default_rng(2).standard_normal(8)
    basis = np.vstack([np.full(8, 8**-0.5), haar_wavelets(8, 3)])
    for count in range(9):
        best = np.inf
        for chosen in range(256):
            if chosen.bit_count() == count:
                rows = basis[[bool(chosen >> i & 1) for i in range(8)]]
                best = min(best, np.linalg.norm(signal - rows.T @ (rows @ signal)))
        assert core.n_term_haar(signal, [count])[0] == pytest.approx(best / np.linalg.norm(signal), abs=1e-7)


def test_each_haar_term_at_a_third_halves_the_squared_error() -> None:
    found = core.n_term_haar(step(2**14, 1 / 3), range(1, 8))
    np.testing.assert_allclose(found**2, (2 / 3) * 0.5 ** np.arange(7), rtol=0.02)


# ---- measure and plot


def measured(**options: object) -> xr.Dataset:
    both = np.stack([step(64), step(64, 0.3)])
    kernels = xr.DataArray(both, dims=("kernel", "lag"), coords={"kernel": ["half", "off"]})
    return lti_limits.measure(kernels, **({"n_states": (2, 4, 8)} | options))


def test_measure_labels_what_core_and_fits_say() -> None:
    result = measured(seed=2)
    assert result.error.dims == ("kernel", "fit", "n_states")
    for label, kernel in (("half", step(64)), ("off", step(64, 0.3))):
        here = result.sel(kernel=label)
        np.testing.assert_array_equal(here.lower_bound, core.hankel_lower_bound(kernel, (2, 4, 8)))
        np.testing.assert_array_equal(here.error.sel(fit="n_term_haar"), core.n_term_haar(kernel, (2, 4, 8)))
        for name in fits.FITS:
            expected = [fits.FITS[name](kernel, count, 2).error for count in (2, 4, 8)]
            np.testing.assert_array_equal(here.error.sel(fit=name), expected)
            slope = np.polyfit(np.log((2, 4, 8)), np.log(expected), 1)[0]
            assert here.slope.sel(fit=name).item() == pytest.approx(slope)
        assert here.lti_order.item() == core.lti_order(kernel)
    assert result.n_modes.sel(fit="fourier").values.tolist() == [3, 5, 9]
    assert result.n_modes.sel(fit="optimised").values.tolist() == [2, 4, 8]
    assert np.all(result.null_error == 1.0)
    assert np.isnan(result.error_low).all()
    assert "deterministic" in result.attrs["interval"]
    assert "1e-13" in result.attrs["rcond"]
    assert all(variable.attrs["long_name"] and variable.attrs["units"] for variable in result.values())


def test_slope_leaves_out_what_is_exact() -> None:
    result = measured(fits=("n_term_haar",))
    assert np.isnan(result.slope.sel(kernel="half").item())
    assert result.slope.sel(kernel="off").item() < -0.5


def test_measure_takes_arrays_of_either_float_and_axes_in_any_order() -> None:
    options = {"n_states": (2, 4), "fits": ("fourier", "s4d_lin")}
    plain = lti_limits.measure(step(64)[None].astype(np.float32), **options)
    turned = lti_limits.measure(xr.DataArray(step(64)[:, None], dims=("lag", "kernel")), **options)
    xr.testing.assert_identical(plain, turned)


@pytest.mark.parametrize(("options", "message"), [
    ({"fits": ("s4d_rael",)}, "got 's4d_rael'; did you mean 's4d_real'?"),
    ({"fits": "fourier"}, "fits needs a sequence of different names"),
    ({"fits": ("fourier", "fourier")}, "fits needs a sequence of different names"),
    ({"n_states": (3,), "fits": ("fourier",)}, "n_states must be even; got 3"),
    ({"n_states": (4, 2)}, "n_states must increase and be at most the 64 lags; got [4, 2]"),
    ({"n_states": (65,)}, "at most the 64 lags; got [65]"),
    ({"n_states": (0,)}, "integers of at least 1; got (0,)"),
    ({"n_states": ()}, "n_states needs a sequence of integers"),
    ({"n_states": (64,), "fits": ("fourier",)}, "takes 1 .. 64 exponentials; got 65"),
    ({"target_error": 1.0}, "must be above 0 and below 1; got 1.0"),
    ({"baseline": xr.Dataset()}, "lti_limits.measure does not use baseline"),
])  # fmt: skip
def test_measure_refuses_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        measured(**options)


@pytest.mark.parametrize(("kernels", "message"), [
    (xr.DataArray(np.ones((1, 8)), dims=("kernel", "token")), "kernels needs dims ('kernel', 'lag'); got"),
    (np.stack([np.ones(8), np.zeros(8)]), "kernel 1: the kernel is zero at all 8 lags"),
    (np.array([[1.0, np.nan, 0.0, 0.0]]), "kernel 0: the kernel must be finite; got nan at lag 1"),
    (np.ones((1, 1)), "kernel 0: a kernel needs at least 2 lags; got 1"),
    (np.ones((0, 8)), "at least one kernel of real floats; got 0"),
    (xr.DataArray(np.ones((1, 8), complex), dims=("kernel", "lag")), "real floats; got 1 of complex128"),
    (np.ones((1, 12)), "the Haar transform needs a power of two of samples; got 12"),
])  # fmt: skip
def test_measure_refuses_kernels_by_name(kernels: np.ndarray | xr.DataArray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lti_limits.measure(kernels, n_states=(2,), fits=("s4d_lin", "n_term_haar"))


@pytest.mark.parametrize("lag", [-1, 8])
def test_keep_bound_refuses_a_lag_outside(lag: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lag must be among 0 .. n_tokens - 1 = 7; got {lag}")):
        core.keep_lower_bound(8, lag, [1])


def test_plot_draws_each_fit_the_bound_and_what_is_exact() -> None:
    result = measured(fits=("fourier", "n_term_haar"))
    ax = lti_limits.plot(result, kernel="half")
    assert ax.get_xscale() == ax.get_yscale() == "log"
    legend = ax.get_legend()
    assert legend is not None
    text = [entry.get_text() for entry in legend.get_texts()]
    slope = result.slope.sel(kernel="half", fit="fourier").item()
    assert f"Fourier and a constant (slope \N{MINUS SIGN}{-slope:.2f})" in text
    assert any("excluded" in entry for entry in text)
    assert any("hollow" in entry for entry in text)
    drawn = [line for line in ax.lines if line.get_label().startswith("Fourier")]
    np.testing.assert_array_equal(drawn[0].get_ydata(), result.error.sel(kernel="half", fit="fourier"))
    path = ax.collections[0].get_paths()[0].vertices
    assert path[:, 1].max() == pytest.approx(result.lower_bound.sel(kernel="half").max().item())
    plt.close(ax.figure)


@pytest.mark.parametrize("kernel", [None, "quarter"])
def test_plot_asks_for_one_kernel(kernel: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape("kernel must be one of ['half', 'off']; got")):
        lti_limits.plot(measured(fits=("s4d_lin",)), kernel=kernel)


def test_importing_draws_no_matplotlib() -> None:
    code = "import sys, mamba_probe.analyses.lti_limits; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_trace_is_no_kernel_and_one_kernel_no_stack():
    """In a process of its own: here beartype answers first."""
    code = """
import numpy as np, xarray as xr
from mamba_probe.analyses import lti_limits
for given in (xr.Dataset({"delta": ("token", np.ones(4))}), np.ones(8), "zoo:mqar-mamba1"):
    try:
        lti_limits.measure(given)
    except ValueError as problem:
        print(problem)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split("; got a ")[1].split(" of ")[0] for line in said] == ["Dataset", "ndarray", "str"]
    assert all("It takes kernels of the lag, not a trace" in line for line in said)
