"""The Triton scan beside mamba_ssm's kernels on a CUDA device, in one run: time, memory above what is kept, and error.

    python benchmarks/scan_gpu.py --mamba-ssm DIR -o benchmarks/results/scan-h200.md

DIR is a checkout of mamba_ssm, whose CUDA scan is built first where `selective_scan_cuda` cannot be imported (some two
minutes). Each side is called as its users call it, from unpacked inputs in its own layout, allocation included; both
take turns, over inputs that together exceed the L2 four times. Medians of ROUNDS; "graph" is the same under a CUDA
graph, without the cost of launching. Nothing is tuned per shape.
"""

import argparse
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from mamba_probe.kernels.scan import Emit, fused, selective_scan

ROUNDS, L2_TIMES = 3, 4
COPY, WRITE = 4.26e12, 4.68e12
"""Bytes a second of an H200 that reads and writes, and that only writes: what floors are counted with."""
SHAPES = {  # batch, token, channel, state
    "S28": (4, 4096, 5120, 16),
    "S130": (8, 2048, 1536, 16),
    "(1, 2048, 1536)": (1, 2048, 1536, 16),
    "(1, 4096, 5120)": (1, 4096, 5120, 16),
    "(1, 32768, 1536)": (1, 32768, 1536, 16),
    "(1, 4097, 1500)": (1, 4097, 1500, 16),
}
BF16, FP32 = torch.bfloat16, torch.float32
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
TIERS = {  # asked for beside y -> bytes written a (token, channel) on top of y's
    "delta": (Emit(("delta",)), 4),
    "delta, delta_cumsum, energy": (Emit(("delta", "delta_cumsum", "energy")), 16),
    "delta, A_bar bf16": (Emit(("delta", "A_bar"), dtype=BF16), 36),
    "delta, A_bar fp32": (Emit(("delta", "A_bar")), 68),
    "delta, h bf16": (Emit(("delta", "h"), dtype=BF16), 36),
    "delta, A_bar, h bf16": (Emit(("delta", "A_bar", "h"), dtype=BF16), 68),
    "mass, mass_distance (their own kernel)": (Emit(("mass", "mass_distance")), 8),
}


def peers(directory: Path | None):
    """mamba_ssm's scan and its SSD."""
    if directory is not None:
        sys.path.insert(0, str(directory))
    try:
        import selective_scan_cuda  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        if directory is None:
            raise SystemExit("mamba_ssm is not installed: give --mamba-ssm DIR, a checkout of it") from None
        build(directory)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    return selective_scan_fn, mamba_chunk_scan_combined


def build(directory: Path) -> None:
    from torch.utils.cpp_extension import load

    os.environ |= {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    source = directory / "csrc/selective_scan"
    off = ["HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS"]
    flags = ["-O3", "-std=c++17", *[f"-U__CUDA_NO_{name}__" for name in off]]
    flags += ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
    files = sorted(map(str, [*source.glob("*.cu"), *source.glob("*.cpp")]))
    load("selective_scan_cuda", files, extra_cflags=["-O3"], extra_cuda_cflags=flags)


def mamba1(shape, dtype) -> dict:
    """Random arguments, step sizes as a fresh Mamba has them."""
    batch, token, channel, state = shape
    normal = lambda *sizes: torch.randn(sizes, device="cuda").to(dtype)  # noqa: E731
    return {
        "x": normal(batch, token, channel, 1),
        "delta": normal(batch, token, channel) / 2,
        "A": -(torch.rand(channel, state, device="cuda") + torch.arange(state, device="cuda") + 0.5),
        "B": normal(batch, token, 1, state),
        "C": normal(batch, token, 1, state),
        "D": torch.randn(channel, device="cuda"),
        "z": normal(batch, token, channel, 1),
        "delta_bias": torch.rand(channel, device="cuda") * 4.6 - 6.9,
        "delta_softplus": True,
    }


def mamba2(batch, dtype, *, token=4096, head=80, head_channel=64, state=128) -> dict:
    normal = lambda *sizes: torch.randn(sizes, device="cuda").to(dtype)  # noqa: E731
    return {
        "x": normal(batch, token, head, head_channel),
        "delta": normal(batch, token, head),
        "A": -15 * torch.rand(head, device="cuda") - 1,
        "B": normal(batch, token, 1, state),
        "C": normal(batch, token, 1, state),
        "D": torch.randn(head, device="cuda"),
        "z": normal(batch, token, head, head_channel),
        "delta_bias": torch.rand(head, device="cuda") * 4.6 - 6.9,
        "delta_softplus": True,
    }


def their_arguments(inputs) -> dict:
    """Of mamba_ssm's scan, (batch, channel, token), from ours."""
    turned = {name: inputs[name].squeeze(-1).transpose(1, 2).contiguous() for name in ("x", "delta", "z")}
    turned |= {name: inputs[name][:, :, 0].transpose(1, 2).contiguous() for name in "BC"}
    return turned | {name: inputs[name] for name in ("A", "D", "delta_bias")}


def theirs(inputs, scan):
    """mamba_ssm's call."""
    given = their_arguments(inputs)
    x, delta, A, B, C, D, z, bias = (given[name] for name in ARGUMENTS)
    return lambda: scan(x, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


def ssd(inputs, scan):
    named = {"D": inputs["D"], "z": inputs["z"], "dt_bias": inputs["delta_bias"], "dt_softplus": True}
    return lambda: scan(inputs["x"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"], 256, **named)


def ours(inputs, emit=None):
    return lambda: selective_scan(**inputs, emit=emit, backend="triton")


def sets(make, n_bytes: int) -> list[dict]:
    """As many fresh inputs as exceed the L2 L2_TIMES."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(1, -(-L2_TIMES * l2 // n_bytes)))]


def timed(sides: dict[str, list]) -> dict[str, tuple[float, float]]:
    """Milliseconds of each side, eager and as a CUDA graph, in turns."""
    found = {name: ([], []) for name in sides}
    for calls in sides.values():
        [call() for call in calls]
    for _ in range(ROUNDS):
        for name, calls in sides.items():
            turns = cycle(calls)
            found[name][0].append(do_bench(lambda turns=turns: next(turns)(), warmup=5, rep=30, return_mode="median"))
            every = do_bench_cudagraph(lambda calls=calls: [call() for call in calls], rep=20, return_mode="median")
            found[name][1].append(every / len(calls))
    return {name: (median(eager), median(graph)) for name, (eager, graph) in found.items()}


def bytes_of(value) -> int:
    tensors = value.values() if isinstance(value, dict) else value
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def extra(call) -> float:
    """Megabytes allocated at the peak above what the call returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    after = torch.cuda.memory_allocated()
    del kept
    return (torch.cuda.max_memory_allocated() - max(after, before)) / 2**20


def compare(name, make, peer, emit=None) -> str:
    inputs = sets(make, bytes_of(make()))
    sides = {"ours": [ours(each, emit) for each in inputs], "theirs": [peer(each) for each in inputs]}
    found = timed(sides)
    (eager, graph), (eager_0, graph_0) = found["ours"], found["theirs"]
    memory = extra(sides["ours"][0]), extra(sides["theirs"][0])
    return (
        f"| {name} | {eager:.4f} | {eager_0:.4f} | **{eager / eager_0:.2f}** | {graph:.4f} | {graph_0:.4f} |"
        f" **{graph / graph_0:.2f}** | {memory[0]:.1f} / {memory[1]:.1f} |"
    )


def tiers() -> list[str]:
    """What emission costs at S28, against y only and against the bytes that must be moved, x, delta and z read too."""
    inputs = [mamba1(SHAPES["S28"], BF16)]  # larger than the L2
    rows = SHAPES["S28"][0] * SHAPES["S28"][1] * SHAPES["S28"][2]
    sides = {"y": [ours(inputs[0])]}
    sides |= {name: [ours(inputs[0], emit)] for name, (emit, _) in TIERS.items()}
    found = timed(sides)
    lines = [f"| y | {found['y'][0]:.4f} | 1.00 | | | {extra(sides['y'][0]):.1f} |"]
    for name, (_, size) in TIERS.items():
        size = rows * (size + 2 + 3 * 2) * 1e3
        ms = found[name][0]
        lines.append(
            f"| {name} | {ms:.4f} | {ms / found['y'][0]:.2f} | {ms / size * COPY:.2f} | {ms / size * WRITE:.2f} |"
            f" {extra(sides[name][0]):.1f} |"
        )
    return lines


def states() -> str:
    """h of Mamba-2 at every token, batch 4, against writing it."""
    inputs = mamba2(4, BF16)
    call = ours(inputs, Emit(("h",), dtype=BF16))
    ms = do_bench(call, warmup=5, rep=60, return_mode="median")
    floor = inputs["x"].numel() * inputs["B"].shape[-1] * 2 / WRITE * 1e3
    return f"| Mamba-2, batch 4: h bf16 | {ms:.3f} | | | {ms / floor:.2f} | {extra(call):.1f} |"


def error(value, exact) -> str:
    value, exact = value.double(), exact.double()
    rms = ((value - exact).square().mean() / exact.square().mean()).sqrt().item()
    return f"{((value - exact).abs().max() / exact.abs().max()).item():.1e} ({rms:.1e})"


def accuracy(scan, chunk_scan) -> list[str]:
    """Against the float64 naive scan of the same inputs."""
    lines = []
    cases = {
        "Mamba-1 bf16, (1, 4096, 512, 16)": (mamba1((1, 4096, 512, 16), BF16), theirs, scan),
        "Mamba-1 fp32": (mamba1((1, 4096, 512, 16), FP32), theirs, scan),
        "Mamba-1 fp32, A = -1e-6": (mamba1((1, 4096, 512, 16), FP32), theirs, scan),
        "Mamba-2 bf16, (1, 4096, 8, 64, 128)": (mamba2(1, BF16, head=8), ssd, chunk_scan),
    }
    cases["Mamba-1 fp32, A = -1e-6"][0]["A"].fill_(-1e-6)
    for name, (inputs, peer, call) in cases.items():
        wide = lambda dtype, inputs=inputs: {  # noqa: E731
            key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
        }
        exact = selective_scan(**wide(torch.float64), backend="naive").y
        naive = selective_scan(**wide(FP32), backend="naive").y
        other = peer(inputs, call)()
        other = other if other.shape == exact.shape else other.transpose(1, 2)[..., None]
        lines.append(f"| {name} | {error(ours(inputs)().y, exact)} | {error(other, exact)} | {error(naive, exact)} |")
    return lines


def exponential() -> list[str]:
    """Relative error of the card's exp2 in float32: a bias is what a long memory adds up."""
    lines = []
    for low in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        z = -low * (1 + 9 * torch.rand(1 << 22, device="cuda"))
        exact = torch.exp2(z.double())
        off = (torch.exp2(z).double() - exact) / exact
        lines.append(f"| -{low:.0e} .. -{10 * low:.0e} | {off.mean().item():+.1e} | {off.abs().max().item():.1e} |")
    return lines


def sweep() -> list[str]:
    """The rule for Mamba-1's tile against others: graph milliseconds, one input."""
    rule, lines = fused.choose_tile, []
    for name, shape in SHAPES.items():
        inputs = mamba1(shape, BF16)
        found = {"rule": do_bench_cudagraph(lambda i=inputs: ours(i)(), rep=10, return_mode="median")}
        wide = [(16, 8, 1, 4, 1), (16, 8, 1, 4, 3), (8, 16, 1, 4, 1)]
        cut = [(16, 8, chunks, 4, 1) for chunks in (4, 8, 11, 16, 22)] + [(8, 16, chunks, 4, 1) for chunks in (4, 8)]
        for tile in wide if name in ("S28", "S130") else cut:
            fused.choose_tile = lambda a, tile=tile: fused.Tile(*tile)
            call = lambda i=inputs: ours(i)()  # noqa: E731
            label = "{}x{}, {} chunks, {} stages".format(*tile[:3], tile[4])
            found[label] = do_bench_cudagraph(call, rep=10, return_mode="median")
        fused.choose_tile = rule
        best = min(found, key=lambda tile: found[tile])
        others = ", ".join(f"{tile}: {ms:.4f}" for tile, ms in found.items() if tile != "rule")
        lines.append(f"| {name} | {found['rule']:.4f} | {found['rule'] / found[best]:.2f} | {others} |")
        print(lines[-1], flush=True)
    return lines


def environment(with_peer: bool = True) -> str:
    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    peer = ", mamba_ssm " + os.environ.get("MAMBA_SSM", "as installed") if with_peer else ""
    return (
        f"{clock} after the run; Python {sys.version.split()[0]}, torch {torch.__version__}, triton"
        f" {triton.__version__}{peer}; commit {os.environ.get('COMMIT') or head or 'unknown'}."
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba-ssm", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="Mamba-1's tiles instead, without mamba_ssm")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; benchmarks/scan.py runs on a CPU")
    torch.manual_seed(0)
    if given.sweep:
        head = ["| shape | rule, ms | x best | others, rows x tokens: ms |", "|---" * 4 + "|"]
        text = "\n".join(
            ["# `benchmarks/scan_gpu.py --sweep`", "", environment(with_peer=False), "", *head, *sweep(), ""]
        )
        if given.out:
            given.out.write_text(text)
        return
    scan, chunk_scan = peers(given.mamba_ssm)
    first = lambda inputs: theirs(inputs, scan)  # noqa: E731
    second = lambda inputs: ssd(inputs, chunk_scan)  # noqa: E731
    head = [
        "| y only | ms | mamba_ssm | ratio | graph ms | mamba_ssm | ratio | MB above what is kept |",
        "|---" * 8 + "|",
    ]
    lines = [*head]
    for name, shape in SHAPES.items():
        lines.append(compare(f"Mamba-1 bf16, {name}", lambda shape=shape: mamba1(shape, BF16), first))
        print(lines[-1], flush=True)
    lines.append(compare("Mamba-1 fp32, S28", lambda: mamba1(SHAPES["S28"], FP32), first))
    turned = lambda: turned_by_token(mamba1(SHAPES["S28"], BF16))  # noqa: E731
    lines.append(compare("Mamba-1 bf16, S28, from transformers' strides", turned, first))
    lines += [compare(f"Mamba-2 bf16, batch {n}", lambda n=n: mamba2(n, BF16), second) for n in (4, 1)]
    lines += [
        "",
        "| S28 bf16, beside y | ms | x y only | x bytes at 4.26 TB/s | at 4.68 TB/s | MB above what is kept |",
        "|---" * 6 + "|",
        *tiers(),
        states(),
    ]
    lines += [
        "",
        "| error of y: max (RMS) | ours | mamba_ssm | naive fp32 |",
        "|---" * 4 + "|",
        *accuracy(scan, chunk_scan),
        "",
        "| exp2 of z, float32 on the card: z | mean relative error | largest |",
        "|---" * 3 + "|",
        *exponential(),
    ]
    text = "\n".join(["# `benchmarks/scan_gpu.py`", "", environment(), "", *lines, ""])
    print(text)
    if given.out:
        given.out.write_text(text)


def turned_by_token(inputs: dict) -> dict:
    """x, delta and z with the strides of (batch, channel, token)."""
    return inputs | {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "delta", "z")}


if __name__ == "__main__":
    main()
