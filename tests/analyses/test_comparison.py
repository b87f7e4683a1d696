"""`compare`: equal traces, pairing, what is refused, pooled statistics, lazy rows, plots."""

import dask.array as da
import matplotlib
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses.comparison import compare, plot

matplotlib.use("Agg")


def trace(seed: int = 0, rows: int = 6, ids: int = 0) -> xr.Dataset:
    values = np.random.default_rng(seed).random((rows, 2))
    tokens = np.arange(rows * 3).reshape(rows, 3) + ids
    coords = {"token_id": (("batch", "token"), tokens), "valid": (("batch", "token"), np.ones((rows, 3), bool))}
    return xr.Dataset({"x": (("batch", "layer"), values)}, coords | {"layer": [3, 5]})


def measure(trace: xr.Dataset, scale: float = 1.0) -> xr.Dataset:
    mean = trace["x"].mean("batch") * scale
    return xr.Dataset({"layer_x": mean, "layer_x_low": mean, "layer_null_x": mean, "y": mean})


def test_equal_traces_differ_by_exactly_nothing():
    for resample in ("each", "refit"):
        found = compare(measure, {"a": trace(), "b": trace()}, resample=resample, n_bootstrap=50)
        ends = ("", "_low", "_high")
        assert all((found[f"layer_x_difference{end}"] == 0).all() for end in ends)
        assert (found.layer_x_p == 1).all()
        assert found.attrs["compared"] == "layer_x"
        assert found.layer.values.tolist() == [3, 5]


def test_measuring_drawn_rows_again_is_the_bootstrap_of_a_mean():
    of = {"a": trace(), "b": trace(1)}
    each, refit = (compare(measure, of, resample=how, n_bootstrap=60) for how in ("each", "refit"))
    for end in ("", "_low", "_high", "_difference", "_difference_low", "_difference_high"):
        assert np.allclose(each[f"layer_x{end}"], refit[f"layer_x{end}"], atol=1e-12)


def test_numbers_are_ordered_and_arguments_are_passed():
    found = compare(measure, {20: {"trace": trace(), "scale": 3.0}, 5: trace()}, n_bootstrap=20)
    assert found.trace.values.tolist() == [5, 20]
    assert found.attrs["reference"] == "5"
    assert np.allclose(found.layer_x_difference.values, 2 * trace().x.mean("batch").values)
    for kind in ("difference", "values", "trajectory"):
        assert plot(found, kind=kind).get_legend() is not None


@pytest.mark.parametrize(
    ("of", "options", "match"),
    [
        ({"a": trace(), "b": trace(ids=1)}, {}, "token_id differs in row 0 of `batch` at valid token 0: 0 in 'a', 1"),
        ({"a": trace(), "b": trace(rows=5)}, {}, "'a' has 6 rows, 'b' has 5.*paired=False"),
        ({"a": trace()}, {}, "two traces or more"),
        ({"a": trace(), "b": trace().isel(layer=[0])}, {}, "layer_x .1 of `layer`, not 2.*select="),
        ({"a": trace(), "b": trace()}, {"variable": "layer_z"}, "unknown variable 'layer_z'"),
        ({"a": trace(), "b": trace()}, {"reference": "c"}, "unknown reference 'c'"),
        ({"a": trace(), "b": trace()}, {"resample": "refit", "statistic": "median"}, "pools them by the measure"),
        ({"a": trace(), 3: trace()}, {}, "all names or all finite numbers"),
    ],
)
def test_refusals(of, options, match):
    with pytest.raises(ValueError, match=match):
        compare(measure, of, **options)


def test_an_unknown_analysis_is_refused():
    with pytest.raises(ValueError, match="unknown analysis 'memory_horizn': did you mean 'memory_horizon'"):
        compare("memory_horizn", {"a": trace(), "b": trace()})


def test_unpaired_rows_need_not_be_the_same_prompts():
    found = compare(measure, {"a": trace(), "b": trace(1, rows=5, ids=9)}, paired=False, n_bootstrap=20)
    assert (found.layer_x_n_rows == 11).all()
    assert "Welch" in found.attrs["interval"]


def test_rows_on_dask_are_read_one_at_a_time():
    read = []

    def block(values):
        if values.size:
            read.append(values.shape[0])
        return values

    lazy = trace()
    lazy["x"] = (("batch", "layer"), da.from_array(lazy.x.values, chunks=(1, 2)).map_blocks(block, dtype=float))
    read.clear()
    seen = []

    def counted(one: xr.Dataset) -> xr.Dataset:
        assert one.x.chunks is not None
        seen.append(one.sizes["batch"])
        return measure(one).compute()

    compare(counted, {"a": lazy, "b": trace().chunk(batch=1)}, n_bootstrap=20)
    assert set(seen) == {1}
    assert set(read) == {1}
    assert len(read) <= 4 * 6
