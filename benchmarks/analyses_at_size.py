"""The analyses on a trace of the size of Mamba-130m at 32,768 tokens: seconds and memory a layer, from a Zarr store.

    python benchmarks/analyses_at_size.py record DIR                 # on a GPU machine: one row of mqar
    python benchmarks/analyses_at_size.py measure DIR NAME... -o OUT # one process a layer; OUT/NAME.md

Each process computes on one thread (BLAS, and dask's synchronous scheduler) and may allocate LIMIT beyond what its
imports take, less than the store's 4.9 GB: the trace is larger than its memory. One more process loads layer 0
whole, without that limit: its answers must be the same. Two take a quarter and a half of the tokens. OUT/NAME.md is a
row of the table in benchmarks/results/analyses-at-size.md; OUT/NAME.json has the figures of each process.
"""

import argparse
import json
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

TOKENS, LAYERS, LIMIT = 32_768, 24, 4 * 2**30
NAMES = ("hidden_attention", "wavelet_alignment", "memory_horizon", "recall_circuit")
RECALL_LAYERS = (0, 23)  # whose scan inputs, gates and outputs are recorded too
TOLERANCE = 1e-9  # of the largest number of a result: sums over blocks of a store, or over the row at once


def record(directory: Path) -> None:
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    import mamba_probe as mp
    from mamba_probe.trace.store import save

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=768, num_hidden_layers=LAYERS, state_size=16, vocab_size=1024)
    model = MambaForCausalLM(config).cuda().eval()
    task = mp.tasks.mqar(batch=1, length=TOKENS, n_pairs=8, vocab=1024, seed=0)
    with mp.attach(model) as probe:
        for name, layers, more in (("trace", None, ()), ("recall", RECALL_LAYERS, ("x", "z", "y", "u", "out"))):
            start = time.perf_counter()
            trace = probe.record(task, variables=("delta", "A", "B", "C", *more), layers=layers)
            recorded = time.perf_counter()
            save(trace, directory / f"{name}.zarr", overwrite=True)
            seconds = f"recorded in {recorded - start:.1f} s, stored in {time.perf_counter() - recorded:.1f} s"
            print(f"{name}: {trace.nbytes / 1e9:.2f} GB, {seconds}", flush=True)
        save(probe.weights(), directory / "weights.zarr", overwrite=True)


def job(directory: Path, name: str, layer: int, tokens: int, whole: bool) -> dict:
    """Measure one layer; `whole` loads it first. Of layer 0 the answers are returned too."""
    from importlib import import_module

    import dask.config

    import mamba_probe as mp
    from mamba_probe.trace.store import open_dataset

    dask.config.set(scheduler="synchronous")
    analysis = import_module(f"mamba_probe.analyses.{name}")
    trace = mp.open_trace(directory / ("recall.zarr" if name == "recall_circuit" else "trace.zarr"))
    trace = trace.sel(layer=[layer]).isel(token=slice(tokens))
    options = {}
    if name == "recall_circuit":
        trace = trace.assign_coords(prediction=trace["target"])  # else a random model has no circuit to score
        options["weights"] = open_dataset(directory / "weights.zarr").sel(layer=[layer]).load()
    elif name == "hidden_attention":
        options["query_tokens"] = [tokens - 1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if whole:
        trace = trace.load()
    else:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT, held + LIMIT))
    start = time.perf_counter()
    result = analysis.measure(trace, **options)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = {key: value.values for key, value in result.items() if value.dtype.kind in "fi"} if layer == 0 else {}
    found = {"layer": layer, "tokens": tokens, "whole": whole, "seconds": seconds, "peak_mb": (peak - before) / 1024}
    return found | {"values": values}


def difference(values: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """Largest difference of two answers, in units of the largest number of the same name; infinite for other shapes."""
    largest = 0.0
    if not values or values.keys() != others.keys():
        return np.inf
    for name, value in values.items():
        other = others[name]
        if value.tobytes() == other.tobytes():
            continue
        finite = np.isfinite(value)
        if value.shape != other.shape or not np.array_equal(value[~finite], other[~finite], equal_nan=True):
            return np.inf
        apart, size = (np.abs(of).max(initial=0.0) for of in (value[finite] - other[finite], value[finite]))
        largest = max(largest, apart / max(size, np.finfo(float).tiny))
    return float(largest)


def measure(directory: Path, name: str, workers: int, out: Path) -> None:
    layers = RECALL_LAYERS if name == "recall_circuit" else tuple(range(LAYERS))
    jobs = [(layer, TOKENS, False) for layer in reversed(layers)]  # layer 0 runs beside the last three
    jobs += [(0, TOKENS, True), (0, TOKENS // 2, False), (0, TOKENS // 4, False)]
    found, wall = run(directory, name, workers, jobs)
    streamed, (loaded, half, quarter) = found[: len(layers)], found[len(layers) :]
    seconds, peak = sorted(each["seconds"] for each in streamed), max(each["peak_mb"] for each in streamed)
    seconds_at, mb_at = (
        " / ".join(f"{each[key]:.{digits}f}" for each in (quarter, half, streamed[-1]))
        for key, digits in (("seconds", 1), ("peak_mb", 0))
    )
    apart = difference(streamed[-1]["values"], loaded["values"])
    report(
        f"| {name} | {len(layers)} | {seconds[0]:.1f} .. {seconds[-1]:.1f} | {peak:.0f} |"
        f" {seconds_at} | {mb_at} | {said(apart)} | {wall:.0f} |",
        out / f"{name}.md", found, apart,
    )  # fmt: skip


def run(directory: Path, name: str, workers: int, jobs: list[tuple]) -> tuple[list[dict], float]:
    """What each job found, one process a job and one thread a process, and the seconds of all."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(job, *zip(*((directory, name, *each) for each in jobs), strict=True)))
    return found, time.perf_counter() - start


def said(apart: float) -> str:
    return "the same" if apart == 0 else f"{apart:.0e} apart"


def report(line: str, path: Path, found: list[dict], apart: float) -> None:
    """Print a line of a table and write it, with what each process found.

    Raises:
        SystemExit: streamed and loaded answers differ by more than TOLERANCE.
    """
    print(line, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    kept = [{key: value for key, value in each.items() if key != "values"} for each in found]
    path.with_suffix(".json").write_text(json.dumps(kept))
    if not apart <= TOLERANCE:
        raise SystemExit(f"{path.stem}: streamed and loaded answers differ by {apart:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "measure"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("-j", "--workers", type=int, default=16)
    given = parser.parse_args()
    if given.what == "record":
        record(given.directory)
        return
    for name in given.names:
        measure(given.directory, name, given.workers, given.out)


if __name__ == "__main__":
    main()
