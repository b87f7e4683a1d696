"""Several processes record one store: the same bytes as one process, whoever is killed, and never two jobs at once."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe import to_store
from mamba_probe.trace.blocks import committed
from mamba_probe.trace.stream import Layout, Stream

REPO = Path(__file__).parents[2]
TASK: dict[str, Any] = {"batch": 10, "length": 16, "n_pairs": 2, "seed": 0}


def record(path, shard=None, **options):
    """As a process of its own would."""
    with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        options = {"batch_size": 2, "resume": True} | options
        return probe.record(mp.tasks.mqar(**TASK), store=path, shard=shard, **options)


def held(path):
    """Every file of a store by its place, and its bytes; locks and what killed processes left are no data."""
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in files
        if not file.name.startswith("shard-") and file.suffix != ".partial"
    }


def assert_equal(path, whole):
    found, expected = held(path), held(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] in ([], ["zarr.json"])
    assert timeless(found["zarr.json"]) == timeless(expected["zarr.json"])
    a, b = (mp.open_trace(each).load().assign_attrs(created_at="") for each in (path, whole))
    xr.testing.assert_identical(a, b)


def timeless(root):
    """A store's metadata without the time of its making, and the seal, which is of that too."""
    root = json.loads(root)
    root["attributes"] = {k: v for k, v in root["attributes"].items() if k not in ("created_at", "header_sha256")}
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    record(path)
    return path


@pytest.fixture
def begun(tmp_path):
    """A store of which the first of two processes has done its share."""
    record(tmp_path / "run.zarr", (0, 2))
    return tmp_path / "run.zarr"


def joined(path, shard):
    """The store as a process holds it that is still writing."""
    return Stream.resume(path, Layout(2, TASK["batch"]), identity(path), shard)


def identity(path):
    attrs = json.loads((path / "zarr.json").read_text())["attributes"]
    return json.loads(json.loads(attrs["recording"]))


def test_the_shares_of_a_recording_are_the_whole_bit_for_bit(whole, begun):
    assert [block.number for block in committed(begun)] == [0, 2, 4]
    record(begun, (1, 2))
    assert_equal(begun, whole)


def test_another_number_of_processes_goes_on(whole, begun):
    for part in range(3):
        record(begun, (part, 3))
    assert_equal(begun, whole)


@pytest.mark.filterwarnings("ignore:.*the recording was broken off")  # filters are one for all threads
def test_shares_at_the_same_time_label_one_store(tmp_path):
    def edited(path, shard=None):
        with mp.attach(mp.load("zoo:mqar-mamba1")) as probe, probe.edit(mp.ablate("conv")):
            probe.record(mp.tasks.mqar(**TASK), store=path, batch_size=1, shard=shard)

    edited(tmp_path / "whole.zarr")
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(edited, tmp_path / "run.zarr", (part, 3)) for part in range(3)]:
            done.result()
    assert_equal(tmp_path / "run.zarr", tmp_path / "whole.zarr")
    assert mp.open_trace(tmp_path / "run.zarr").attrs["edits"] == "ablate(conv)"


def test_a_share_is_recorded_by_one_process(begun):
    writer = joined(begun, (1, 2))
    with pytest.raises(ValueError, match="another process is writing"):
        record(begun, (1, 2))
    writer.close()
    record(begun, (1, 2))


@pytest.mark.parametrize("shard", [(0, 3), (2, 3), (0, 1)])
def test_a_job_of_another_size_is_refused_while_one_writes(begun, whole, shard):
    writer = joined(begun, (1, 2))
    with pytest.raises(ValueError, match="another process is writing"):
        record(begun, shard)
    assert [block.number for block in committed(begun)] == [0, 2, 4]
    writer.close()


def test_a_process_without_a_share_is_refused_while_one_writes(begun):
    writer = joined(begun, (1, 2))
    with pytest.raises(ValueError, match="another process is writing"):
        record(begun)
    writer.close()


def test_a_process_with_a_share_is_refused_while_one_without_writes(begun, monkeypatch):
    monkeypatch.setattr("mamba_probe.trace.writers.GRACE", 0.1)
    writer = joined(begun, None)
    with pytest.raises(ValueError, match="another process is writing"):
        record(begun, (1, 2))
    writer.close()


def test_the_first_to_come_back_sweeps_and_the_others_do_not(begun):
    left = begun / "delta" / "c" / "0.0123.partial"
    left.write_bytes(b"half a chunk")
    writer = joined(begun, (0, 2))
    assert not left.exists()
    left.write_bytes(b"on its way")
    other = joined(begun, (1, 2))
    assert left.exists()
    writer.close()
    other.close()


def test_who_waits_for_the_first_process_gives_up_with_words(tmp_path, monkeypatch):
    monkeypatch.setattr(to_store, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match=r"was not made within .* is the process of shard 0 running"):
        record(tmp_path / "run.zarr", (1, 2))


def test_what_a_process_left_that_was_killed_while_it_made_the_store_is_in_nobodys_way(whole, tmp_path):
    half = tmp_path / "partial.run.zarr"
    half.mkdir()
    (half / "zarr.json").write_text("{")
    record(tmp_path / "run.zarr")
    assert not half.exists()
    assert_equal(tmp_path / "run.zarr", whole)


def test_rank_and_world_size_are_torchruns(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert mp.shard() == (1, 3)


# -- with torchrun itself ----------------------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
from pathlib import Path
from mamba_probe.trace import stream
enter, mark, entered = stream.write_entry, Path(sys.argv.pop(1)), []
def killing(path, block):
    entered.append(block)
    if os.environ.get("RANK") == "1" and len(entered) == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    enter(path, block)
stream.write_entry = killing
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
EXAMPLE = REPO / "examples" / "record_many_gpus.py"
ROWS = ("--rows", "24", "--length", "32", "--batch-size", "2")


def torchrun(processes, *script, options=()):
    """The command, ended; its output is one text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *options, *map(str, script)], cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By one process, without torchrun."""
    path = tmp_path_factory.mktemp("alone") / "run.zarr"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    subprocess.run(
        [sys.executable, EXAMPLE, *ROWS, "-o", path], check=True, cwd=REPO,
        env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return path


@pytest.mark.long
def test_two_processes_of_torchrun_equal_one(alone, tmp_path):
    done = torchrun(2, EXAMPLE, *ROWS, "-o", tmp_path / "run.zarr")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("process(es)") == 1, "rank 0 alone prints"
    assert "broken off" not in done.stdout
    assert_equal(tmp_path / "run.zarr", alone)


@pytest.mark.long
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_killed_process_costs_nothing_but_time(alone, tmp_path, restarts):
    (tmp_path / "killing.py").write_text(KILLED)
    script = (tmp_path / "killing.py", tmp_path / "killed", EXAMPLE, *ROWS, "-o", tmp_path / "run.zarr")
    done = torchrun(2, *script, options=("--max-restarts", str(restarts)))
    assert (tmp_path / "killed").exists()
    assert f"-{int(signal.SIGKILL)}" in done.stdout or "SIGKILL" in done.stdout
    if not restarts:
        assert done.returncode != 0
        with pytest.warns(UserWarning, match="broken off"):
            part = mp.open_trace(tmp_path / "run.zarr")
        rows = part["prompt_id"].values
        assert 0 < len(rows) < 24
        np.testing.assert_array_equal(part["delta"], mp.open_trace(alone)["delta"].isel(batch=rows))
        done = torchrun(3, *script)  # another number of processes, too
    assert done.returncode == 0, done.stdout
    assert_equal(tmp_path / "run.zarr", alone)


@pytest.mark.long
def test_a_second_job_is_refused_while_the_first_writes(alone, tmp_path):
    record(tmp_path / "run.zarr", (0, 2))
    writer = joined(tmp_path / "run.zarr", (0, 2))
    done = torchrun(3, EXAMPLE, *ROWS, "-o", tmp_path / "run.zarr")
    assert done.returncode != 0
    assert "another process is writing" in done.stdout
    writer.close()
