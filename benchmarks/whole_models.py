"""Recording every layer of whole Mamba models on a CUDA device, beside their untouched forward, in one run.

    python benchmarks/whole_models.py --mamba-ssm DIR -o benchmarks/results/whole-models-h200.md

DIR is a checkout of mamba_ssm; its compiled `selective_scan_cuda` must be importable. transformers' MambaForCausalLM of
the real shapes, random weights made on the device, bf16, VOCAB words (so that the head is small), eager.

Native is the untouched model with its scan replaced by mamba_ssm's `selective_scan_fn`, as transformers itself does
where mamba_ssm is installed. Both sides run transformers' own convolution (torch's conv1d): causal_conv1d would take
the same time off both.

- kept on the GPU: `probe.recording(keep="device")`, one model call, the check for NaN included.
- to the host: `probe.recording()`, one model call and the leaving of the block: the trace is whole on the host.
- reduced: a listener in the place of the recorder asks each scan for delta and keeps, for each layer and channel, its
  mean over tokens, or for each layer a histogram of log2 delta; all of it is on the host in the end.

Entering a recording hashes the model's weights. That is timed once, apart; the rounds know the hash. Sides take turns;
medians of wall time around a whole forward, the device idle before and after. `--tiny` runs all of it on a CPU, with
transformers' own scan as native, to see that it works.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

import mamba_probe as mp
from mamba_probe import provenance
from mamba_probe.kernels.emission import Emit
from mamba_probe.listening import listen
from mamba_probe.mixers import Call

VOCAB, VARIABLES, SHORT = 1024, ("delta", "B", "C"), 16
BINS, LOWEST, HIGHEST = 64, -24.0, 8.0


class Size(NamedTuple):
    """A model and what it reads."""

    layers: int
    width: int
    batch: int
    token: int
    rounds: int
    host: bool
    """Whether to time the host's own work a layer, too: more shapes to compile kernels for."""


SIZES = {"130M": Size(24, 768, 4, 2048, 9, True), "2.8B": Size(64, 2560, 1, 4096, 5, False)}
TINY = {"tiny": Size(3, 32, 2, 40, 3, True)}
GOALS = {"kept on the GPU": 1.15, "to the host": 1.10, "reduced: mean": 1.15, "reduced: histogram": 1.15}


def build(size: Size, device: str) -> MambaForCausalLM:
    """Weights as a fresh Mamba has them, made where they are to lie."""
    config = MambaConfig(vocab_size=VOCAB, hidden_size=size.width, num_hidden_layers=size.layers, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return MambaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@contextmanager
def native_scan(directory: Path | None) -> Iterator[str]:
    """mamba_ssm's scan in transformers' module, called as transformers would."""
    if directory is None:
        yield "transformers' own scan"
        return
    sys.path.insert(0, str(directory))
    import selective_scan_cuda  # noqa: F401  # pyright: ignore[reportMissingImports]
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    with patch.object(modeling_mamba, "mamba_selective_scan", scan):
        yield "mamba_ssm's selective_scan_fn"


class Reduced:
    """A listener that keeps of each layer's delta what `of` makes of it."""

    def __init__(self, of: Callable[[Tensor], Tensor]):
        self._of = of
        self._kept: dict[int, Tensor] = {}

    def wants(self, layer: int, continues: bool, length: int) -> Emit:
        """Delta of every layer."""
        return Emit(("delta",))

    def receive(self, call: Call) -> None:
        """What is made of it stays on the device."""
        self._kept[call.layer] = self._of(call.tensors["delta"])

    def host(self) -> Tensor:
        """(layer, ...) on the host."""
        return torch.stack(list(self._kept.values())).cpu()


def mean(delta: Tensor) -> Tensor:
    return delta.mean((0, 1))


def histogram(delta: Tensor) -> Tensor:
    return torch.histc(delta.log2(), BINS, LOWEST, HIGHEST)


class Bench:
    """One model, its input, and the sides as calls that answer with their milliseconds."""

    def __init__(self, model: MambaForCausalLM, ids: Tensor):
        self.model, self.ids = model, ids

    def forward(self) -> None:
        """One call of the model."""
        self.model(self.ids)

    def clocked(self, run: Callable[[], Any]) -> float:
        """Milliseconds of `run`, the device idle before and after."""
        gc.collect()  # what earlier calls left is let go of before, not within
        synchronize(self.ids)
        start = time.perf_counter()
        run()
        synchronize(self.ids)
        return (time.perf_counter() - start) * 1e3

    def recorded(self, probe: mp.Probe, keep: str) -> float:
        """One call recorded; to the host, with the leaving of the block."""
        with ExitStack() as block:
            recorder = block.enter_context(probe.recording(variables=VARIABLES, keep=keep))

            def run() -> None:
                self.forward()
                if keep == "host":
                    block.close()

            ms = self.clocked(run)
        if keep == "host":
            self.bytes = sum(recorder.dataset[name].nbytes for name in VARIABLES)
        return ms

    def reduced(self, probe: mp.Probe, of: Callable[[Tensor], Tensor]) -> float:
        """One call reduced layer by layer, and the results' way to the host."""
        listener = Reduced(of)

        def run() -> None:
            self.forward()
            listener.host()

        listen(probe._taps, listener)
        try:
            return self.clocked(run)
        finally:
            listen(probe._taps, None)

    def sides(self, probe: mp.Probe | None) -> dict[str, Callable[[], float]]:
        """The untouched model, or, with a probe attached, what it is used for."""
        if probe is None:
            return {"native": lambda: self.clocked(self.forward)}
        return {
            "attached": lambda: self.clocked(self.forward),
            "kept on the GPU": lambda: self.recorded(probe, "device"),
            "to the host": lambda: self.recorded(probe, "host"),
            "reduced: mean": lambda: self.reduced(probe, mean),
            "reduced: histogram": lambda: self.reduced(probe, histogram),
        }

    def each(self, visit: Callable[[Callable[[], float]], Any]) -> dict[str, Any]:
        """What `visit` answers for every side, in turn."""
        found = {name: visit(side) for name, side in self.sides(None).items()}
        native = self.first_layer()
        with mp.attach(self.model) as probe:
            found |= {name: visit(side) for name, side in self.sides(probe).items()}
            self.apart = ((self.first_layer() - native).abs().max() / native.abs().max()).item()
        return found

    def first_layer(self) -> Tensor:
        """What the first layer's mixer answers. Random weights in bf16 amplify every rounding from there on: the logits
        of the native model lie as far from those of its own fp32 as from the probed one's."""
        seen = []
        mixer = self.model.backbone.layers[0].mixer
        with mixer.register_forward_hook(lambda *given: seen.append(given[-1].detach().float())):
            self.forward()
        return seen[0]


def synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


def peak(side: Callable[[], float]) -> float:
    """Gigabytes at the peak above what lies on the device before."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


class Busy(NamedTuple):
    """What the device did in one call."""

    launches: int
    ms: float
    conv_ms: float
    scan_ms: float


def busy(side: Callable[[], float]) -> Busy:
    """Kernels of one call, copies to the host apart, by torch's profiler; nothing where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return Busy(0, 0.0, 0.0, 0.0)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        side()
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    kernels = [event for event in events if not event.name.startswith(("Memcpy DtoH", "Memset"))]
    spent = lambda part: sum(e.device_time_total for e in kernels if part in e.name.lower()) / 1e3  # noqa: E731
    return Busy(len(kernels), spent(""), spent("conv"), spent("scan"))


def copy_bandwidth(device: str) -> float:
    """Bytes a second from the device to page-locked host memory."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty(2**28, dtype=torch.uint8, device="cpu", pin_memory=device == "cuda")
    times = []
    for _ in range(9):
        synchronize(source)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(source)
        times.append(time.perf_counter() - start)
    return source.numel() / median(times)


def host_time(model: MambaForCausalLM, ids: Tensor) -> dict[str, float]:
    """Microseconds a layer of a forward too short for the device to be what takes the time."""
    short = Bench(model, ids[:1, :SHORT].contiguous())
    layers = len(model.backbone.layers)
    return {name: ms * 1e3 / layers for name, ms in short.each(lambda side: median(side() for _ in range(7))).items()}


def measure(name: str, size: Size, device: str) -> list[str]:
    """The table of one model."""
    model = build(size, device)
    ids = torch.randint(1, VOCAB, (size.batch, size.token), device=device)
    bench = Bench(model, ids)
    start = time.perf_counter()
    known = provenance._hash(model)
    hashing = time.perf_counter() - start
    with patch.object(provenance, "_hash", lambda _: known):
        first = bench.each(lambda side: side())
        rounds = [bench.each(lambda side: side()) for _ in range(size.rounds)]
        memory, work = bench.each(peak), bench.each(busy)
        host = host_time(model, ids) if size.host else {}
    ms = {side: median(found[side] for found in rounds) for side in rounds[0]}
    bandwidth = copy_bandwidth(device)
    copy = bench.bytes / bandwidth * 1e3
    print(name, {side: [round(found[side], 2) for found in rounds] for side in ms}, flush=True)
    lines = [
        f"## {name}: {size.layers} layers of {size.width}, {size.batch} x {size.token} tokens, vocabulary {VOCAB}",
        "",
        f"Trace {bench.bytes / 1e9:.2f} GB (delta, B, C in fp32); copies at {bandwidth / 1e9:.1f} GB/s: {copy:.1f} ms."
        f" Hash of the weights {hashing:.2f} s, once a recording, not in the figures. The first layer's output, probed,"
        f" differs from the native one's by {bench.apart:.1e} of the largest.",
        "",
        "| | ms | first, ms | of | ratio | goal | GB above the model | launches a layer | device busy, ms |"
        f" of it conv1d | scan | host us a layer at 1 x {SHORT} |",
        "|---" * 12 + "|",
    ]
    for side, value in ms.items():
        bound, of = ms["native"], "native"
        if side == "to the host" and copy > bound:
            bound, of = copy, "copies"
        goal = f"{GOALS[side]:.2f}" if side in GOALS else ""
        did = work[side]
        lines.append(
            f"| {side} | {value:.2f} | {first[side]:.0f} | {of} | **{value / bound:.2f}** | {goal} |"
            f" {memory[side]:.2f} | {did.launches / size.layers:.1f} | {did.ms:.2f} | {did.conv_ms:.2f} |"
            f" {did.scan_ms:.2f} | {f'{host[side]:.0f}' if host else ''} |"
        )
    return [*lines, ""]


def environment(native: str) -> str:
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem", "--format=csv,noheader"]
    card = "CPU"
    if torch.cuda.is_available():
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip() + " after the run"
    commit = os.environ.get("COMMIT")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = found.stdout.strip() or "unknown"
    triton = provenance.versions()["triton"]
    return (
        f"{card}; Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton}, transformers"
        f" {transformers.__version__}; native: {native}, mamba_ssm {os.environ.get('MAMBA_SSM', 'as installed')};"
        f" commit {commit}."
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mamba-ssm", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to see that this runs")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    given = parser.parse_args()
    if not given.tiny and (given.mamba_ssm is None or not torch.cuda.is_available()):
        raise SystemExit("needs a CUDA device and --mamba-ssm DIR, a checkout of mamba_ssm; --tiny runs without them")
    torch.manual_seed(0)
    begun = time.perf_counter()
    sizes = TINY if given.tiny else {name: SIZES[name] for name in given.sizes}
    lines = []
    with native_scan(None if given.tiny else given.mamba_ssm) as native:
        for name, size in sizes.items():
            lines += measure(name, size, "cpu" if given.tiny else "cuda")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(f"{time.perf_counter() - begun:.0f} s in all")
    text = "\n".join(["# `benchmarks/whole_models.py`", "", environment(native), "", *lines])
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
