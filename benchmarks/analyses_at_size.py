"""The analyses on traces of the size of Mamba-130m, from Zarr stores: seconds and memory a layer.

    python benchmarks/analyses_at_size.py record DIR               # on a GPU machine: one row of mqar, four stores
    python benchmarks/analyses_at_size.py measure DIR -o OUT       # one process a job; OUT/analyses.md, analyses.json

The stores: `trace`, all layers at 32,768 tokens (delta, A, B, C: 4.9 GB); `recall`, the first and the last of them with
x, z, y, u and out (2 GB); `long`, the first at 131,072 tokens (4 GB), of which the measured tokens are a sixteenth to
all; `million`, 1,048,576 tokens of a model of 16 channels.

Each process computes on one thread and may allocate LIMIT beyond what its imports take, less than each of the first
three stores holds. One more process an analysis loads the first layer at 32,768 tokens whole, without that limit: its
answers must be the same. OUT/analyses.md has the rows of the table in benchmarks/results/analyses-at-size.md,
OUT/analyses.json the figures of each process.
"""

import argparse
import json
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIMIT = 2**30
NAMES = ("memory_horizon", "wavelet_alignment", "hidden_attention", "recall_circuit")  # the slowest first
SELECTION, MORE = ("delta", "A", "B", "C"), ("x", "z", "y", "u", "out")
LONG, MILLION = 4, 32  # times as many tokens
FRACTIONS = (16, 8, 4, 2, 1)  # of the tokens of `long`
TOLERANCE = 1e-9  # of the largest number of a result: sums over blocks of a store, or over the row at once


class Job(NamedTuple):
    """One process: the first `tokens` of one layer of a store; `whole` loads them first."""

    name: str
    store: str
    layer: int
    tokens: int
    whole: bool = False


def record(directory: Path, tokens: int, layers: int, width: int, device: str) -> None:
    """Write the stores of two models with random weights: of `width`, and of 16 channels."""
    ends = (0, layers - 1)
    record_model(directory, width, layers, device, "weights", {
        "trace": (tokens, None, SELECTION), "recall": (tokens, ends, SELECTION + MORE),
        "long": (LONG * tokens, (0,), SELECTION + MORE),
    })  # fmt: skip
    record_model(directory, 8, 1, device, "million_weights", {"million": (MILLION * tokens, (0,), SELECTION + MORE)})


def record_model(directory: Path, width: int, layers: int, device: str, weights: str, stores: dict[str, Any]) -> None:
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    import mamba_probe as mp
    from mamba_probe.trace.store import save

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=width, num_hidden_layers=layers, state_size=16, vocab_size=1024)
    with mp.attach(torch.nn.Module.to(MambaForCausalLM(config).eval(), device)) as probe:
        for name, (tokens, chosen, variables) in stores.items():
            task = mp.tasks.mqar(batch=1, length=tokens, n_pairs=8, vocab=1024, seed=0)
            start = time.perf_counter()
            trace = probe.record(task, variables=variables, layers=chosen)
            recorded = time.perf_counter()
            save(trace, directory / f"{name}.zarr", overwrite=True)
            seconds = f"recorded in {recorded - start:.1f} s, stored in {time.perf_counter() - recorded:.1f} s"
            print(f"{name}: {tokens} tokens, {trace.nbytes / 1e9:.2f} GB, {seconds}", flush=True)
        save(probe.weights(), directory / f"{weights}.zarr", overwrite=True)


def perform(directory: Path, job: Job) -> dict:
    """Measure; where streamed and loaded answers are to be compared, they are returned too."""
    from importlib import import_module

    import dask.config
    import zarr

    import mamba_probe as mp
    from mamba_probe.trace.store import open_dataset

    dask.config.set(scheduler="synchronous")
    zarr.config.set({"threading.max_workers": 1})
    analysis = import_module(f"mamba_probe.analyses.{job.name}")
    trace = mp.open_trace(directory / f"{job.store}.zarr").sel(layer=[job.layer]).isel(token=slice(job.tokens))
    options = {}
    if job.name == "recall_circuit":
        trace = trace.assign_coords(prediction=trace["target"])  # else a random model has no circuit to score
        weights = "million_weights" if job.store == "million" else "weights"
        options["weights"] = open_dataset(directory / f"{weights}.zarr").sel(layer=[job.layer]).load()
    held, resident = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2])
    if job.whole:
        trace = trace.load()
    else:
        resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT, held + LIMIT))
    start = time.perf_counter()
    result = analysis.measure(trace, **options)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resident / 2**20
    compared = job.layer == 0 and job.store in ("trace", "recall")
    values = {key: value.values for key, value in result.items() if value.dtype.kind in "fi"} if compared else {}
    return job._asdict() | {"seconds": seconds, "peak_mb": peak, "values": values}


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


def jobs_of(directory: Path, name: str) -> list[Job]:
    """What is measured of an analysis."""
    store = "recall" if name == "recall_circuit" else "trace"
    (layers, tokens), (_, long), (_, million) = (extent(directory / f"{of}.zarr") for of in (store, "long", "million"))
    return [
        *(Job(name, store, layer, tokens) for layer in layers),
        Job(name, store, 0, tokens, whole=True),
        *(Job(name, "long", 0, long // part) for part in FRACTIONS),
        Job(name, "million", 0, million),
    ]


def extent(path: Path) -> tuple[list[int], int]:
    """Layers and number of tokens of a store, of which nothing else is read: a process inherits its parent's peak."""
    import zarr

    store: Any = zarr.open_group(path, mode="r")
    return store["layer"][:].tolist(), store["delta"].shape[2]


def measure(directory: Path, names: list[str], workers: int, out: Path) -> None:
    """Print and write the rows of the table, and what each process found.

    Raises:
        SystemExit: a process failed, or streamed and loaded answers differ by more than TOLERANCE.
    """
    jobs = sorted((job for name in names for job in jobs_of(directory, name)), key=lambda job: -job.tokens)
    start = time.perf_counter()
    found, failed = run(directory, workers, jobs)
    print(f"{len(jobs)} processes, {workers} at once: {time.perf_counter() - start:.0f} s", flush=True)
    kept = [{key: value for key, value in each.items() if key != "values"} for each in found.values()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "analyses.json").write_text(json.dumps(kept))
    lines = [row(name, found) for name in names if not any(job.name == name for job in failed)]
    (out / "analyses.md").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", flush=True)
    wrong = [name for name in names if not apart(name, found) <= TOLERANCE]
    if failed or wrong:
        raise SystemExit(f"failed: {list(failed)}; streamed and loaded answers differ: {wrong}")


def run(directory: Path, workers: int, jobs: list[Job]) -> tuple[dict[Job, dict], list[Job]]:
    """What each job found, one process a job and one thread a process; and which failed."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    os.environ |= one  # of the processes that are started
    found, failed = {}, []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        asked = {pool.submit(perform, directory, job): job for job in jobs}
        for future in as_completed(asked):
            job, error = asked[future], future.exception()
            if error is None:
                found[job] = future.result()
                print(f"{tuple(job)}: {found[job]['seconds']:.1f} s, {found[job]['peak_mb']:.0f} MB", flush=True)
            else:
                failed.append(job)
                print(f"{tuple(job)} failed: {error!r}", flush=True)
    return found, failed


def apart(name: str, found: dict[Job, dict]) -> float:
    """How far streamed and loaded answers of an analysis are apart."""
    pair = [each["values"] for job, each in found.items() if job.name == name and each["values"]]
    return difference(*pair) if len(pair) == 2 else np.inf


def row(name: str, found: dict[Job, dict]) -> str:
    """A row of the table."""
    own = [each for job, each in found.items() if job.name == name and not job.whole]
    layers = [each for each in own if each["store"] in ("trace", "recall")]
    seconds = sorted(each["seconds"] for each in layers)
    long = sorted((each for each in own if each["store"] == "long"), key=lambda each: each["tokens"])
    million = next(each for each in own if each["store"] == "million")
    cells = [
        name,
        str(len(layers)),
        f"{seconds[0]:.1f} .. {seconds[-1]:.1f}",
        f"{max(each['peak_mb'] for each in layers):.0f}",
        " / ".join(f"{each['seconds']:.1f}" for each in long),
        " / ".join(f"{each['peak_mb']:.0f}" for each in long),
        f"{million['seconds']:.1f}",
        f"{million['peak_mb']:.0f}",
        "the same" if apart(name, found) == 0 else f"{apart(name, found):.0e} apart",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "measure"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("-j", "--workers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32_768, help="of `trace` and `recall`")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768, help="of the model: half its channels")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.what == "record":
        record(given.directory, given.tokens, given.layers, given.width, given.device)
    else:
        measure(given.directory, given.names, given.workers, given.out)


if __name__ == "__main__":
    main()
