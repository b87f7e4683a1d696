"""Time the scan's backends and transformers' own slow path on this machine, with each one's error against float64.

python benchmarks/scan.py [--save] [--repeat 3] [--token 1024]
"""

import argparse
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mamba_probe.kernels.scan import Emit, cpu_compile, selective_scan

RESULTS = Path(__file__).parent / "results"
CASES = {  # (head, head_channel, state, group, whether A is a scalar a head)
    "Mamba-1, 1536 channels, state 16": (1536, 1, 16, 1, False),
    "Mamba-2, 24 heads of 64, state 128": (24, 64, 128, 1, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the scan's backends against transformers' slow path.")
    parser.add_argument("--token", type=int, default=1024, help="sequence length, batch 1")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--commit", default=commit(), help="what was measured, where there is no git")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = "\n".join([*header(device, options), *(row for case in CASES for row in rows(case, device, options))])
    print(table)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"scan-{device}-{options.token}.md").write_text(table + "\n")


def header(device: str, options: argparse.Namespace) -> list[str]:
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    machine = f"{machine}, {torch.get_num_threads()} CPU threads, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers", "numpy"))
    return [
        f"# Scan, batch 1, {options.token} tokens, float32",
        "",
        f"{machine}; {versions}; commit {options.commit}.",
        f"Median of {options.repeat} rounds, all backends in turn within a round; no gradients.",
        "Error: max|a - b| / max|b| against the naive backend in float64.",
        "",
        "| case | backend | ms | speed against transformers | error |",
        "|---|---|---|---|---|",
    ]


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = ["describe", "--always", "--dirty=, with local changes"]
    done = subprocess.run([*git, *describe], capture_output=True, check=False, text=True)
    return done.stdout.strip() or "unknown"


def rows(case: str, device: str, options: argparse.Namespace) -> list[str]:
    inputs = draw(*CASES[case], options.token, device)
    names = ["naive", "cpu"] + (["triton"] if device == "cuda" else [])
    calls = {name: lambda name=name: selective_scan(**inputs, backend=name).y for name in names}
    emit = Emit(("delta", "A_bar", "h"))
    calls |= {f"{name}, + delta, A_bar, h": lambda name=name: selective_scan(**inputs, emit=emit, backend=name).y
              for name in names[1:]}  # fmt: skip
    loops = device == "cpu" and inputs["A"].ndim == 2
    if loops:
        calls["cpu, compiled"] = lambda: compiled(inputs)
        calls["cpu, compiled, + A_bar, h"] = lambda: compiled(inputs, Emit(("A_bar", "h")))
    calls["transformers"] = lambda: transformers_scan(inputs)
    double = {name: value.double() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    oracle = selective_scan(**inputs | double, backend="naive").y
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors = {name: ((call() - oracle).abs().max() / oracle.abs().max()).item() for name, call in calls.items()}
    fills = []
    for _ in range(options.repeat):
        for name, call in calls.items():
            seconds[name].append(timed(call, device))
        fills.append(timed(lambda: torch.empty(1, options.token, *inputs["A"].shape).fill_(1.0), device))
    took = {name: median(taken) for name, taken in seconds.items()}
    table = [
        f"| {case} | {name} | {1e3 * took[name]:.2f} | {took['transformers'] / took[name]:.2f}x | {error:.1e} |"
        for name, error in errors.items()
    ]
    if loops:
        ratio = took["cpu, compiled, + A_bar, h"] / (took["cpu, compiled"] + 2 * median(fills))
        table.append(f"| {case} | A_bar and h / (y + two fresh fills), compiled | | {ratio:.2f} | |")
    return table


def compiled(inputs: dict, emit: Emit | None = None) -> torch.Tensor:
    with cpu_compile("always"):
        return selective_scan(**inputs, emit=emit, backend="cpu").y


def draw(head: int, head_channel: int, state: int, group: int, scalar: bool, token: int, device: str) -> dict:
    seed = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seed).to(device)

    x, B, C = normal(1, token, head, head_channel), normal(1, token, group, state), normal(1, token, group, state)
    A = -torch.exp(normal(head) if scalar else normal(head, state))
    bias = normal(head) - 3
    return {"x": x, "delta": normal(1, token, head), "A": A, "B": B, "C": C, "D": normal(head), "delta_bias": bias,
            "delta_softplus": True}  # fmt: skip


def transformers_scan(a: dict) -> torch.Tensor:
    if a["A"].ndim == 1:
        return mamba2_chunk_scan(a["x"], a["delta"], a["A"], a["B"], a["C"], 256, D=a["D"], dt_bias=a["delta_bias"],
                                 dt_softplus=True)  # fmt: skip
    x, B, C = (tensor.squeeze(axis).mT for tensor, axis in ((a["x"], 3), (a["B"], 2), (a["C"], 2)))
    y = mamba_selective_scan(x, a["delta"].mT, a["A"], B, C, D=a["D"], delta_bias=a["delta_bias"], delta_softplus=True)
    return y.mT[..., None]


def timed(call, device: str) -> float:
    begin = perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - begin


if __name__ == "__main__":
    with torch.no_grad():
        main()
