"""What the compiled kernels take, for an H200's sm_90 and without a GPU: a script, one JSON line a kernel of a call.

With the argument "mass", those of mass and mass_distance; with "backward", those of the backward.

The real launch on CPU tensors, with a driver that compiles and does not run. A process of its own, since the driver
is Triton's for the whole process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from oracle import cast, draw
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from mamba_probe.kernels.scan import Emit, arguments, backward, chunked, fused, gpu, mass

PER_TOKEN = ("x", "delta", "B", "C", "z")
COMPILED = []


class Driver:
    """As much of a driver as the launch asks before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}


def compiled(kernel, grid):
    """In place of a launch."""
    return lambda *arguments, **options: COMPILED.append(kernel.run(*arguments, grid=grid, warmup=True, **options))


def used(kernel):
    """Registers a thread, bytes of stack a thread (spills are there) and of shared memory a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK")}
    return found | {"shared": kernel.metadata.shared}


def checked(inputs, emit=None):
    missing = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay"))
    given = missing | {"discretization": "euler", "emit": emit} | inputs | {"initial_state": None}
    return arguments.check(**given)


def told(name):
    for kernel in COMPILED:
        print(json.dumps({"case": name, "kernel": kernel.metadata.name} | used(kernel)), flush=True)


def call(name, family, inputs, emit=None, tile=None):
    a = checked(inputs, emit)
    out, last = torch.empty_like(a.x), torch.empty(a.state_shape, dtype=a.dtype)
    COMPILED.clear()
    asked = gpu.buffers(a), None, None
    options = {} if tile is None else {"tile": tile}
    if family == "mass":
        mass.launch(a, *asked, **options)
    else:
        {"fused": fused, "chunked": chunked}[family].launch(a, out, last, *asked, **options)
    told(name)


def gradients(name, inputs):
    """By the rule's tile, in chunks."""
    a = checked(inputs)
    states = torch.empty(len(a.x), 7, *a.state_shape[1:], dtype=a.dtype)
    COMPILED.clear()
    tile = backward.choose_tile(a)._replace(chunks=2)
    backward.backward(a, states, backward.Upstream(out=torch.empty_like(a.x)), tile)
    told(name)


def masses():
    """One state size each for Mamba-1 and Mamba-2, by the rule's tile and in chunks."""
    wide, two = (draw(None, 1, 512, shape=shape) for shape in ((5120, 1, 16, False), (80, 64, 128, True)))
    both = Emit(("mass", "mass_distance"))
    call("mass bf16", "mass", cast(wide, torch.bfloat16, PER_TOKEN), both, mass.Tile(16, 8, 2))
    call("mass fp32", "mass", wide, both, mass.Tile(16, 8, 2))
    call("mass bf16, Mamba-2", "mass", cast(two, torch.bfloat16, PER_TOKEN), both, mass.Tile(2, 8, 2))
    call("mass fp32, Mamba-2", "mass", two, both, mass.Tile(2, 4, 2))


def main():
    driver.set_active(Driver())
    jit.KernelInterface.__getitem__ = compiled
    if sys.argv[1:] == ["mass"]:
        masses()
        return
    if sys.argv[1:] == ["backward"]:
        wide = draw(None, 1, 512, shape=(5120, 1, 16, False)) | {"delta_limits": (0.0, float("inf"))}
        gradients("backward bf16", cast(wide, torch.bfloat16, PER_TOKEN))
        gradients("backward fp32", wide)
        return
    wide, chunks = draw(None, 1, 512, shape=(5120, 1, 16, False)), fused.Tile(8, 16, 2)
    one = cast(wide, torch.bfloat16, PER_TOKEN)
    call("fused bf16", "fused", one, tile=fused.Tile(16, 8, 2))
    call("fused bf16", "fused", one, tile=chunks)
    call("fused fp32", "fused", wide, tile=fused.Tile(16, 8, 1))
    call("fused bf16 delta energy", "fused", one, Emit(("delta", "delta_cumsum", "energy")), fused.Tile(16, 8, 1))
    narrow = Emit(("A_bar", "h"), dtype=torch.bfloat16)
    call("fused bf16 A_bar h", "fused", one, narrow, fused.Tile(32, 8, 1, 8, 3, 2))
    two = cast(draw(None, 1, 512, shape=(8, 64, 128, True)), torch.bfloat16, PER_TOKEN)
    call("chunked bf16", "chunked", two)
    call("chunked bf16 h", "chunked", two, Emit(("h",), dtype=torch.bfloat16))
    call("chunked fp32, one sequence", "chunked", draw(None, 1, 16, shape=(1, 16, 16, True)))  # sizes of 1 compile in
    chunked.PROGRAMS = 1
    call("chunked bf16, in rounds", "chunked", two, tile=chunked.Tile(64, 64, 2))


if __name__ == "__main__":
    main()
