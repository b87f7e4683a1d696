"""What the kernels of A (head,)'s backward take, compiled as in `resources`: a script, one JSON line a kernel.

Arguments: the dtypes of the inputs, "bfloat16" and "float32".
"""

import sys

import resources
import torch
from oracle import cast, draw

from mamba_probe.kernels.scan.backward import Upstream
from mamba_probe.kernels.scan.chunked_backward import backward


def gradients(name):
    """80 heads of 64 channels, 128 states, by the rule's tile."""
    given = draw(None, 1, 512, shape=(80, 64, 128, True)) | {"delta_limits": (0.0, float("inf"))}
    a = resources.checked(cast(given, getattr(torch, name), resources.PER_TOKEN))
    resources.COMPILED.clear()
    backward(a, None, Upstream(out=torch.empty_like(a.x)))
    resources.told(name)


def main():
    resources.driver.set_active(resources.Driver())
    resources.jit.KernelInterface.__getitem__ = resources.compiled
    for name in sys.argv[1:]:
        gradients(name)


if __name__ == "__main__":
    main()
