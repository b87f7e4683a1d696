"""The trace's contract: exact round trips, lazy derived variables, refusals that say what was needed."""

import json

import numpy as np
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe.trace import open_dataset, require, save, validate


def make_trace(family="mamba", **attrs):
    rng = np.random.default_rng(0)
    head = {"mamba": ("channel",), "mamba2": ("head",)}[family]
    states = {"mamba": ("layer", "channel", "state"), "mamba2": ("layer", "head")}[family]
    sizes = {"layer": 2, "batch": 2, "token": 5, "channel": 4, "head": 4, "group": 2, "state": 3}
    delta = rng.random((2, 2, 5, 4)).astype(np.float32)
    delta[:, 0, :2] = np.nan
    data = {
        "delta": (("layer", "batch", "token", *head), delta),
        "A": (states, -rng.random([sizes[d] for d in states]).astype(np.float32)),
        "B": (("layer", "batch", "token", "group", "state"), rng.random((2, 2, 5, 2, 3)).astype(np.float32)),
    }
    coords = {
        "layer": [3, 7],
        head[0]: np.arange(4),
        "valid": (("batch", "token"), ~np.isnan(delta[0, ..., 0])),
        "role": (("batch", "token"), np.array([["key", "value", "π", "", "query"]] * 2, dtype=object)),
        "target": (("batch", "token"), np.arange(10).reshape(2, 5) - 1),
    }
    known = {
        "schema_version": 1,
        "family": family,
        "n_heads": 4,
        "n_groups": 2,
        "none": None,
        "ok": True,
        "of": {"a": [1]},
    }
    return xr.Dataset(data, coords, known | attrs)


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_round_trip_is_exact_twice(tmp_path, suffix, family):
    trace = make_trace(family)
    trace["delta"].attrs = {"units": "1", "note": None}
    path = trace.probe.save(tmp_path / f"one{suffix}")
    back = mp.open_trace(path)
    assert back["delta"].chunks is not None, "lazy"
    xr.testing.assert_identical(back.load(), trace)
    for name in trace.variables:
        assert back[name].dtype == trace[name].dtype, name
    assert json.dumps(back.attrs) == json.dumps(trace.attrs)
    again = mp.open_trace(back.probe.save(tmp_path / f"two{suffix}"))
    xr.testing.assert_identical(again.load(), trace)


def test_derived_variables_are_lazy_and_right():
    trace = make_trace()
    A_bar, B_bar = trace.probe.A_bar, trace.probe.B_bar
    assert A_bar.dims == ("layer", "batch", "token", "channel", "state")
    assert A_bar.chunks is not None
    np.testing.assert_array_equal(A_bar, np.exp(trace["delta"].values[..., None] * trace["A"].values[:, None, None]))
    spread = np.repeat(trace["B"].values, 2, axis=3)  # 4 channels, 2 groups
    np.testing.assert_array_equal(B_bar, trace["delta"].values[..., None] * spread)
    part = trace.isel(channel=[3])
    np.testing.assert_array_equal(part.probe.B_bar[..., 0, :], (trace["delta"].values[..., None] * spread)[..., 3, :])
    recorded = trace.assign(A_bar=A_bar.compute())
    assert recorded.probe.A_bar.chunks is None
    assert make_trace("mamba2").probe.A_bar.dims == ("layer", "batch", "token", "head")
    with pytest.raises(ValueError, match=r"lacks `A`.*record.*again with variables=\('A', 'B', 'delta'\)|Record again"):
        trace.drop_vars("A").probe.A_bar  # noqa: B018
    with pytest.raises(ValueError, match=r"unknown grouped variable 'x'"):
        trace.probe.by_head("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign_attrs(schema_version=99), r"needs attrs\['schema_version'\] == 1; got 99"),
        (lambda t: t.assign_attrs(family="s5"), r"family'\] in .*mamba.*got 's5'"),
        (
            lambda t: t.rename(token="time"),
            r"`delta` needs dims \(layer, batch, token, channel\); got \(layer, batch, time, channel\)",
        ),
        (lambda t: t.transpose("batch", ...), r"`delta` needs dims"),
    ],
)
def test_a_wrong_schema_is_refused(tmp_path, change, message):
    wrong = change(make_trace())
    with pytest.raises(ValueError, match=message):
        validate(wrong)
    with pytest.raises(ValueError, match=message):
        mp.open_trace(save(wrong, tmp_path / "wrong.zarr"))
    with pytest.raises(ValueError, match=r"is an xarray.Dataset; got dict"):
        validate({})
    with pytest.raises(ValueError, match=r"lacks `y`; it holds \['A', 'B', 'delta'\]"):
        require(make_trace(), "delta", "y")


def test_stores_that_are_missing_taken_or_damaged(tmp_path):
    trace = make_trace()
    with pytest.raises(FileNotFoundError, match="no store at"):
        mp.open_trace(tmp_path / "absent.zarr")
    with pytest.raises(ValueError, match=r"ends in one of \('.zarr', '.nc'\); got 'x.csv'"):
        trace.probe.save(tmp_path / "x.csv")
    path = trace.probe.save(tmp_path / "run.nc")
    with pytest.raises(ValueError, match=r"exists: pass overwrite=True"):
        trace.probe.save(path)
    changed = trace.assign_attrs(model="other")
    assert mp.open_trace(changed.probe.save(path, overwrite=True)).attrs["model"] == "other"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot be read: truncated"):
        mp.open_trace(path)
    zarr = trace.probe.save(tmp_path / "run.zarr")
    (zarr / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read"):
        mp.open_trace(zarr)
    foreign = tmp_path / "foreign.zarr"
    xr.Dataset({"a": ("x", [1.0])}, attrs={"title": "not ours"}).to_zarr(foreign, consolidated=False)
    with pytest.raises(ValueError, match=r"not written by mamba_probe"):
        open_dataset(foreign)


def test_a_lazily_open_store_that_was_replaced_is_not_read(tmp_path):
    """Its arrays would be the other recording's, under this one's labels."""
    trace = make_trace()
    path = trace.probe.save(tmp_path / "run.zarr")
    lazy = mp.open_trace(path)
    np.testing.assert_array_equal(lazy["delta"], trace["delta"])
    (trace + 1.0).assign_attrs(trace.attrs).probe.save(path, overwrite=True)
    with pytest.raises(ValueError, match=r"was replaced or removed since it was opened"):
        lazy["delta"].load()
    np.testing.assert_array_equal(mp.open_trace(path)["delta"], trace["delta"] + 1.0)
    netcdf = trace.probe.save(tmp_path / "run.nc")
    lazy = mp.open_trace(netcdf)
    (trace + 1.0).assign_attrs(trace.attrs).probe.save(netcdf, overwrite=True)
    np.testing.assert_array_equal(lazy["delta"], trace["delta"])


def test_a_failing_write_leaves_the_old_store_whole(tmp_path):
    trace = make_trace()
    path = trace.probe.save(tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        trace.assign_attrs(bad=object()).probe.save(path, overwrite=True)
    xr.testing.assert_identical(mp.open_trace(path).load(), trace)
