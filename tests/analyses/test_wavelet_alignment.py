"""Wavelet alignment: planted wavelets are found, kernels agree with the recurrence, the null is time-invariant."""

import numpy as np
import pytest
import pywt
import xarray as xr

from mamba_probe.analyses import wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import core
from mamba_probe.analyses.wavelet_alignment.span import Span

LEVEL, WINDOW = 3, 64


def make_trace(
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    valid: np.ndarray | None = None,
    head: str = "channel",
) -> xr.Dataset:
    """A trace of delta (layer, batch, token, head), A (layer, head[, state]), B and C (.., group, state)."""
    valid = np.ones(delta.shape[1:3], bool) if valid is None else valid
    step = ("layer", "batch", "token")

    def masked(values: np.ndarray) -> np.ndarray:
        return np.where(valid.reshape(1, *valid.shape, *[1] * (values.ndim - 3)), values, np.nan).astype("float32")

    return xr.Dataset(
        {
            "delta": ((*step, head), masked(delta)),
            "A": (("layer", head, "state")[: np.ndim(A)], np.asarray(A, "float32")),
            "B": ((*step, "group", "state"), masked(B)),
            "C": ((*step, "group", "state"), masked(C)),
        },
        {
            "layer": np.arange(delta.shape[0]),
            "batch": np.arange(delta.shape[1]),
            head: np.arange(delta.shape[3]),
            "valid": (("batch", "token"), valid),
            "position": (("batch", "token"), np.where(valid, np.cumsum(valid, axis=1) - 1, -1)),
        },
        {"schema_version": 1, "family": "mamba" if head == "channel" else "mamba2", "discretization": "euler"},
    )


def random_trace(n_rows: int = 2, n_tokens: int = 37, head: str = "channel", seed: int = 0) -> xr.Dataset:
    generator = np.random.default_rng(seed)
    n_groups, n_states = (1, 4) if head == "channel" else (2, 5)
    delta = np.exp(generator.normal(-2.0, 1.0, (2, n_rows, n_tokens, 6)))
    A = -np.exp(generator.normal(-1, 1, (2, 6, n_states) if head == "channel" else (2, 6)))
    B, C = generator.standard_normal((2, 2, n_rows, n_tokens, n_groups, n_states))
    return make_trace(delta, A, B, C, head=head)


def planted_windows(n_rows: int = 1) -> xr.Dataset:
    """2^J channels, each of which writes in its own eighth of the window and forgets nothing."""
    length = WINDOW >> LEVEL
    inside = np.arange(WINDOW)[:, None] // length == np.arange(2**LEVEL)
    delta = np.broadcast_to(np.where(inside, 1.0, 1e-12), (1, n_rows, WINDOW, 2**LEVEL))
    ones = np.ones((1, n_rows, WINDOW, 1, 1))
    return make_trace(delta, np.full((1, 2**LEVEL, 1), -1e-14), ones, ones)


def haar_functions() -> np.ndarray:
    """The 2^J coarsest Haar functions of the window, synthesised by pywt: (function, token)."""
    blank = pywt.wavedec(np.zeros(WINDOW), "haar", mode="periodization")
    functions = []
    for band in range(LEVEL + 1):
        for shift in range(len(blank[band])):
            bands = [values.copy() for values in blank]
            bands[band][shift] = 1.0
            functions.append(pywt.waverec(bands, "haar", mode="periodization"))
    return np.array(functions)


def brute_kernel(trace: xr.Dataset, layer: int, row: int, head: int, query: int) -> np.ndarray:
    """Weights of every token up to `query`: the products of one-step decays, multiplied out."""
    delta = trace["delta"].values[layer, row, :, head].astype(float)
    group = head // (trace["delta"].shape[-1] // trace.sizes["group"])
    B, C = (trace[name].values[layer, row, :, group].astype(float) for name in "BC")
    A = np.broadcast_to(trace["A"].values[layer, head].astype(float), B.shape[1])
    found = []
    for s in range(query + 1):
        state = delta[s] * B[s]
        for r in range(s + 1, query + 1):
            state = np.exp(A * delta[r]) * state
        found.append(C[query] @ state)
    return np.array(found)


def test_planted_haar_functions_are_recovered() -> None:
    length = WINDOW >> LEVEL
    read_out = haar_functions()[:, ::length]
    result = wavelet_alignment.measure(planted_windows(), read_out=read_out).isel(layer=0, batch=0, query_token=0)
    np.testing.assert_allclose(result.best_cosine[1:], 1, atol=1e-9)
    assert result.best_level[1:].values.tolist() == [6, 5, 5, 4, 4, 4, 4]
    assert result.best_shift[1:].values.tolist() == [0, 0, 1, 0, 1, 2, 3]
    assert result.scaling_cosine[0].item() == pytest.approx(1)
    assert result.best_cosine[0].item() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(result.principal_cosine, 1, atol=1e-9)
    np.testing.assert_allclose(result.capture, 1, atol=1e-9)
    assert result["rank"].item() == 8
    assert (result.n_coefficients == 1).all()
    np.testing.assert_allclose(result.effective_rank, 1, atol=1e-6)
    np.testing.assert_allclose(result.energy_by_level.sel(level=6), [0, 1, 0, 0, 0, 0, 0, 0], atol=1e-9)


def test_the_null_of_planted_windows_holds_no_wavelet() -> None:
    read_out = haar_functions()[:, :: WINDOW >> LEVEL]
    result = wavelet_alignment.measure(planted_windows(), read_out=read_out)
    assert result.null_n_dead.item() == 7  # frozen windows are equal: their differences cancel
    assert result["null_rank"].item() == 1
    assert result.null_scaling_cosine.values.ravel()[0] == pytest.approx(1)
    assert result.layer_null_best_cosine.item() == pytest.approx(0, abs=1e-9)
    assert result.layer_best_cosine.item() == pytest.approx(7 / 8)
    assert result.layer_wavelet_capture.item() == pytest.approx(7 / 8)
    assert result.layer_null_wavelet_capture.item() == pytest.approx(0, abs=1e-9)
    assert result.layer_null_capture.item() == pytest.approx(1)


def test_a_shuffled_window_loses_the_planted_functions() -> None:
    trace = planted_windows()
    order = np.random.default_rng(0).permutation(WINDOW)
    trace["delta"] = trace["delta"].copy(data=trace["delta"].values[:, :, order])
    result = wavelet_alignment.measure(trace, read_out=haar_functions()[:, :: WINDOW >> LEVEL])
    assert result.layer_best_cosine.item() < 0.6
    assert result.layer_wavelet_capture.item() < 0.4


@pytest.mark.parametrize("head", ["channel", "head"])
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_statistics_agree_with_brute_force_kernels_and_pywt(head: str, wavelet: str) -> None:
    trace = random_trace(head=head)
    queries = [36, 20]
    result = wavelet_alignment.measure(trace, wavelet=wavelet, query_tokens=queries, n_bootstrap=2)
    for layer, row, q, i in np.ndindex(2, 2, 2, 6):
        window = (32, 16)[q]
        kernel = brute_kernel(trace, layer, row, i, queries[q])[-window:]
        smooth, details = kernel / np.linalg.norm(kernel), []
        while len(smooth) > 1:
            smooth, detail = pywt.dwt(smooth, wavelet, mode="periodization")
            details.append(detail)
        here = result.isel(layer=layer, batch=row, query_token=q, kernel=i)
        energy = np.concatenate([smooth, *details]) ** 2
        level = int(np.argmax([np.abs(d).max() for d in details]))
        assert here.best_cosine.item() == pytest.approx(np.abs(details[level]).max(), rel=1e-9)
        assert here.best_level.item() == level + 1
        assert here.best_shift.item() == np.argmax(np.abs(details[level]))
        assert here.scaling_cosine.item() == pytest.approx(abs(smooth[0]), rel=1e-9)
        assert here.effective_rank.item() == pytest.approx(np.exp(-np.sum(energy * np.log(energy))), rel=1e-9)
        descending = np.cumsum(np.sort(energy)[::-1])
        assert here.n_coefficients.values.tolist() == [1 + np.sum(descending < s) for s in (0.9, 0.95, 0.99)]
        by_level = here.energy_by_level.values[1 : len(details) + 1]
        np.testing.assert_allclose(by_level, [np.sum(d**2) for d in details], rtol=1e-9)
        assert result.window[row, q].item() == window


def test_the_null_is_the_layer_frozen_to_its_means() -> None:
    trace = random_trace()
    frozen = trace.copy(deep=True)
    for name in ("delta", "B", "C"):
        mean = trace[name].astype(float).mean("token").broadcast_like(trace[name]).transpose(*trace[name].dims)
        frozen[name] = mean
    null, own = wavelet_alignment.measure(trace), wavelet_alignment.measure(frozen)
    for name in ("best_cosine", "capture", "effective_rank", "scaling_cosine"):
        np.testing.assert_allclose(null[f"null_{name}"], own[name], rtol=1e-9)
        np.testing.assert_allclose(own[f"null_{name}"], own[name], rtol=1e-9)


def test_principal_angles_agree_with_an_independent_svd() -> None:
    trace = random_trace()
    result = wavelet_alignment.measure(trace, level=2)
    kernels = np.array([brute_kernel(trace, 1, 0, i, 36)[-32:] for i in range(6)])
    basis = np.linalg.svd(kernels, full_matrices=False)[2]
    steps = np.kron(np.eye(4), np.ones(8)) / np.sqrt(8)  # the Haar space of level 2: constant on quarters
    wanted = np.linalg.svd(basis @ steps.T, compute_uv=False)
    np.testing.assert_allclose(result.principal_cosine[1, 0, 0], wanted, atol=1e-7)
    assert result["rank"][1, 0, 0] == 6
    capture = np.sum((kernels @ steps.T) ** 2, axis=1) / np.sum(kernels**2, axis=1)
    np.testing.assert_allclose(result.capture[1, 0, 0], capture, rtol=1e-9)


def test_random_subspaces_meet_their_closed_form() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        span = Span(6, 32)
        span.add(generator.standard_normal((6, 32)))
        found.append(core.coarse_cosines(span, np.arange(32) < 4)[0])
    assert np.mean(np.square(found)) == pytest.approx(6 / 32, abs=0.01)


@pytest.mark.parametrize("head", ["channel", "head"])
@pytest.mark.parametrize(
    ("left", "right"), [(3, 4), *(pytest.param(*one, marks=pytest.mark.long) for one in ((5, 0), (0, 7)))]
)
def test_padding_changes_nothing(left: int, right: int, head: str) -> None:
    trace = random_trace(head=head)

    def padded(name: str) -> np.ndarray:
        values = trace[name].values
        return np.pad(values, [(0, 0), (0, 0), (left, right)] + [(0, 0)] * (values.ndim - 3), constant_values=9.0)

    valid = np.pad(np.ones((2, 37), bool), ((0, 0), (left, right)))
    other = make_trace(padded("delta"), trace["A"].values, padded("B"), padded("C"), valid, head)
    xr.testing.assert_identical(
        wavelet_alignment.measure(other, query_tokens=[30, 36]), wavelet_alignment.measure(trace, query_tokens=[30, 36])
    )


def test_a_set_of_queries_for_each_row_is_each_row_on_its_own() -> None:
    trace = random_trace()
    both = wavelet_alignment.measure(trace, query_tokens=np.array([[12, 30], [20, 36]]))
    assert both["query_position"].values.tolist() == [[12, 30], [20, 36]]
    for row, queries in enumerate([[12, 30], [20, 36]]):
        alone = wavelet_alignment.measure(trace.isel(batch=[row]), query_tokens=queries)
        np.testing.assert_array_equal(both["best_cosine"].values[:, row], alone["best_cosine"].values[:, 0])


def test_dask_equals_memory() -> None:
    trace = random_trace()
    lazy = trace.chunk(layer=1, batch=1)
    xr.testing.assert_identical(wavelet_alignment.measure(lazy), wavelet_alignment.measure(trace))


def test_a_short_row_fills_the_levels_it_lacks_with_nan() -> None:
    trace = random_trace()
    trace["valid"][1, 20:] = False
    trace["position"][1, 20:] = -1
    for name in ("delta", "B", "C"):
        trace[name][:, 1, 20:] = np.nan
    result = wavelet_alignment.measure(trace)
    assert result.window.values.ravel().tolist() == [32, 16]
    assert result.query_position.values.ravel().tolist() == [36, 19]
    assert np.isnan(result.energy_by_level.sel(level=5)[:, 1]).all()
    np.testing.assert_allclose(result.energy_by_level.sum("level"), 1)
    alone = wavelet_alignment.measure(trace.isel(batch=[1], token=slice(0, 20)))
    np.testing.assert_array_equal(result.best_cosine[:, 1:], alone.best_cosine)


def test_dead_channels_are_counted_and_left_out() -> None:
    trace = random_trace()
    trace["delta"][:, :, :, 2] = 0.0
    result = wavelet_alignment.measure(trace)
    assert (result.n_dead == 1).all()
    assert np.isnan(result.best_cosine.isel(kernel=2)).all()
    others = result.best_cosine.isel(kernel=[0, 1, 3, 4, 5]).mean(["batch", "query_token", "kernel"])
    np.testing.assert_allclose(result.layer_best_cosine, others)
    trace["delta"][:] = 0.0
    dead = wavelet_alignment.measure(trace)
    assert (dead.n_dead == 6).all()
    assert (dead["rank"] == 0).all()
    assert np.isnan(dead.layer_best_cosine).all()
    assert np.isnan(dead.layer_compaction).all()


def test_intervals_enclose_the_mean_and_need_rows() -> None:
    result = wavelet_alignment.measure(random_trace(n_rows=8))
    for name in ("best_cosine", "null_best_cosine", "wavelet_capture", "compaction"):
        assert (result[f"layer_{name}_low"] <= result[f"layer_{name}"] + 1e-12).all()
        assert (result[f"layer_{name}"] <= result[f"layer_{name}_high"] + 1e-12).all()
    assert (result.layer_best_cosine_low < result.layer_best_cosine_high).all()
    single = wavelet_alignment.measure(random_trace(n_rows=1))
    assert np.isnan(single.layer_best_cosine_low).all()
    assert "one row" in single.attrs["interval"]


def test_compaction_is_the_mean_share_of_the_largest() -> None:
    result = wavelet_alignment.measure(random_trace())
    curve = result.layer_compaction
    assert (curve.diff("coefficient") >= -1e-12).all()
    np.testing.assert_allclose(curve.sel(coefficient=32), 1)
    largest = np.maximum(result.best_cosine, result.scaling_cosine) ** 2
    np.testing.assert_allclose(curve.sel(coefficient=1), largest.mean(["batch", "query_token", "kernel"]))


def test_read_outs_may_be_labelled() -> None:
    trace = random_trace(head="head")
    values = np.random.default_rng(0).standard_normal((3, 6))
    labelled = xr.DataArray(values.T, dims=("head", "kernel"), coords={"kernel": ["a", "b", "c"]})
    result = wavelet_alignment.measure(trace, read_out=labelled)
    assert result.kernel.values.tolist() == ["a", "b", "c"]
    plain = wavelet_alignment.measure(trace, read_out=values)
    np.testing.assert_array_equal(result.best_cosine, plain.best_cosine)
    kernel = values @ np.array([brute_kernel(trace, 0, 0, i, 36)[-32:] for i in range(6)])
    coarse = np.abs(kernel.sum(axis=1)) / np.sqrt(32) / np.linalg.norm(kernel, axis=1)
    np.testing.assert_allclose(plain.scaling_cosine[0, 0, 0], coarse, rtol=1e-9)


def test_every_number_has_a_name_a_unit_and_an_account() -> None:
    result = wavelet_alignment.measure(random_trace())
    for name, variable in result.data_vars.items():
        assert variable.attrs["long_name"], name
        assert variable.attrs["units"], name
    assert {"estimator", "null", "interval", "reduces_over", "wavelet", "window_rule"} <= set(result.attrs)
    assert all(isinstance(value, str) for value in result.attrs.values())
    assert "(ours)" in result.attrs["estimator"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kernel": "block"}, "kernel 'block' is measured from jacobian=probe.jacobian"),
        ({"jacobian": xr.Dataset()}, "jacobian= is of kernel 'block', not of 'mixer'"),
        ({"kernel": "mixr"}, "unknown kernel 'mixr': did you mean 'mixer'"),
        ({"wavelet": "bior2.2"}, "'bior2.2' is not orthonormal"),
        ({"wavelet": "dmey"}, "'dmey' is not orthonormal"),
        ({"wavelet": "morl"}, "unknown wavelet 'morl'"),
        ({"query_tokens": [2]}, "at least 4 valid tokens up to the query; got 3"),
        ({"query_tokens": [37]}, r"query_tokens \[37\] are not among the valid tokens of row 0"),
        ({"query_tokens": [[9], [9], [9], [9], [9]]}, r"\(batch = \d, query_token\); got int64 of shape \(5, 1\)"),
        ({"query_tokens": []}, "query_tokens is empty"),
        ({"level": 5}, "level must be 0 to 4"),
        ({"level": -1}, "level must be 0 to 4"),
        ({"read_out": np.ones((2, 5))}, r"read_out needs shape \(kernel, 6\) over `channel`; got \(2, 5\)"),
        (
            {"read_out": xr.DataArray(np.ones((2, 6)), dims=("kernel", "head"))},
            r"read_out needs dims \(kernel, channel\)",
        ),
        ({"read_out": np.full((1, 6), np.nan)}, "NaN or infinity"),
        ({"weights": xr.Dataset()}, r"wavelet_alignment\.measure does not use weights"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wavelet_alignment.measure(random_trace(), **arguments)


def test_traces_it_cannot_answer_for_are_refused() -> None:
    trace = random_trace()
    with pytest.raises(ValueError, match="lacks `C`"):
        wavelet_alignment.measure(trace.drop_vars("C"))
    with pytest.raises(ValueError, match="'euler' or 'zoh'; it says 'bilinear'"):
        wavelet_alignment.measure(trace.assign_attrs(discretization="bilinear"))
    with pytest.raises(ValueError, match="not contiguous: a kernel needs every token"):
        wavelet_alignment.measure(trace.isel(token=[0, 1, 2, 3, 5, 6, 7, 8]))


SERIES = ["executed", "time-invariant (null)", r"$\Delta$ shuffled (null)", "baseline"]
LEGENDS = {
    ("cosine", 1): [*SERIES, "single token"],
    ("cosine", 2): [*SERIES, "single token"],
    ("compaction", 1): [*SERIES, "executed, in the DFT"],
    ("compaction", 2): SERIES[:2],
    ("levels", 1): SERIES,
    ("levels", 2): SERIES[:2],
    ("kernels", 1): ["its best wavelet", "kernel"],
}


@pytest.mark.parametrize(("kind", "n_layers"), LEGENDS)
def test_plots_draw_the_value_beside_its_nulls_and_say_of_what(kind: str, n_layers: int) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    trace = random_trace().isel(layer=slice(0, n_layers)).assign_attrs(model="tiny")
    result = wavelet_alignment.measure(trace, baseline=trace, n_kept=2)
    assert wavelet_alignment.plot(result, ax, kind=kind) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == LEGENDS[kind, n_layers]
    assert ax.get_title("left") == f"tiny, {'layer 0' if n_layers == 1 else 'all layers'}: mixer kernels, haar"
    figure.canvas.draw()
    plt.close(figure)


def test_plots_of_one_layer_among_several() -> None:
    import matplotlib.pyplot as plt

    result = wavelet_alignment.measure(random_trace(), n_kept=2)
    figure, ax = plt.subplots()
    wavelet_alignment.plot(result, ax, kind="kernels", layer=1)
    assert "layer 1" in ax.get_title("left")
    drawn = ax.lines[1].get_ydata()
    np.testing.assert_allclose(np.corrcoef(drawn, result.kept_kernel[1, 0])[0, 1], 1)
    for arguments, text in (
        ({"layer": 7}, r"layer must be one of \[0, 1\]; got 7"),
        ({"kind": "kernels"}, "kernels are drawn of one layer: pass layer="),
    ):
        with pytest.raises(ValueError, match=text):
            wavelet_alignment.plot(result, ax, **arguments)
    with pytest.raises(ValueError, match="no kernel was kept: pass n_kept="):
        wavelet_alignment.plot(wavelet_alignment.measure(random_trace()), ax, kind="kernels")
    plt.close(figure)


def test_a_plot_says_when_the_null_has_no_energy() -> None:
    import matplotlib.pyplot as plt

    read_out = haar_functions()[1:, :: WINDOW >> LEVEL]  # wavelets only: equal frozen windows cancel in each
    result = wavelet_alignment.measure(planted_windows(n_rows=3), read_out=read_out)
    assert result.layer_best_cosine.item() == pytest.approx(1)
    assert (result.null_n_dead == 7).all()
    figure, (left, right) = plt.subplots(1, 2)
    wavelet_alignment.plot(result, left)
    wavelet_alignment.plot(result, right, kind="compaction")
    assert "no energy" in [text.get_text() for text in left.texts]
    assert right.get_legend().get_texts()[1].get_text() == "time-invariant (null): no energy"
    plt.close(figure)
