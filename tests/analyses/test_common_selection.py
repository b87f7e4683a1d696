"""B and C as a store holds them: numbers, means and chunks read are those of the whole arrays in float64."""

from collections import Counter

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses.common import Canonical, Selection, selection

TOKENS, GROUPS, STATES = 60, 2, 3


def trace(valid=None, chunk=None, read=None, dtype="float32"):
    """Two layers and rows; B and C on dask where there is a `chunk`, each chunk that is read counted in `read`."""
    generator = np.random.default_rng(0)
    place, steps = ("layer", "batch", "token"), (2, 2, TOKENS)
    valid = np.ones((2, TOKENS), bool) if valid is None else valid
    values = {name: generator.standard_normal((*steps, GROUPS, STATES)).astype(dtype) for name in "BC"}
    for name, array in values.items():
        array[:, ~valid] = np.nan
        if chunk:

            def seen(block, block_info=None, name=name):
                read[name, block_info[0]["chunk-location"]] += 1
                return block

            lazy = da.from_array(array, chunks=(1, 1, chunk, GROUPS, STATES))
            values[name] = lazy.map_blocks(seen, dtype=dtype, meta=np.empty((0,) * 5, dtype))
    return xr.Dataset(
        {"delta": ((*place, "channel"), np.ones((*steps, 4), "float32")),
         "A": (("layer", "channel", "state"), -np.ones((2, 4, STATES), "float32")),
         **{name: ((*place, "group", "state"), array) for name, array in values.items()}},
        {"layer": [0, 1], "valid": (("batch", "token"), valid),
         "position": (("batch", "token"), np.where(valid, np.cumsum(valid, axis=1) - 1, -1))},
        {"schema_version": 1, "family": "mamba", "discretization": "euler", "n_heads": 4},
    )  # fmt: skip


def of(data, *queries, order="C", layer=1, row=1):
    return Selection.of(Canonical(data, "delta", "A", "B", "C"), layer, row, queries, order)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_those_of_the_trace(order, dtype):
    data = trace(dtype=dtype)
    found = of(data, 3, 59, order=order)
    B, C = (data[name].values[1, 1] for name in "BC")
    assert found.B.dtype == dtype
    assert found.B.flags[f"{order}_CONTIGUOUS"]
    np.testing.assert_array_equal(found.B, B)
    assert found.C.keys() == {3, 59}
    assert all(found.C[at].tobytes() == C[at].astype(float).tobytes() for at in found.C)
    whole = [np.asarray(of_all.astype(float), order=order).mean(axis=0) for of_all in (B, C)]
    assert found.B_mean.tobytes() == whole[0].tobytes()
    assert found.C_mean.tobytes() == whole[1].tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("most", [1, 50, 10**6])
@pytest.mark.parametrize("chunk", [None, 7, 25])
def test_runs_and_chunks_give_the_same(monkeypatch, chunk, most, order):
    valid = np.ones((2, TOKENS), bool)
    valid[1, :9] = valid[1, 52:] = False
    whole = of(trace(valid), 0, 42, order=order)
    monkeypatch.setattr(selection, "RUN", most)
    found = of(trace(valid, chunk, Counter()), 0, 42, order=order)
    assert found.B.tobytes(order) == whole.B.tobytes(order)
    assert found.B_mean.tobytes() == whole.B_mean.tobytes()
    assert found.C_mean.tobytes() == whole.C_mean.tobytes()
    assert len(found.B) == 43
    np.testing.assert_array_equal(found.C[42], trace(valid)["C"].values[1, 1, 51])


def test_chunks_are_read_once_each_and_of_one_row_only(monkeypatch):
    monkeypatch.setattr(selection, "RUN", 7 * GROUPS * STATES)
    read = Counter()
    of(trace(None, 7, read), 59)
    assert read == {(name, (1, 1, part, 0, 0)): 1 for name in "BC" for part in range(9)}


def test_a_number_that_is_none_is_refused():
    data = trace()
    data["B"].values[1, 1, 33, 0, 0] = np.inf
    with pytest.raises(ValueError, match=r"`B` is NaN or infinite in layer 1, row 1, at valid token 33"):
        of(data, 59)


def test_constants_are_not_spread_over_tokens():
    generator = np.random.default_rng(0)
    data = trace().assign_attrs(family="s4d")
    B, C = generator.standard_normal((2, 2, 4, STATES)) + 1j * generator.standard_normal((2, 2, 4, STATES))
    data = data.drop_vars(["B", "C", "delta"]).assign(
        B=(("layer", "channel", "state"), B.astype("complex64")),
        C=(("layer", "channel", "state"), C.astype("complex64")),
        delta=(("layer", "channel"), np.ones((2, 4), "float32")),
    )
    found = of(data, 5, 59)
    assert found.B.shape == (1, 4, STATES)
    assert found.B.dtype == np.complex128
    np.testing.assert_array_equal(found.B[0], B[1].astype("complex64"))
    assert all(found.C[at] is found.C_mean for at in (5, 59))
    data["C"].values[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="`C` is NaN or infinite in layer 1"):
        of(data, 5)
