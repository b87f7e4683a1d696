"""Bases, modes and intervals: what keeps energies is taken, everything else is refused by name."""

import numpy as np
import pytest
import pywt
import xarray as xr

from mamba_probe.analyses import lti_limits, wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import core, summaries
from mamba_probe.analyses.wavelet_alignment.basis import Basis


def trace_of(n_rows=2, n_tokens=40, n_channels=5, seed=0):
    generator = np.random.default_rng(seed)
    step = ("layer", "batch", "token")
    return xr.Dataset(
        {
            "delta": ((*step, "channel"), np.exp(generator.normal(-2, 1, (1, n_rows, n_tokens, n_channels)))),
            "A": (("layer", "channel", "state"), -np.exp(generator.normal(-1, 1, (1, n_channels, 3)))),
            "B": ((*step, "group", "state"), generator.standard_normal((1, n_rows, n_tokens, 1, 3))),
            "C": ((*step, "group", "state"), generator.standard_normal((1, n_rows, n_tokens, 1, 3))),
        },
        {"layer": [0], "valid": (("batch", "token"), np.ones((n_rows, n_tokens), bool)),
         "position": (("batch", "token"), np.tile(np.arange(n_tokens), (n_rows, 1)))},
        {"schema_version": 1, "family": "mamba", "discretization": "euler"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["haar", "db2", "db8", "sym8", "coif3"])
@pytest.mark.parametrize("window", [4, 16, 64])
def test_the_basis_is_orthonormal(name, window):
    matrix = Basis(name).transform(np.eye(window))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(window), atol=1e-9)


def test_haar_coefficients_are_those_of_pywt():
    signal = np.random.default_rng(0).standard_normal(64)
    wanted = np.concatenate(pywt.wavedec(signal, "haar", mode="periodization"))
    np.testing.assert_allclose(Basis("haar").transform(signal[None])[0], wanted, atol=1e-12)


@pytest.mark.parametrize("wavelet", ["haar", "db3", "sym5", "coif1"])
def test_zero_mode_keeps_the_energy_and_is_what_pywt_says(wavelet):
    kernel = np.random.default_rng(0).standard_normal((3, 32))
    found = Basis(wavelet, "zero").transform(kernel)
    np.testing.assert_allclose(np.sum(found**2, axis=1), np.sum(kernel**2, axis=1), rtol=1e-9)
    smooth, details = kernel[0], []
    for _ in range(5):
        smooth, detail = pywt.dwt(smooth, wavelet, mode="zero")
        details.insert(0, detail)
    np.testing.assert_allclose(found[0], np.concatenate([smooth, *details]))
    wanted = np.concatenate([[0] * len(smooth), *([5 - i] * len(d) for i, d in enumerate(details))])
    assert Basis(wavelet, "zero").levels(32).tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", ["periodization", "zero"])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_functions_of_the_basis_are_its_rows(wavelet, mode):
    """The coefficient of a kernel is its product with the function: also where that reaches out of the window."""
    basis, kernel = Basis(wavelet, mode), np.random.default_rng(0).standard_normal((1, 16))
    found = basis.transform(kernel)[0]
    functions = np.stack([basis.function(i, 16) for i in range(len(found))])
    np.testing.assert_allclose(functions @ kernel[0], found, atol=1e-9)


def test_haar_has_no_ends_to_treat():
    trace = trace_of()
    one, other = (wavelet_alignment.measure(trace, mode=mode) for mode in ("periodization", "zero"))
    for name in ("best_cosine", "best_level", "best_shift", "capture", "energy_by_level", "principal_cosine"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-12)
    assert np.isnan(other.capture_residual).all(), "a closed form of the periodised basis only"


def test_zero_mode_measures_with_longer_wavelets():
    result = wavelet_alignment.measure(trace_of(), wavelet="db3", mode="zero", n_kept=2)
    np.testing.assert_allclose(result.energy_by_level.sum("level"), 1)
    assert (result.best_cosine <= 1).all()
    assert result.sizes["angle"] > 8, "functions that reach over the ends belong to the coarse space too"
    assert result.attrs["mode"] == "zero"


@pytest.mark.parametrize("mode", sorted(set(pywt.Modes.modes) - {"periodization", "zero"}))
def test_modes_that_add_energy_are_refused_by_name(mode):
    with pytest.raises(ValueError, match=rf"mode '{mode}' continues a kernel by values that no token has"):
        wavelet_alignment.measure(trace_of(), mode=mode)


@pytest.mark.parametrize("family", ["haar", "db", "sym", "coif"])
def test_every_orthonormal_wavelet_is_taken(family):
    for name in pywt.wavelist(family):
        matrix = Basis(name).transform(np.eye(16))
        assert np.abs(matrix @ matrix.T - np.eye(16)).max() < 1e-7, name


@pytest.mark.parametrize("name", [*pywt.wavelist("bior")[1:], *pywt.wavelist("rbio")[1:], "dmey"])
def test_no_other_wavelet_is_taken(name):
    with pytest.raises(ValueError, match=rf"wavelet '{name}' is not orthonormal"):
        Basis(name)


@pytest.mark.parametrize(
    ("arguments", "text"), [({"wavelet": "db02"}, "did you mean 'db2'"), ({"mode": "wrap"}, "unknown mode 'wrap'")]
)
def test_unknown_names_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        wavelet_alignment.measure(trace_of(), **arguments)


def test_the_reference_of_a_single_token_needs_no_long_window():
    for wavelet in ("haar", "db4"):
        whole = core.best_wavelet(Basis(wavelet).transform(np.eye(2048)), Basis(wavelet).levels(2048))[0].mean()
        assert core.spike_cosine(2**40, Basis(wavelet)) == pytest.approx(whole, rel=1e-3)


def test_one_row_is_resampled_over_runs_of_queries():
    trace = trace_of(n_rows=1, n_tokens=80)
    result = wavelet_alignment.measure(trace, query_tokens=list(range(60, 80)))
    assert result.attrs["interval"].startswith("95 % percentile bootstrap over token blocks: 16 runs")
    for name in ("best_cosine", "discontinuity_index", "dft_compaction", "null_shuffle_best_cosine"):
        low, value, high = (result[f"layer_{name}{end}"] for end in ("_low", "", "_high"))
        assert (low <= value + 1e-12).all(), name
        assert (value <= high + 1e-12).all(), name
    assert (result.layer_best_cosine_low < result.layer_best_cosine_high).all()
    few = wavelet_alignment.measure(trace, query_tokens=[50, 60, 70])
    assert np.isnan(few.layer_best_cosine_low).all()
    assert few.attrs["interval"].startswith("NaN: one row")


def test_medians_are_those_of_the_kernels_drawn():
    values = np.array([[[[3.0, 1.0]], [[np.nan, 2.0]], [[7.0, 8.0]]]])
    median = summaries._Median(values, np.array([[0], [1], [2]]))
    assert median(np.array([1, 1, 1])).tolist() == [3.0]
    assert median(np.array([1, 2, 0])).tolist() == [2.0]
    assert np.isnan(median(np.array([0, 0, 0]))).all()


def test_summaries_are_the_means_and_medians_of_the_kernels():
    result = wavelet_alignment.measure(trace_of(n_channels=7), n_sampled=7)
    for name in ("best_cosine", "effective_rank"):
        assert result[f"layer_{name}"].item() == pytest.approx(result[name].mean().item())
        assert result[f"layer_null_{name}"].item() == pytest.approx(result[f"null_{name}"].mean().item())
    np.testing.assert_allclose(
        result.layer_energy_by_level[0], result.energy_by_level.mean(["batch", "query_token", "kernel"])[0, :]
    )
    for name in ("discontinuity_index", "lti_order"):
        ordered = np.sort(result[name].values.ravel())
        assert result[f"layer_{name}"].item() == ordered[(len(ordered) - 1) // 2]


def test_a_shuffle_is_of_delta_alone_and_by_its_seed():
    trace = trace_of(n_rows=1, n_tokens=32)
    result = wavelet_alignment.measure(trace, seed=5, query_tokens=[31])
    order = np.random.default_rng([5, 0]).permutation(32)
    moved = trace.assign(delta=trace["delta"][:, :, order])
    by_hand = wavelet_alignment.measure(moved, query_tokens=[31])
    for name in ("best_cosine", "discontinuity_index"):
        np.testing.assert_allclose(result[f"layer_null_shuffle_{name}"], by_hand[f"layer_{name}"], rtol=1e-9)


def test_a_baseline_is_the_other_trace_measured():
    trace, other = trace_of(), trace_of(seed=1).assign_attrs(model="twin")
    result, own = wavelet_alignment.measure(trace, baseline=other), wavelet_alignment.measure(other)
    for name in ("best_cosine", "compaction", "lti_order", "energy_by_level"):
        for end in ("", "_low", "_high"):
            np.testing.assert_array_equal(result[f"layer_baseline_{name}{end}"], own[f"layer_{name}{end}"])
    assert result.attrs["baseline_estimator"].endswith("the same kernels of the baseline given, twin")
    with pytest.raises(ValueError, match="baseline needs the layers"):
        wavelet_alignment.measure(trace, baseline=trace_of(n_rows=3))
    with pytest.raises(ValueError, match="baseline needs the same valid tokens; row 0 has others"):
        wavelet_alignment.measure(trace, baseline=trace_of(n_tokens=39))


def test_costly_measures_are_of_the_kernels_named():
    result = wavelet_alignment.measure(trace_of(n_channels=9), n_sampled=3, n_span=4, exponentials=[2])
    sampled = [True, False, False, False, True, False, False, False, True]
    for name in ("lti_order", "exponential_error"):
        measured = np.isfinite(result[name].values.reshape(2, 9, -1)).all(axis=(0, 2))
        assert measured.tolist() == sampled, name
    assert (result["rank"] == 4).all()
    assert "at most 3 kernels a query" in result.attrs["order_rule"]
    assert "at most 4 kernels a query" in result.attrs["span_rule"]
    for name in ("n_sampled", "n_span", "order_lags"):
        with pytest.raises(ValueError, match=f"{name} must be at least 2; got 1"):
            wavelet_alignment.measure(trace_of(), **{name: 1})
    with pytest.raises(ValueError, match="n_kept must be 0 to 5"):
        wavelet_alignment.measure(trace_of(), n_kept=6)


@pytest.mark.parametrize("window", [4, 8, 64, 256])
def test_orders_are_those_of_the_hankel_bound(window):
    generator = np.random.default_rng(window)
    kernel = generator.standard_normal((6, window)) * np.exp(
        -generator.uniform(0, 9, (6, 1)) * np.arange(window) / window
    )
    kernel[1] = np.repeat([1.0, -1.0], window // 2)
    kernel[2] = 0.9 ** np.arange(window)
    wanted = [lti_limits.core.lti_order(one[::-1]) for one in kernel]
    assert core.lti_order(kernel, 0.1, 256).tolist() == wanted
    assert np.isnan(core.lti_order(np.zeros((1, window)), 0.1, 256)).all()


def test_fewer_lags_give_a_weaker_bound_on_the_same_kernel():
    kernel = np.repeat([[1.0, -1.0, 1.0, -1.0]], 64, axis=1)
    whole, near, nearest = (core.lti_order(kernel, 0.1, lags).item() for lags in (256, 128, 4))
    assert whole > near > nearest
    assert core.lti_order(np.c_[kernel, np.zeros((1, 256))], 0.1, 256).item() == 0, "nothing near: nothing excluded"
