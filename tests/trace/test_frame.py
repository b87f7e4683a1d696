"""A trace as a table: against loops over its entries, without padding, and nothing too large for memory."""

from itertools import product

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe.trace import memory
from mamba_probe.trace.frame import check_table


def trace(family="mamba", **attrs):
    """Two layers, rows of 4 and 2 tokens, 3 channels; every entry is its own number."""
    count = iter(range(10_000))

    def filled(*shape):
        return np.array([next(count) for _ in range(int(np.prod(shape)))], "float32").reshape(shape)

    valid = np.array([[True] * 4, [False, True, True, False]])
    over = ("layer", "batch", "token")
    return xr.Dataset(
        {
            "delta": ((*over, "channel"), filled(2, 2, 4, 3)), "x": ((*over, "channel"), filled(2, 2, 4, 3)),
            "B": ((*over, "group", "state"), filled(2, 2, 4, 1, 2)),
            "A": (("layer", "channel", "state"), -filled(2, 3, 2)),
        },
        {
            "layer": [3, 7], "valid": (("batch", "token"), valid), "call": ("batch", [0, 1]),
            "token_id": (("batch", "token"), np.arange(8).reshape(2, 4)),
            "role": (("batch", "token"), np.array([["key", "value", "key", "query"]] * 2)),
        },
        {"schema_version": 1, "family": family, "n_heads": 3, "n_groups": 1} | attrs,
    )  # fmt: skip


def rows_of(data, names):
    """The rows, one entry after another."""
    array = data[names[0]]
    found = []
    for index in product(*(range(size) for size in array.shape)):
        at = dict(zip(array.dims, index, strict=True))
        if "token" in at and not data["valid"].isel(batch=at["batch"], token=at["token"]):
            continue
        row = {dim: data[dim].values[i] for dim, i in at.items()}
        for name, coord in data.coords.items():
            if name not in at and name != "valid" and set(coord.dims) <= set(at):
                row[name] = coord.isel({dim: at[dim] for dim in coord.dims}).item()
        found.append(row | {name: data[name].isel(at).item() for name in names})
    return pd.DataFrame(found)


@pytest.mark.parametrize("names", [["delta"], ["delta", "x"], ["B"], ["A"]], ids="-".join)
def test_rows_are_the_entries_that_are_no_padding(names):
    data = trace()
    found = data.probe.to_dataframe(names)
    assert len(found) == {"delta": 36, "B": 24, "A": 12}[names[0]]
    expected = rows_of(data, names)
    assert list(found.columns[-len(names) :]) == names
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_like=True, check_categorical=False)


def test_of_some_rows_and_tokens_and_on_dask():
    data = trace()
    one = data.isel(batch=[1])
    assert len(one.probe.to_dataframe("delta")) == 2 * 2 * 3, "two of its tokens are padding"
    assert one.probe.to_dataframe("delta")["token"].drop_duplicates().tolist() == [1, 2]
    few = data.isel(token=[0])
    assert few.probe.to_dataframe("delta")["batch"].drop_duplicates().tolist() == [0]
    chunked = data.chunk(layer=1)
    pd.testing.assert_frame_equal(chunked.probe.to_dataframe("x"), data.probe.to_dataframe("x"))


def test_layers_are_the_models_own_numbers():
    data = trace()
    found = data.probe.to_dataframe("delta", layers=[7])
    assert found["layer"].unique().tolist() == [7]
    np.testing.assert_array_equal(found["delta"], data.probe.to_dataframe("delta").query("layer == 7")["delta"])
    with pytest.raises(ValueError, match="unknown layer 5: known are: 3, 7"):
        data.probe.to_dataframe("delta", layers=[5])


def test_what_is_derived_is_a_column_too():
    data = trace()
    found = data.probe.to_dataframe("A_bar")
    assert list(found.columns) == ["layer", "batch", "token", "channel", "state", "call", "token_id", "role", "A_bar"]
    row = found.query("layer == 7 and batch == 1 and token == 2 and channel == 1 and state == 0")
    expected = np.exp(data["delta"].sel(layer=7)[1, 2, 1] * data["A"].sel(layer=7)[1, 0])
    np.testing.assert_allclose(row["A_bar"], expected, rtol=1e-6)


def test_text_is_stored_once():
    column = trace().probe.to_dataframe("delta")["role"]
    assert column.dtype == "category"
    assert sorted(column.cat.categories) == ["key", "query", "value"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["delta", "B"],
            r"equal dimensions; got delta over \(layer, batch, token, channel\); B over \(layer, .*a table",
        ),
        (["delt"], "unknown variable 'delt': did you mean 'delta'"),
        ([], "equal dimensions; got none"),
        (["B_bar", "delta"], "B_bar over"),
    ],
)
def test_what_makes_no_table_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        trace().probe.to_dataframe(asked)


def test_a_table_larger_than_memory_is_refused_with_its_size(monkeypatch):
    data = trace()
    needs = 36 * (4 * 8 + 8 + 8 + 8 + 4 + 8 * 5)  # dims, call, token_id, role, delta; what making it takes
    with pytest.raises(
        ValueError, match=r"36 rows weighs 2\.16 kB, 3\.6 kB while it is made, and max_memory is 3\.6 kB"
    ):
        data.probe.to_dataframe("delta", max_memory=needs - 1)
    assert len(data.probe.to_dataframe("delta", max_memory=needs)) == 36
    monkeypatch.setattr("mamba_probe.trace.frame.free_memory", lambda: 100)
    with pytest.raises(ValueError, match="100 B of memory are free: ask for fewer variables or layers"):
        data.probe.to_dataframe("delta")


def test_what_is_lazy_is_weighed_before_it_is_read():
    data = trace()
    steps = da.zeros((2, 1000, 10**6, 3), chunks=(1, 1, 10**6, 3), dtype="float32")
    data = xr.Dataset({"delta": (data["delta"].dims, steps)}, {"layer": [3, 7]}, data.attrs)
    with pytest.raises(ValueError, match=r"6,000,000,000 rows weighs \d+ GB"):
        data.probe.to_dataframe("delta", max_memory="8GB")


def test_the_weight_bounds_what_pandas_holds():
    data = trace()
    found = data.probe.to_dataframe("delta")
    held = int(found.drop(columns="role").memory_usage(index=False).sum())
    assert held + 8 * len(found) == 36 * (4 * 8 + 8 + 8 + 8 + 4)
    assert memory.readable(36 * 60) == "2.16 kB"
    check_table(0, 10**9, 3, 1)


def test_a_recording_as_a_table():
    task = mp.tasks.mqar(batch=2, length=16, n_pairs=2, seed=0)
    with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        recorded = probe.record(task, variables=["delta"], channels=[0, 5])
    found = recorded.probe.to_dataframe("delta")
    assert len(found) == 2 * 16 * 2
    mean = found.groupby("role", observed=True)["delta"].mean()
    for role in ("key", "query"):
        expected = recorded["delta"].where(recorded["role"] == role).mean().item()
        np.testing.assert_allclose(mean[role], expected, rtol=1e-6)
