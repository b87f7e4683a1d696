"""SIGKILL at any moment: a store that opens, each block whole or absent, and resumed to the same bytes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import recorded
import xarray as xr

import mamba_probe as mp


def run(folder, seed, trials, kind):
    told = subprocess.run(
        [sys.executable, recorded.__file__, str(folder), str(seed), str(trials), kind],
        capture_output=True, text=True, timeout=1500, check=True, cwd=Path(mp.__file__).parents[1],
    )  # fmt: skip
    return json.loads(told.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def probe():
    with mp.attach(recorded.model()) as probe:
        yield probe


def assert_part(path, whole):
    """Each block whole or absent: what opens is equal to those rows of the whole. Returns how many rows are there."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        part = mp.open_trace(path).load()
    rows, broken = part.sizes["batch"], part.sizes["batch"] < whole.sizes["batch"]
    assert any("was broken off" in str(each.message) for each in said) == ("broken_off" in part.attrs)
    assert "broken_off" in part.attrs or not broken
    if rows:
        expected = whole.isel(batch=slice(rows), token=slice(part.sizes["token"]))
        known = [name for name in expected.coords if name in part.coords]
        assert {name for name in expected.coords if name not in part.coords} <= {"token_id", "prediction", "parent_row"}
        xr.testing.assert_equal(part, expected.reset_coords(drop=False)[[*part.data_vars, *known]].set_coords(known))
    report = mp.verify(path)
    assert not report.damages
    assert report.rows[0] == rows
    return rows


@pytest.mark.parametrize("trials", [6, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_a_killed_recording_opens_and_resumes_to_the_same_bytes(tmp_path, probe, trials):
    whole = recorded.record_by_two(probe, tmp_path / "whole.zarr").load()
    counts = run(tmp_path, trials, trials, "record")
    assert counts["killed"] > trials / 3
    held = []
    for trial in range(trials):
        path = tmp_path / f"{trial}.zarr"
        if path.exists():  # killed before it was made: nothing is there
            held.append(assert_part(path, whole))
    assert len(set(held)) >= 3, "blocks were there at some kills and not at others, or this test proves little"
    for trial in range(0, trials, 8):
        path = tmp_path / f"{trial}.zarr"
        xr.testing.assert_equal(recorded.record_by_two(probe, path, resume=True).load(), whole)
        assert recorded.values(path) == recorded.values(tmp_path / "whole.zarr")
        assert mp.verify(path).whole


@pytest.mark.parametrize("trials", [1, pytest.param(40, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_killed_again_and_again_it_ends_equal(tmp_path, probe, trials):
    whole = recorded.record_by_two(probe, tmp_path / "whole.zarr").load()
    counts = run(tmp_path, 7, trials, "resume")
    assert counts["killed"] >= trials
    for trial in range(trials):
        xr.testing.assert_equal(mp.open_trace(tmp_path / f"{trial}.zarr").load(), whole)
        assert recorded.values(tmp_path / f"{trial}.zarr") == recorded.values(tmp_path / "whole.zarr")


@pytest.mark.parametrize("trials", [3, pytest.param(300, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_a_growing_store_that_was_killed_opens(tmp_path, probe, trials):
    whole = recorded.grown(probe, tmp_path / "whole.zarr").dataset.load()
    run(tmp_path, trials, trials, "grow")
    held = [assert_part(path, whole) for trial in range(trials) if (path := tmp_path / f"{trial}.zarr").exists()]
    assert len(set(held)) >= 2
