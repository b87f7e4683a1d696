"""A flipped bit, wherever it is, is found and named; and no store ever gives other numbers than were written."""

import os
import random
import shutil
import warnings

import h5py
import pytest
import recorded
import torch
import xarray as xr
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.cli import app
from mamba_probe.trace import open_dataset, save, store
from mamba_probe.trace.verify import stores_in


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A streamed store, one that grew, one that was saved, and a netCDF file."""
    folder = tmp_path_factory.mktemp("stores")
    with mp.attach(recorded.model()) as probe:
        trace = recorded.record(
            probe, folder / "run.zarr", variables=("delta", "A"), narrow={"delta": "float16"}
        ).load()
        with probe.recording(variables=("delta",), store=folder / "grown.zarr", compress="zstd"), torch.no_grad():
            probe.model(recorded.IDS[:2, :3])
            probe.model(recorded.IDS[:1, :9])
    save(trace, folder / "saved.zarr")
    save(trace, folder / "saved.nc")
    return folder


def flipped(file, offset, bit):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def opened(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_dataset(path).load()


def opened_or_refused(path, true):
    """Whether a store gives its true values, or an error that names it."""
    try:
        found = opened(path)
    except (ValueError, OSError) as error:
        return path.stem in str(error)
    return found.identical(true)


@pytest.mark.parametrize("kind", ["run", "grown", "saved"])
@pytest.mark.parametrize("each", [1, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_every_flipped_bit_is_found(stores, tmp_path, kind, each):
    """None is left out: no byte of a store of ours means nothing."""
    whole, chance = stores / f"{kind}.zarr", random.Random(each)
    true = opened(whole)
    assert mp.verify(whole).whole
    path = shutil.copytree(whole, tmp_path / whole.name)
    tried = 0
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size):
        kept = file.read_bytes()
        for _ in range(each):
            offset, bit = chance.randrange(len(kept)), chance.randrange(8)
            flipped(file, offset, bit)
            name = str(file.relative_to(path))
            report = mp.verify(path)
            assert report.damages, f"bit {bit} of byte {offset} of {name}, {kept[offset]!r}"
            assert any(one.file.removeprefix("/") in ("", name) or name in str(one) for one in report.damages), report
            assert opened_or_refused(path, true)
            file.write_bytes(kept)
            tried += 1
    assert tried > 20 * each
    assert mp.verify(path).whole


@pytest.mark.parametrize("trials", [16, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_netcdf_gives_what_was_written_or_an_error(stores, tmp_path, trials):
    """HDF5's own metadata have no checksum: a flip there may mean nothing, and then the numbers are the true ones."""
    path, chance = tmp_path / "saved.nc", random.Random(trials)
    shutil.copy(stores / "saved.nc", path)
    true, kept, found = opened(path), path.read_bytes(), 0
    for _ in range(trials):
        flipped(path, chance.randrange(len(kept)), chance.randrange(8))
        report = mp.verify(path)
        if report.damages:
            found += 1
        else:
            xr.testing.assert_identical(opened(path), true)
        path.write_bytes(kept)
    assert found > trials / 10
    assert mp.verify(path).whole


@pytest.mark.parametrize("name", ["delta", "position"])
def test_netcdf_values_that_pass_their_checksums_and_were_not_written(stores, tmp_path, monkeypatch, name):
    """As HDF5 gives them where a bit of what it notes of a chunk was flipped: fill values, or zeros found elsewhere."""
    path = shutil.copy(stores / "saved.nc", tmp_path / "saved.nc")
    with h5py.File(path, "a") as file:
        file[name][-1] = 0
    said = rf"{name} gives other values than were written"
    assert said in repr(mp.verify(path))
    with pytest.raises(ValueError, match=rf"saved\.nc.*{said}"):
        open_dataset(path)
    monkeypatch.setattr(store, "CHECKED_BYTES", 1)
    open_dataset(path)  # a large file is compared by `verify` alone
    assert said in repr(mp.verify(path))


def test_a_chunk_is_named_and_its_rows(stores, tmp_path):
    path = shutil.copytree(stores / "run.zarr", tmp_path / "run.zarr")
    flipped(path / "delta" / "c" / "1" / "2" / "0" / "0", 5, 3)
    (path / "phase" / "c" / "1" / "0").unlink()
    os.truncate(path / "delta" / "c" / "0" / "0" / "0" / "0", 3)
    said = repr(mp.verify(path))
    assert "run.zarr: damaged" in said
    assert "`delta`: layer 1, batch 8 to 10, token 0 to 12, channel 0 to 15 (delta/c/1/2/0/0): chunk" in said
    assert "`phase`: batch 4 to 7, token 0 to 12 (phase/c/1/0): chunk phase/c/1/0 is missing" in said
    assert "(delta/c/0/0/0/0)" in said
    shutil.copy(stores / "run.zarr" / "phase" / "c" / "1" / "0", path / "phase" / "c" / "1" / "0")
    with pytest.raises(ValueError, match=r"delta/c/1/2/0/0 is damaged.*mamba-probe verify"):
        mp.open_trace(path)["delta"][1, 9].load()


@pytest.mark.parametrize("change", ["cut", "gone", "other"])
def test_the_journal(stores, tmp_path, change):
    path = shutil.copytree(stores / "run.zarr", tmp_path / "run.zarr")
    entry = path / "journal" / "block-000000001.json"
    if change == "gone":
        entry.unlink()
    else:
        entry.write_bytes(
            entry.read_bytes()[:-4] if change == "cut" else entry.with_stem("block-000000000").read_bytes()
        )
    report = mp.verify(path)
    assert "journal/block-000000001.json" in repr(report)
    if change == "gone":
        assert report.rows == (7, 11)
        with pytest.warns(UserWarning, match="holds 7 of 11 rows"):
            assert mp.open_trace(path)["prompt_id"].values.tolist() == [0, 1, 2, 3, 8, 9, 10]
    else:
        with pytest.raises(ValueError, match="a damaged entry of the journal"):
            mp.open_trace(path)
        entry.unlink()
    with mp.attach(recorded.model()) as probe:
        again = {"variables": ("delta", "A"), "narrow": {"delta": "float16"}, "resume": True}
        recorded.record(probe, path, **again)
    assert recorded.values(path) == recorded.values(stores / "run.zarr")


def test_the_command(stores, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["verify", str(stores)])
    assert done.exit_code == 0, done.output
    assert done.output.count(": whole") == 4
    assert [path.name for path in stores_in(stores)] == ["grown.zarr", "run.zarr", "saved.nc", "saved.zarr"]
    path = shutil.copytree(stores / "run.zarr", tmp_path / "run.zarr")
    (path / "journal" / "block-000000002.json").unlink()
    done = run(app, ["verify", str(path)])
    assert (done.exit_code, "8 of 11 rows are whole" in done.output) == (1, True)
    flipped(path / "delta" / "c" / "0" / "1" / "0" / "0", 0, 0)
    done = run(app, ["verify", str(path), str(stores / "saved.nc")])
    assert (done.exit_code, "delta/c/0/1/0/0" in done.output) == (1, True)
    assert run(app, ["verify", str(tmp_path / "absent.zarr")]).exit_code == 2
    assert run(app, ["verify", str(tmp_path / "journal")]).exit_code == 2


def test_it_holds_one_chunk_at_a_time(stores, monkeypatch):
    """No array is ever read: neither through zarr nor through dask."""
    monkeypatch.setattr("zarr.core.array.Array.__getitem__", None)
    assert mp.verify(stores / "run.zarr").whole
