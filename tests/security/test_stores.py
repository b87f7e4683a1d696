"""A Zarr folder or a netCDF file from a stranger: no pickle, no plug-in, no other file, no size beyond memory."""

import json
import os
import pickle
import struct
import time

import dask.array as da
import h5py
import numcodecs
import numpy as np
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe.trace import open_dataset
from mamba_probe.trace.store import save
from mamba_probe.trace.untrusted import check_opened, check_store, loaded


@pytest.fixture(params=[".zarr", ".nc"])
def suffix(request):
    return request.param


def written(path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    text = ("token", np.array(["a", "b", "c", "d"], dtype=object))
    return save(xr.Dataset({"a": (("batch", "token"), values), "t": text}, {"token": np.arange(4)}, {"x": 1}), path)


@pytest.fixture
def store(tmp_path):
    return written(tmp_path / "run.zarr")


@pytest.fixture
def netcdf(tmp_path):
    return written(tmp_path / "run.nc")


def edit(store, change, name="a"):
    """Change an array's metadata, where it stands and where the root repeats it."""
    for path, at in (
        (store / name / "zarr.json", ()),
        (store / "zarr.json", ("consolidated_metadata", "metadata", name)),
    ):
        whole = node = json.loads(path.read_text())
        for key in at:
            node = (node or {}).get(key)
        if node:
            change(node)
            path.write_text(json.dumps(whole))


def test_what_we_write_is_read(tmp_path, suffix):
    back = open_dataset(written(tmp_path / f"run{suffix}"))
    assert back["a"].values.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert back["t"].values.tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("place", ["compressor", "filters", "both", "number"])
def test_a_pickle_codec_is_never_decoded(tmp_path, payload, monkeypatch, watch, place):
    """Zarr 2 may name numcodecs' Pickle; also where numcodecs was told to allow it, nothing of it runs."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    store, codec, vlen = tmp_path / "run.zarr", {"id": "pickle", "protocol": 5}, {"id": "vlen-utf8"}
    (store / "a").mkdir(parents=True)
    kind = {"compressor": (codec, [vlen], "|O", ""), "filters": (None, [codec], "|O", None),
            "both": (codec, [vlen, codec], "|O", ""), "number": (codec, None, "<f8", 0.0)}[place]  # fmt: skip
    compressor, filters, dtype, fill = kind
    (store / ".zgroup").write_text('{"zarr_format": 2}')
    (store / ".zattrs").write_text("{}")
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": dtype, "compressor": compressor,
             "fill_value": fill, "order": "C", "filters": filters}  # fmt: skip
    (store / "a" / ".zarray").write_text(json.dumps(array))
    (store / "a" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["token"]}')
    (store / "a" / "0").write_bytes(pickle.dumps([payload, "|O", (1,)]))
    watch.events.clear()
    with pytest.raises(ValueError, match="is of Zarr 2, whose filters may be pickles"):
        open_dataset(store)
    assert not watch.happened("pickle.find_class", "os.mkdir")
    assert not payload.mark.exists()
    if place == "compressor":
        try:
            xr.open_zarr(store, consolidated=False).load()
        except Exception as error:  # whatever zarr says of what the payload returned
            print(error)
        assert payload.mark.is_dir(), "unguarded it runs, or this test proves nothing"


@pytest.mark.parametrize("codec", ["numcodecs.zlib", "numcodecs.astype", "pickle", "vlen-bytes", "evil"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_codec_that_we_never_write_is_refused(store, codec, inside):
    named = {"name": codec, "configuration": {}}
    shard = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [1, 1], "codecs": [named], "index_codecs": []},
    }
    edit(store, lambda node: node.update(codecs=[shard if inside else named]))
    with pytest.raises(ValueError, match=rf"names the codec '{codec}', which is not decoded"):
        open_dataset(store)


def test_the_metadata_that_the_root_repeats_are_checked_too(store):
    root = json.loads((store / "zarr.json").read_text())
    array = json.loads((store / "a" / "zarr.json").read_text())
    evil = array | {"codecs": [{"name": "evil", "configuration": {}}]}
    for name, each, message in (
        ("a", evil, "names the codec 'evil'"), ("../private", array, "names '../private', which is no array"),
        ("..", array, "no array of this store"), ("b/c", array, "no array of this store"),
        ("/etc", array, "no array of this store"), ("a", {"node_type": "group"}, "no array of this store"),
    ):  # fmt: skip
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {name: each}}
        (store / "zarr.json").write_text(json.dumps(root))
        with pytest.raises(ValueError, match=message):
            open_dataset(store)


def huge(node, shape, chunk):
    node["shape"], node["chunk_grid"]["configuration"]["chunk_shape"] = shape, chunk


@pytest.mark.parametrize(
    ("shape", "chunk", "message"),
    [
        ([10**12, 4], [3, 4], "has .* chunks of .*; at most"),
        ([10**7, 4], [1, 4], "has 10,000,000 chunks"),
        ([2**62, 2**62], [2**40, 2**40], "more than 4,294,967,296 bytes: rechunk"),
        ([2**40, 4], [2**40, 4], "more than 4,294,967,296 bytes: rechunk"),
        ([-1, 4], [3, 4], "whole numbers of at least 0 are needed"),
        ([3, 4], [0, 4], "whole numbers of at least 1 are needed"),
        ([3.5, 4], [3, 4], "whole numbers"), (["3", 4], [3, 4], "whole numbers"), ([3, True], [3, 4], "whole numbers"),
        ([3, 4], [3], "zip|damaged"), (7, [3, 4], "damaged"), ([3, 4], None, "damaged"),
    ],
)  # fmt: skip
def test_sizes_in_zarr_json_have_limits(store, shape, chunk, message):
    edit(store, lambda node: huge(node, shape, chunk))
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        open_dataset(store)
    assert time.process_time() - start < 5


def test_texts_and_coordinates_that_no_memory_holds_are_refused(store):
    """They are read when a store is opened; an array of fill values takes no byte on disk."""
    edit(store, lambda node: huge(node, [10**10], [10**8]), "t")
    edit(store, lambda node: huge(node, [10**10], [10**8]), "token")
    edit(store, lambda node: huge(node, [3, 10**10], [1, 10**8]))
    with pytest.raises(ValueError, match=r"its variables of one dimension would take [\d,]+ bytes of memory; at most"):
        open_dataset(store)
    opened = xr.Dataset(coords={"role": (("batch", "token"), da.zeros((10**5, 10**5), chunks=10**4))})
    with pytest.raises(ValueError, match=r"its coordinates and texts would take [\d,]+ bytes of memory; at most"):
        check_opened(opened)


def test_a_dataset_is_loaded_only_where_memory_holds_it():
    assert loaded(xr.Dataset({"a": ("x", da.ones(3))}))["a"].values.sum() == 3
    with pytest.raises(ValueError, match=r"this store of \['a'\] would take .* bytes"):
        loaded(xr.Dataset({"a": ("x", da.ones(2**40))}))


@pytest.mark.parametrize(
    "kind", ["vlen-bytes", "fixed_length_utf32", {"name": "struct", "configuration": {}}, "object", 7]
)
def test_a_data_type_that_we_never_write_is_refused(store, kind):
    edit(store, lambda node: node.update(data_type=kind))
    with pytest.raises(ValueError, match="has data_type"):
        open_dataset(store)


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "7", "{", '{"node_type": "array"}', '{"a":' * 10**5])
def test_damaged_metadata_are_refused(store, text):
    (store / "a" / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=r"JSON|damaged"):
        open_dataset(store)


@pytest.mark.parametrize("where", ["a/c/0/0", "a", "a/zarr.json", "zarr.json", "a/c"])
def test_no_link_in_a_store_is_followed(store, tmp_path, where, watch):
    (store / where).rename(tmp_path / "private")
    (store / where).symlink_to(tmp_path / "private")
    watch.events.clear()
    with pytest.raises(ValueError, match="is a link: a store of mamba_probe holds files alone"):
        open_dataset(store)
    assert watch.opened(tmp_path / "private") == set()


def test_a_pipe_in_a_store_is_refused(store):
    (store / "a" / "c" / "0" / "0").unlink()
    os.mkfifo(store / "a" / "c" / "0" / "0")
    with pytest.raises(ValueError, match="is no plain file"):
        open_dataset(store)


def test_a_store_that_the_user_links_to_is_read(store, tmp_path):
    (tmp_path / "latest.zarr").symlink_to(store)
    assert open_dataset(tmp_path / "latest.zarr").sizes["token"] == 4


@pytest.mark.parametrize("link", ["external", "soft", "group"])
def test_a_netcdf_link_or_group_is_refused(netcdf, tmp_path, link, watch):
    private = written(tmp_path / "private.nc")
    made = {"external": h5py.ExternalLink(str(private), "/a"), "soft": h5py.SoftLink("/a")}
    with h5py.File(netcdf, "a") as file:
        if link == "group":
            file.create_group("b")["loop"] = file["/"]
        else:
            file["b"] = made[link]
    watch.events.clear()
    with pytest.raises(ValueError, match="b is a link or a group"):
        open_dataset(netcdf)
    assert private not in watch.opened(tmp_path)


@pytest.mark.parametrize("kind", ["external", "virtual"])
def test_netcdf_data_in_other_files_are_refused(netcdf, tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(range(32)))
    with h5py.File(netcdf, "a") as file:
        if kind == "external":
            made = file.create_dataset("b", (4,), "f8", external=[(str(tmp_path / "secret"), 0, 32)])
            assert made[:].tobytes() == bytes(range(32)), "HDF5 itself reads it, or this test proves nothing"
        else:
            layout = h5py.VirtualLayout((4,), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (4,))
            file.create_virtual_dataset("b", layout)
    with pytest.raises(ValueError, match="b is kept in other files"):
        open_dataset(netcdf)


def test_a_netcdf_plug_in_is_refused(netcdf):
    with h5py.File(netcdf, "a") as file:
        file.create_dataset("b", (4,), "f4", chunks=(2,), compression="lzf")
    with pytest.raises(ValueError, match="names HDF5 filter 32000, which is not decoded"):
        open_dataset(netcdf)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"shape": (10**12,), "dtype": "f4", "chunks": (10,)}, "chunks of"),
        ({"shape": (2**40,), "dtype": "f8", "chunks": (2**28,)}, "its variables of one dimension would take"),
        ({"shape": (3,), "dtype": h5py.opaque_dtype(np.dtype("V8"))}, "has data of"),
        ({"shape": (3,), "dtype": h5py.ref_dtype}, "has data of"),
        ({"shape": (3,), "dtype": h5py.vlen_dtype(np.int8)}, "has data of"),
    ],
)
def test_netcdf_sizes_and_types_have_limits(netcdf, made, message):
    with h5py.File(netcdf, "a") as file:
        file.create_dataset("b", **made)
    with pytest.raises(ValueError, match=message):
        check_store(netcdf)


@pytest.mark.parametrize("value", [7, True, [1, 2], {"a": 1}])
def test_an_attribute_that_is_no_text_is_refused(store, value):
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["evil"] = value
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ValueError, match="'evil' is no JSON text"):
        open_dataset(store)


def test_our_traces_pass(tmp_path):
    model = mp.load("zoo:mqar-mamba1")
    with mp.attach(model) as probe:
        trace = probe.record(np.arange(8)[None])
    for suffix in (".zarr", ".nc"):
        check_store(trace.probe.save(tmp_path / f"trace{suffix}"))


def test_a_netcdf_chunk_that_is_lost_is_no_fill_value(netcdf):
    """One flipped bit of HDF5's own metadata can lose one; HDF5 would answer NaN."""
    with h5py.File(netcdf, "a") as file:
        file.create_dataset("lost", (4,), "float32", chunks=(2,), fillvalue=np.nan)
    with pytest.raises(ValueError, match=r"lost is damaged: 0 of its 2 chunks are there"):
        open_dataset(netcdf)


def test_a_netcdf_chunk_elsewhere_or_without_its_checksum_is_not_there(netcdf):
    """As many as there should be; the fill value would be read for the one, of the other bytes that nothing checks."""
    with h5py.File(netcdf, "a") as file:
        made = file.create_dataset("moved", (4,), "float32", chunks=(2,), fletcher32=True, fillvalue=np.nan)
        made[:] = 1
    kept, size = netcdf.read_bytes(), 2 * 4 + 4
    second = struct.pack("<IIQQ", size, 0, 2, 0)  # bytes, filters left out, where it begins, as HDF5 notes them
    assert kept.count(second) == 1
    for elsewhere in (struct.pack("<IIQQ", size, 0, 6, 0), struct.pack("<IIQQ", size, 1, 2, 0)):
        netcdf.write_bytes(kept.replace(second, elsewhere))
        with pytest.raises(ValueError, match=r"moved is damaged: 1 of its 2 chunks are there"):
            open_dataset(netcdf)


def test_zarrs_own_refusal_names_the_store(tmp_path):
    path = save(xr.Dataset({"a": ("layer", [1.0, 2.0])}), tmp_path / "run.zarr")
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"storage_transformers"', '"storige_transformers"'))
    with pytest.raises(ValueError, match=r"run\.zarr.*storige"):
        open_dataset(path)
