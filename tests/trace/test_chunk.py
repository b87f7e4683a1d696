"""A chunk that we write lies in the bytes that Zarr gives it; a fault leaves nothing half written."""

import errno
import os

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from mamba_probe.trace.chunk import flush, write_chunk

SHAPE = (1, 3, 4, 5)


def array(path, dtype):
    return zarr.create_array(
        store=path, shape=(2, 6, 8, 5), chunks=SHAPE, dtype=dtype, serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()], filters=None, fill_value=0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8"])
@pytest.mark.parametrize("form", ["as it lies", "strided", "Fortran"])
def test_it_has_the_bytes_of_zarr(tmp_path, dtype, form):
    values = (100 * np.random.default_rng(3).standard_normal((1, 3, 8, 5))).astype(dtype)[:, :, :4]
    if form != "strided":
        values = np.asfortranarray(values) if form == "Fortran" else values.copy()
    theirs, ours = array(tmp_path / "theirs.zarr", dtype), array(tmp_path / "ours.zarr", dtype)
    theirs[1:2, 3:6, 4:8] = values
    write_chunk(tmp_path / "ours.zarr", (1, 1, 1, 0), values)
    assert values.flags.writeable, "the caller's own values are left as they were"
    files = {
        store: {file.relative_to(tmp_path / store): file.read_bytes() for file in (tmp_path / store).rglob("c/*/*/*/*")}
        for store in ("theirs.zarr", "ours.zarr")
    }
    assert len(files["ours.zarr"]) == 1
    assert files["ours.zarr"] == files["theirs.zarr"]
    np.testing.assert_array_equal(ours[1:2, 3:6, 4:8], values)


def test_a_system_that_takes_little_at_a_time(tmp_path, monkeypatch):
    values, write = np.arange(60, dtype=np.float32).reshape(SHAPE), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    made = array(tmp_path / "a.zarr", "float32")
    write_chunk(tmp_path / "a.zarr", (0, 0, 0, 0), values)
    np.testing.assert_array_equal(made[0:1, :3, :4], values)


@pytest.mark.parametrize("call", ["write", "replace"])
def test_a_fault_leaves_the_chunk_of_before(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    made, before = array(tmp_path / "a.zarr", "float32"), np.ones(SHAPE, np.float32)
    write_chunk(tmp_path / "a.zarr", (0, 0, 0, 0), before)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_chunk(tmp_path / "a.zarr", (0, 0, 0, 0), np.zeros(SHAPE, np.float32))
    monkeypatch.undo()
    np.testing.assert_array_equal(made[0:1, :3, :4], before)
    assert [file.name for file in (tmp_path / "a.zarr/c/0/0/0").iterdir()] == ["0"]


def test_what_cannot_be_flushed_is_an_error(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"1")
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino) or fsync(handle))
    flush(files)
    assert sorted(flushed) == sorted(file.stat().st_ino for file in files)
    files[1].unlink()
    with pytest.raises(FileNotFoundError):
        flush(files)
