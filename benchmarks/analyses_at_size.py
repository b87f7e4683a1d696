"""The analyses on a trace of the size of Mamba-130m at 32,768 tokens: seconds and memory a layer, from a Zarr store.

    python benchmarks/analyses_at_size.py record DIR                 # on a GPU machine: random weights, one row of mqar
    python benchmarks/analyses_at_size.py measure DIR NAME... -o OUT # one process a layer; OUT/NAME.md

Each process may allocate LIMIT beyond what its imports take, less than the store's 4.9 GB: the trace is larger than its
memory. One more process loads layer 0 whole, without that limit: its answers must be the same. Two take a quarter and a
half of the tokens.
"""

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

TOKENS, LAYERS, LIMIT = 32_768, 24, 4 * 2**30
NAMES = ("hidden_attention", "wavelet_alignment", "memory_horizon", "recall_circuit")
RECALL_LAYERS = (0, 23)  # whose scan inputs, gates and outputs are recorded too


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
    """Measure one layer; `whole` loads it first."""
    from importlib import import_module

    import mamba_probe as mp
    from mamba_probe.trace.store import open_dataset

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
    values = {key: value.values.tobytes().hex()[:64] + str(value.values.sum()) for key, value in result.items()
              if value.dtype.kind in "fi"}  # fmt: skip
    return {"layer": layer, "tokens": tokens, "whole": whole, "seconds": seconds, "values": values,
            "peak_mb": (peak - before) / 1024}  # fmt: skip


def measure(directory: Path, name: str, workers: int, out: Path) -> None:
    layers = RECALL_LAYERS if name == "recall_circuit" else tuple(range(LAYERS))
    jobs = [(layer, TOKENS, False) for layer in layers]
    jobs += [(0, TOKENS, True), (0, TOKENS // 2, False), (0, TOKENS // 4, False)]
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(job, *zip(*((directory, name, *each) for each in jobs), strict=True)))
    wall = time.perf_counter() - start
    streamed, (loaded, half, quarter) = found[: len(layers)], found[len(layers) :]
    same = streamed[0]["values"] == loaded["values"]
    seconds, peak = sorted(each["seconds"] for each in streamed), max(each["peak_mb"] for each in streamed)
    lines = [
        f"| {name} | {len(layers)} | {seconds[0]:.0f} .. {seconds[-1]:.0f} | {peak:.0f} | {quarter['seconds']:.1f} /"
        f" {half['seconds']:.1f} / {streamed[0]['seconds']:.1f} | {quarter['peak_mb']:.0f} / {half['peak_mb']:.0f} /"
        f" {streamed[0]['peak_mb']:.0f} | {'the same' if same else 'DIFFERENT'} | {wall:.0f} |"
    ]
    print(*lines, sep="\n", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(json.dumps([{k: v for k, v in each.items() if k != "values"} for each in found]))
    if not same:
        raise SystemExit(f"{name}: streamed and loaded answers differ")


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
    for name in given.names if given.what == "measure" else ():
        measure(given.directory, name, given.workers, given.out)


if __name__ == "__main__":
    main()
