"""Forward and backward of the Triton scan beside mamba_ssm's on a CUDA device, in one run.

    python benchmarks/training_gpu.py --mamba-ssm DIR -o benchmarks/results/training-h200.md

By the protocol of `scan_gpu`: each side called as its users call it, in its own layout, in turns, medians; gradients of
every input by torch.autograd. The last column is the gradients' determinism: whether two runs give the same bits.
"""

import argparse
from pathlib import Path

import torch
from scan_gpu import (
    ARGUMENTS,
    BF16,
    FP32,
    SHAPES,
    bytes_of,
    environment,
    mamba1,
    mamba2,
    peers,
    sets,
    ssd,
    their_arguments,
    timed,
)

from mamba_probe.kernels.scan import selective_scan


def training(leaves: dict, call):
    """The gradients of all leaves: a call."""
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    upstream = torch.randn_like(call(leaves))
    return lambda: torch.autograd.grad(call(leaves), list(leaves.values()), upstream)


def our_training(inputs: dict):
    leaves = {name: inputs[name] for name in ARGUMENTS}
    return training(leaves, lambda leaves: selective_scan(**leaves, delta_softplus=True, backend="triton").y)


def their_training(inputs: dict, scan, chunk_scan):
    if inputs["A"].ndim == 1:
        return training({name: inputs[name] for name in ARGUMENTS}, lambda leaves: ssd(leaves, chunk_scan)())
    return training(
        their_arguments(inputs),
        lambda t: scan(*(t[name] for name in ARGUMENTS[:6]), z=t["z"], delta_bias=t["delta_bias"], delta_softplus=True),
    )


def peak(call) -> float:
    """Megabytes at the peak, above what was allocated before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def same(call) -> str:
    first, second = call(), call()
    return "yes" if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) else "no"


def compare(name: str, make, *scans) -> str:
    inputs = sets(make, bytes_of(make()))
    sides = {
        "ours": [our_training(each) for each in inputs],
        "theirs": [their_training(each, *scans) for each in inputs],
    }
    found = timed(sides)
    (eager, graph), (eager_0, graph_0) = found["ours"], found["theirs"]
    one = [sides[side][0] for side in ("ours", "theirs")]
    return (
        f"| {name} | {eager:.4f} | {eager_0:.4f} | **{eager / eager_0:.2f}** | {graph:.4f} | {graph_0:.4f} |"
        f" **{graph / graph_0:.2f}** | {peak(one[0]):.0f} / {peak(one[1]):.0f} | {same(one[0])} / {same(one[1])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba-ssm", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    scans = peers(given.mamba_ssm)
    lines = [
        "| forward + backward | ms | mamba_ssm | ratio | graph ms | mamba_ssm | ratio | peak MB | same bits twice |",
        "|---" * 9 + "|",
    ]
    cases = {
        f"Mamba-1 bf16, {name}": lambda name=name: mamba1(SHAPES[name], BF16)
        for name in ("S28", "S130", "(1, 2048, 1536)")
    }
    cases["Mamba-1 fp32, S28"] = lambda: mamba1(SHAPES["S28"], FP32)
    cases |= {f"Mamba-2 bf16, batch {batch}": lambda batch=batch: mamba2(batch, BF16) for batch in (4, 1)}
    for name, make in cases.items():
        lines.append(compare(name, make, *scans))
        print(lines[-1], flush=True)
    text = "\n".join(["# `benchmarks/training_gpu.py`", "", environment(), "", *lines, ""])
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
