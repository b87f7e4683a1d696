"""A full disk, a lost GPU, a slow disk, a second writer: what is whole stays whole, and the fault is said, soon."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import recorded
import torch
import xarray as xr
from recorded import IDS, MASK

import mamba_probe as mp
from mamba_probe.keeping import Courier
from mamba_probe.streaming import StreamSink
from mamba_probe.trace import save, stream
from mamba_probe.trace.blocks import write_entry
from mamba_probe.trace.memory import n_bytes
from mamba_probe.trace.stream import Stream

pytestmark = pytest.mark.timeout(240)
MANY = torch.randint(1, 41, (40, 13), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def probe():
    with mp.attach(recorded.model()) as probe:
        yield probe


@pytest.fixture
def calls(probe):
    """How often the model ran."""
    count = []
    probe.model.register_forward_pre_hook(lambda *_: count.append(1))
    return count


def ended(path, probe, rows, **options):
    """A broken-off store holds these rows, and resumes to the bytes of an uninterrupted run."""
    with pytest.warns(UserWarning, match="was broken off"):
        part = mp.open_trace(path).load()
    whole = probe.record(MANY, batch_size=2, store=path.with_name("whole.zarr"), **options)
    assert part.sizes["batch"] == rows if isinstance(rows, int) else part.sizes["batch"] in rows
    if part.sizes["batch"]:
        xr.testing.assert_equal(part["delta"], whole["delta"][:, : part.sizes["batch"]])
    assert not mp.verify(path).damages
    xr.testing.assert_equal(probe.record(MANY, batch_size=2, store=path, resume=True, **options).load(), whole.load())
    assert recorded.values(path) == recorded.values(path.with_name("whole.zarr"))


def test_a_lost_device_leaves_the_blocks_before_it(probe, calls, tmp_path):
    def lost(*_):
        if len(calls) == 6:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    handle = probe.model.backbone.layers[1].register_forward_pre_hook(lost)
    with pytest.raises(torch.AcceleratorError, match="unspecified launch"):
        probe.record(MANY, batch_size=2, store=tmp_path / "run.zarr")
    handle.remove()
    before = len(calls)
    ended(tmp_path / "run.zarr", probe, 10)
    assert len(calls) - before == 20 + 15, "the whole one, and of the other what it lacked"


def test_copies_that_never_arrive_are_a_fault_and_no_hang(probe, tmp_path, monkeypatch):
    sent, send = [], Courier.send

    class Event:
        def synchronize(self):
            raise RuntimeError("CUDA error: device-side assert triggered")

    def sending(self, target, source):
        send(self, target, source)
        sent.append(1)
        if len(sent) > 12:
            self._under_way.append((Event(), target, source))
            return Event()
        return None

    monkeypatch.setattr(Courier, "send", sending)
    with pytest.raises(RuntimeError, match="device-side assert"):
        probe.record(MANY, batch_size=2, store=tmp_path / "run.zarr")
    monkeypatch.undo()
    ended(tmp_path / "run.zarr", probe, range(4, 10))


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("growing", [False, True], ids=["record", "recording"])
def test_an_entry_comes_when_all_of_its_block_is_on_the_disk(growing, compress, probe, tmp_path, monkeypatch):
    """Each file of its rows was flushed after its last byte, and nothing has written it since."""
    path, on_disk, seen, fsync = tmp_path / "run.zarr", {}, set(), os.fsync

    def noting(handle):
        fsync(handle)
        on_disk[os.fstat(handle).st_ino] = now(os.fstat(handle))

    def now(found):
        return found.st_size, found.st_mtime_ns

    def files(block=None):
        """Chunks, of a block alone if one is given."""
        for file in path.glob("*/c/**/*"):
            name, _, *place = file.relative_to(path).parts
            dims = json.loads((path / name / "zarr.json").read_text())["dimension_names"]
            if not file.is_file() or (block and "batch" not in dims):
                continue
            first = int(place[dims.index("batch")]) * (1 if growing else 4) if block else 0
            if block is None or block.first <= first < block.first + block.rows:
                yield file

    def entered(store, block):
        found = {file: on_disk.get(file.stat().st_ino) == now(file.stat()) for file in files(block)}
        assert found
        assert all(found.values()), found
        seen.update(found)
        write_entry(store, block)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(stream, "write_entry", entered)
    (recorded.grown if growing else recorded.record)(probe, path, compress=compress)
    assert all(on_disk.get(file.stat().st_ino) == now(file.stat()) for file in files()), "constants, later tokens"
    assert {file.relative_to(path).parts[0] for file in seen} >= {"delta", "B", "out", "token_id", "valid"}


def test_a_fault_of_a_writer_stops_the_model_within_two_blocks(probe, calls, tmp_path, monkeypatch):
    put = Stream.put

    def full(self, name, layer, first, *given):
        if first >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, name, layer, first, *given)

    monkeypatch.setattr(Stream, "put", full)
    with pytest.raises(OSError, match=r"no space is left for .*run.zarr. It opens.*resume=True") as error:
        probe.record(MANY, batch_size=2, store=tmp_path / "run.zarr")
    assert error.value.errno == errno.ENOSPC
    assert len(calls) <= 4 + 3, "block 3 failed: of 20, the model ran on few more"
    monkeypatch.undo()
    ended(tmp_path / "run.zarr", probe, 6)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mamba_probe")]


def test_a_full_disk_by_a_limit_on_files(probe, tmp_path):
    """The kernel refuses a file of more bytes than a process may write: as a full disk does, in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=r"no space is left for .*run.zarr"):
            probe.record(MANY[:9], batch_size=4, variables=("delta",), store=tmp_path / "run.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run.zarr").exists() or mp.verify(tmp_path / "run.zarr").rows[0] == 0


FULL = """
import sys; sys.path.insert(0, {tests!r})
import errno, pathlib, recorded, torch, warnings
import mamba_probe as mp
torch.set_num_threads(1); warnings.simplefilter("ignore")
path, filler = pathlib.Path({disk!r}) / "run.zarr", pathlib.Path({disk!r}) / "filler"
filler.write_bytes(bytes({filler}))
ids = torch.randint(1, 41, (24, 64), generator=torch.Generator().manual_seed(6))
with mp.attach(recorded.model()) as probe:
    try:
        probe.record(ids, batch_size=2, store=path, force=True)
    except OSError as error:
        assert error.errno == errno.ENOSPC and "resume=True" in str(error), error
    else:
        raise AssertionError("it was not full")
    if path.exists():
        part = mp.open_trace(path).load()
        assert not mp.verify(path).damages, mp.verify(path)
        print("rows", part.sizes["batch"])
    else:
        print("rows 0")
    filler.unlink()
    whole = probe.record(ids, batch_size=2)
    again = probe.record(ids, batch_size=2, store=path, resume=True).load()
    assert all((again[name].values == whole[name].values).all() for name in whole.variables)
    assert mp.verify(path).whole and not list(path.rglob("*.partial"))
"""


def mounts():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not mounts(), reason="this system lets nobody mount a small disk; the faulty store above stands in")
@pytest.mark.parametrize("filler", [1_550_000, pytest.param(1_950_000, marks=pytest.mark.long)])
def test_a_disk_that_is_really_full(tmp_path, filler):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = FULL.format(tests=str(Path(__file__).parent), disk=str(disk), filler=filler)
    command = f'mount -t tmpfs -o size=2m none {disk} && exec {sys.executable} -c "$SCRIPT"'
    told = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], env=os.environ | {"SCRIPT": script}, capture_output=True, text=True,
        cwd=Path(mp.__file__).parents[1], timeout=200,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    assert "rows" in told.stdout


@contextmanager
def killing(process):
    """Ends the process in the end, whatever failed."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_writer_is_refused_and_the_next_one_goes_on(probe, tmp_path):
    path = tmp_path / "run.zarr"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import recorded, pathlib, time, torch, mamba_probe as mp\n"
        "torch.set_num_threads(1); probe = mp.attach(recorded.model()); count = []\n"
        "def hold(*_):\n    count.append(1)\n    if len(count) == 3: print('held', flush=True); time.sleep(600)\n"
        "probe.model.register_forward_pre_hook(hold)\n"
        f"recorded.record(probe, pathlib.Path({str(path)!r}))\n"
    )
    with killing(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)) as other:
        assert other.stdout.readline() == "held\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"another process is writing to .*run.zarr: wait for it"):
                recorded.record(probe, path, **options)
        with pytest.raises(ValueError, match=r"another process is writing to"):
            save(xr.Dataset(), path, overwrite=True)
        other.kill()
    recorded.record(probe, path, resume=True)
    recorded.record(probe, tmp_path / "whole.zarr")
    assert recorded.values(path) == recorded.values(tmp_path / "whole.zarr")


def test_a_second_probe_of_this_process_is_refused(probe, tmp_path):
    path = tmp_path / "run.zarr"
    with mp.attach(recorded.model()) as other:
        with other.recording(store=path), torch.no_grad():
            other.model(IDS[:1])
            other.model(IDS[:1])
            with pytest.raises(ValueError, match=r"another process is writing to"):
                recorded.record(probe, path, overwrite=True)
        with probe.recording(), pytest.raises(ValueError, match="a recording is already open"):
            recorded.record(probe, path, overwrite=True)
        assert mp.open_trace(path).sizes["batch"] == 2, "refused before anything was removed"


def test_a_finished_store_runs_no_model_and_leftovers_go(probe, calls, tmp_path):
    path = tmp_path / "run.zarr"
    first = recorded.record(probe, path).load()
    ran = len(calls)
    (path / "delta" / "c" / "0" / "0" / "0" / "0.abc.partial").write_bytes(b"left")
    (path / "journal" / "block-000000009.json.1.partial").write_bytes(b"left")
    xr.testing.assert_identical(recorded.record(probe, path, resume=True).load(), first)
    assert len(calls) == ran
    assert not list(path.rglob("*.partial"))
    with pytest.raises(ValueError, match=r"run.zarr exists"):
        recorded.record(probe, path)
    with pytest.raises(ValueError, match="choose one"):
        recorded.record(probe, path, overwrite=True, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ids": IDS.flip(0)}, {"inputs"}), ({"mask": None}, {"inputs"}), ({"batch_size": 3}, {"batch_size"}),
        ({"variables": ("delta",)}, {"variables"}), ({"layers": [1]}, {"layers"}), ({"tokens": [0, 1]}, {"tokens"}),
        ({"channels": [1]}, {"channels"}), ({"compress": "zstd"}, {"compress"}),
        ({"narrow": {"B": "float16"}}, {"narrow"}),
        ({"ids": IDS[:5], "mask": MASK[:5]}, {"inputs", "rows"}), ({"edit": True}, {"edits"}), ({"seed": 1}, {"model"}),
        ({"dtype": torch.float64}, {"model", "dtype"}), ({"backend": "naive"}, {"backend"}),
        ({"threads": 2}, {"device"}),
    ],
    ids=lambda given: "-".join(sorted(given)),
)  # fmt: skip
def test_another_recording_is_refused_and_each_difference_named(tmp_path, change, named):
    options = {"batch_size": 4, "variables": ("delta", "B"), "store": tmp_path / "run.zarr"}
    with mp.attach(recorded.model(), backend="cpu") as probe:
        probe.record(IDS, MASK, **options)
    made = recorded.model(seed=change.pop("seed", 0), dtype=change.pop("dtype", torch.float32))
    ids, mask = change.pop("ids", IDS), change.pop("mask", MASK)
    torch.set_num_threads(change.pop("threads", 1))
    with mp.attach(made, backend=change.pop("backend", "cpu")) as probe:
        edits = [mp.scale("delta", 2.0, layer=0)] if change.pop("edit", False) else []
        with (
            pytest.raises(ValueError, match="holds another recording, so it cannot be resumed") as error,
            probe.edit(*edits),
        ):
            probe.record(ids, mask, resume=True, **options | change)
    said = str(error.value).partition("resumed: ")[2]
    assert {part.partition(":")[0] for part in said.split("; ")} == named, said


def test_an_edit_by_another_array_is_another_recording(probe, tmp_path):
    for resume, value, of in ((False, 2.0, None), (True, 3.0, "edits: ")):
        edit = mp.assign("delta", torch.full((16,), value), layer=0)
        with probe.edit(edit):
            if of is None:
                recorded.record(probe, tmp_path / "run.zarr", resume=resume)
            else:
                with pytest.raises(ValueError, match=of):
                    recorded.record(probe, tmp_path / "run.zarr", resume=resume)


# -- memory --------------------------------------------------------------------------------------------------------


def test_bytes_under_way_never_exceed_the_limit_and_a_slow_disk_holds_the_model_back(
    probe, calls, tmp_path, monkeypatch
):
    most, seen, under_way, put, write = 9000, [], [0], Stream.put, StreamSink._write
    post, lock, ran = StreamSink.post, threading.Lock(), []

    def posting(self, block, name, first, target, arrived):
        with lock:
            under_way[0] += target.nbytes
            seen.append(under_way[0])
        post(self, block, name, first, target, arrived)

    def writing(self, block, name, first, target, arrived):
        done = write(self, block, name, first, target, arrived)
        with lock:
            under_way[0] -= target.nbytes
        return done

    def slow(self, *given):
        time.sleep(0.01)
        ran.append(len(calls))
        return put(self, *given)

    monkeypatch.setattr(StreamSink, "post", posting)
    monkeypatch.setattr(StreamSink, "_write", writing)
    monkeypatch.setattr(Stream, "put", slow)
    probe.record(MANY, batch_size=2, max_memory=most, store=tmp_path / "run.zarr")
    assert max(seen) <= most
    assert max(seen) > most / 2, "it is used"
    behind = [ahead - done // 6 for done, ahead in enumerate(ran)]  # 6: layers x variables of a block
    assert max(behind) <= 5, "a block weighs 5 kB: two of them, and those that wait for their entry"


def test_too_small_a_limit_names_the_rows_that_fit(probe, tmp_path):
    with pytest.raises(
        ValueError, match=r"`delta` of 4 row\(s\) weighs 3.33 kB, more than max_memory=2 kB: pass batch_size=2 or less"
    ):
        probe.record(MANY, batch_size=4, max_memory=2000, store=tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=r"pass fewer tokens or channels, or a larger max_memory"):
        probe.record(MANY, max_memory=800, store=tmp_path / "run.zarr")
    assert probe.record(MANY, max_memory="4kB", store=tmp_path / "run.zarr")["delta"].data.chunksize[1] == 1
    with pytest.raises(
        ValueError, match=r"the trace weighs .*, and max_memory is 2 kB: stream it with store='run.zarr'"
    ):
        probe.record(MANY, max_memory=2000)
    assert probe.record(MANY, max_memory=2000, force=True).sizes["batch"] == 40
    for wrong in (0, -1, "8 apples", True, "0GB"):
        with pytest.raises(ValueError, match="a size is a number of bytes"):
            n_bytes(wrong)


def test_what_the_disk_does_not_hold_is_refused(probe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _place: shutil._ntuple_diskusage(10**6, 10**6, 10**4))
    with pytest.raises(ValueError, match=r"the trace weighs .* and .* has 10 kB left: .*force=True"):
        recorded.record(probe, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()
    recorded.record(probe, tmp_path / "run.zarr", force=True)


PEAK = """
import json, pathlib, re, sys, torch; sys.path.insert(0, sys.argv[1])
import recorded, mamba_probe as mp
torch.set_num_threads(1)
path = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
ids = torch.randint(1, 41, (2 * int(sys.argv[2]), 512), generator=torch.Generator().manual_seed(6))
with mp.attach(recorded.model(n_layer=4)) as probe:
    options = {"variables": ("delta", "x", "h", "B"), "batch_size": 2}
    probe.record(ids, store=path, max_memory="4MB" if path else None, **options)
    status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would hold what the test's own process has too
    print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024)
"""


def peak(blocks, *path):
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(blocks), *map(str, path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(mp.__file__).parents[1])
    return int(told.stdout)


@pytest.mark.long
def test_peak_memory_does_not_grow_with_the_rows(tmp_path):
    """Ten times the rows: at most 30 MB more, where the trace in memory takes four times that more.

    30 MB is what the allocator's arenas, one a thread, come to hold of the chunks under way: 21 MB were measured from 4
    blocks to 20, and none from there to 40.
    """
    more = 72 * 2 * 512 * 4 * 4 * (16 + 16 + 16 * 4 + 4)
    short, long, held = peak(8, tmp_path / "short.zarr"), peak(80, tmp_path / "long.zarr"), peak(80)
    assert long - short < 30e6, (short, long)
    assert held - short > 0.8 * more > 90e6, (short, held, more)
