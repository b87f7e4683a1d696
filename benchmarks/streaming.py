"""Recording to disk against the disk's own rate and against recording to memory, and peak memory over rows.

python benchmarks/streaming.py [--device cuda] [--rows 48] [--repeats 3] [--folder DIR] [-o FILE]

A model of little compute and much state: delta, B, C and h of every layer go to a Zarr store. In each round one after
another: plain files written one after the other, the same by as many threads as record writes with, recording to a
store by blocks of 2 and of 8 rows, recording to memory. Whatever is written to disk is synced, file by file, before
the clock is read. Only ratios are printed, medians over the rounds.
"""

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import mamba_probe as mp
from mamba_probe.provenance import versions
from mamba_probe.streaming import WRITERS

VARIABLES = ("delta", "B", "C", "h")
FILE = 2**28
"""Bytes of a plain file."""
LENGTH = 512
BLOCKS = (2, 8)
"""Rows of a model call, and so of a block that is on the disk as one."""
MEMORY = 2**28
"""Bytes on their way to the store, where memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=48, help="of the recording; a row weighs 67 MB")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the first, of warming up, comes before them")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; default: TMPDIR")
    parser.add_argument("-o", "--out", type=Path, help="a page of the results")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.peak:
            print(peak(asked.device, asked.peak, Path(folder)))
            return
        page = report(asked, Path(folder))
    print(page)
    if asked.out:
        asked.out.write_text(page + "\n")


def loaded(device: str) -> nn.Module:
    """Four layers of 512 channels with 16 states, on a stream of 64 features: h weighs more than it costs."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=256, hidden_size=64, expand=8, state_size=16, num_hidden_layers=4, time_step_rank=4
    )  # fmt: skip
    model: Any = MambaForCausalLM(config)
    return model.eval().to(device)


def ids_of(rows: int) -> torch.Tensor:
    """Token ids of so many rows."""
    return torch.randint(0, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def report(asked: argparse.Namespace, folder: Path) -> str:
    """All measurements, as a page."""
    weight, seconds = timed(asked.device, asked.rows, asked.repeats, folder)
    whole = min(seconds["one file"], seconds["files at once"], key=median)
    against = {n: ratios(whole, seconds[f"to disk by {n}"]) for n in BLOCKS}
    memory = {n: ratios(seconds[f"to disk by {n}"], seconds["to memory"]) for n in BLOCKS}
    threads = ratios(seconds["one file"], seconds["files at once"])
    peaks = {rows: peak_of(asked.device, rows, folder) for rows in (4, 40)}
    cpus = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([
        f"# Recording to disk, on a {where}", "",
        f"{cpus}; {known}.",
        f"4 layers of 512 channels with 16 states, {asked.rows} rows of {LENGTH} tokens:"
        f" {', '.join(VARIABLES)}, {weight / 1e9:.2f} GB.",
        f"{asked.repeats} rounds after one of warming up, all in turn within a round; medians, and the range.",
        "Every file is synced before the clock is read, those of the store too, and none is there before.", "",
        "| what | ratio | goal |", "|---|---|---|",
        *(f"| rate of recording to disk, blocks of {n} rows of {weight / asked.rows / 1e6:.0f} MB, / rate of the disk,"
          f" plain files | {said(against[n])} | >= 0.80 |" for n in BLOCKS),
        *(f"| time of recording to disk, blocks of {n} rows, / to memory | {said(memory[n])} | <= 1.25 |"
          for n in BLOCKS),
        f"| the disk's rate with {WRITERS} files at once / one after another | {said(threads)} | |",
        f"| peak memory of 40 rows / of 4, max_memory {MEMORY >> 20} MiB | {peaks[40] / peaks[4]:.2f} | constant |", "",
        "One of the first two goals is to be met. The disk's rate is the better of both ways of writing plain files.",
    ])  # fmt: skip


def timed(device: str, rows: int, repeats: int, folder: Path) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the trace, and seconds of each round by what was done."""
    ids = ids_of(rows)
    with mp.attach(loaded(device)) as probe:
        weight = probe.estimate(ids, variables=VARIABLES).nbytes
        noise = np.random.default_rng(0).integers(0, 256, FILE, dtype=np.uint8)
        store = folder / "run.zarr"

        def to_disk(block: int) -> None:
            probe.record(ids, variables=VARIABLES, batch_size=block, store=store)
            sync(store)

        def to_memory() -> None:
            probe.record(ids, variables=VARIABLES, batch_size=BLOCKS[-1], force=True)

        works: dict[str, Callable[[], object]] = {
            "one file": lambda: plain(folder / "plain", weight, noise, 1),
            "files at once": lambda: plain(folder / "plain", weight, noise, WRITERS),
            **{f"to disk by {n}": partial(to_disk, n) for n in BLOCKS},
            "to memory": to_memory,
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(repeats + 1):
            for name, work in works.items():
                begun = perf_counter()
                work()
                if turn:
                    found[name].append(perf_counter() - begun)
                for left in (store, folder / "plain"):
                    shutil.rmtree(left, ignore_errors=True)
                os.sync()
    return weight, found


def plain(folder: Path, weight: int, noise: np.ndarray, threads: int) -> None:
    """Write as many bytes as plainly as can be, and sync them."""
    folder.mkdir()

    def write(number: int) -> None:
        with (folder / str(number)).open("wb", buffering=0) as file:
            left = memoryview(noise.data)[: min(FILE, weight - number * FILE)]
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(-(-weight // FILE))))


def sync(store: Path) -> None:
    """Have every file of a store on the disk, by as many threads as wrote it."""

    def one(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(one, store.rglob("*")))


def peak(device: str, rows: int, folder: Path) -> int:
    """Bytes that recording added at most to what this process held before, in units of the kernel's count."""
    ids = ids_of(rows)
    with mp.attach(loaded(device)) as probe:
        options = {"variables": VARIABLES, "batch_size": BLOCKS[0], "max_memory": MEMORY}
        probe.record(ids[: BLOCKS[0]], store=folder / "warm.zarr", **options)
        before = held()
        probe.record(ids, store=folder / "run.zarr", **options)
    return max(1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def held() -> int:
    """Bytes of memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(device: str, rows: int, folder: Path) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--peak", str(rows), "--folder", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def said(found: list[float]) -> str:
    """The median, and between what the rounds lie."""
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
