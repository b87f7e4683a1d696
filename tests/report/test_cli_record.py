"""`mamba-probe record` streams to disk: what a fault leaves is readable, and gone on with to the same end."""

import re
from collections import namedtuple
from typing import Any

import pytest
import xarray as xr
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.cli import app
from mamba_probe.run import Run, record_task
from mamba_probe.trace import open_dataset
from mamba_probe.trace import stream as streaming

SIZES: dict[str, Any] = {"rows": 6, "length": 16, "n_pairs": 2}
MODEL = ("zoo:mqar-mamba1", "--task", "mqar", "--rows", 6, "--length", 16, "--n-pairs", 2, "--batch-size", 2)
STORES = ("trace.zarr", "twin.zarr", "weights.nc", "parity.nc", "interventions.nc", "twin_weights.nc")


def call(*arguments, **env):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"} | env)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = call("record", *MODEL, "-o", out)
    assert done.exit_code == 0, done.output
    assert re.search(r"recording .* for 1 layer\(s\), 6 x 16 tokens", done.stderr), "what it weighs is said first"
    return out


def values(path):
    """A store in memory, without the time of its making."""
    found = open_dataset(path).load()
    return found.drop_attrs(deep=False).assign_attrs({k: v for k, v in found.attrs.items() if k != "created_at"})


def assert_equal(out, whole):
    for name in STORES:
        xr.testing.assert_identical(values(out / name), values(whole / name))


def test_a_streamed_run_is_the_run_in_memory(whole):
    run = record_task(mp.load("zoo:mqar-mamba1"), "mqar", **SIZES, batch_size=2)
    stored = Run.open(whole)
    assert stored.twin is not None
    assert run.twin is not None
    assert stored.interventions is not None
    assert run.interventions is not None
    for found, expected in (
        (stored.trace, run.trace), (stored.weights, run.weights), (stored.parity, run.parity),
        (stored.interventions, run.interventions), (stored.twin[0], run.twin[0]), (stored.twin[1], run.twin[1]),
    ):  # fmt: skip
        xr.testing.assert_equal(found.load(), expected)
    assert stored.trace.attrs["parity_error"] == run.trace.attrs["parity_error"]


@pytest.mark.parametrize("at", [2, pytest.param(5, marks=pytest.mark.long)])
def test_a_fault_leaves_a_run_that_opens_and_goes_on_to_the_same_end(whole, tmp_path, monkeypatch, at):
    entered = []

    def failing(path, block):
        entered.append(block)
        if len(entered) == at:
            raise OSError("the disk is gone")
        enter(path, block)

    enter = streaming.write_entry
    monkeypatch.setattr(streaming, "write_entry", failing)
    broken = call("record", *MODEL, "-o", tmp_path / "run")
    assert broken.exit_code == 2
    assert "the disk is gone" in broken.stderr
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="broken off"):  # of three blocks of the trace, or three of the twin's
        run = Run.open(tmp_path / "run")
    assert (run.trace.sizes["batch"] < 6) == (at == 2)
    assert (run.twin is None) == (at == 2)
    refused = call("record", *MODEL, "-o", tmp_path / "run")
    assert refused.exit_code == 2
    assert "holds an earlier run" in refused.stderr
    done = call("record", *MODEL, "-o", tmp_path / "run", "--resume")
    assert done.exit_code == 0, done.output
    assert_equal(tmp_path / "run", whole)


def test_each_process_of_torchrun_records_its_share(whole, tmp_path):
    for rank in ("0", "1"):
        done = call("record", *MODEL, "-o", tmp_path / "run", RANK=rank, WORLD_SIZE="2")
        assert done.exit_code == 0, done.output
        assert ("run:" in done.stdout) == (rank == "0"), "the first alone prints"
    assert_equal(tmp_path / "run", whole)


Disk = namedtuple("Disk", "total used free")


def test_what_the_disk_cannot_hold_is_refused_unless_forced(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Disk(1000, 990, 10))
    refused = call("record", *MODEL, "-o", tmp_path / "run")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert call("record", *MODEL, "-o", tmp_path / "run", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--overwrite"], "choose one"),
        (["--max-memory", "much"], "a size is a number of bytes"),
        (["--max-memory", "1kB"], "more than max_memory"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    done = call("record", *MODEL, "-o", tmp_path / "run", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "run" / "trace.zarr").exists()


def test_another_recording_is_not_gone_on_with(whole):
    done = call("record", *MODEL, "--seed", 1, "-o", whole, "--resume")
    assert done.exit_code == 2
    assert "holds another recording" in done.stderr


def test_under_torchrun_nothing_is_overwritten_and_no_report_is_made(tmp_path):
    ranked = {"RANK": "0", "WORLD_SIZE": "2"}
    assert "choose one" in call("record", *MODEL, "-o", tmp_path / "a", "--overwrite", **ranked).stderr
    assert "only `record` runs" in call("report", *MODEL[:-2], "-o", tmp_path / "b", **ranked).stderr
