"""The grid of `stress` through Triton's interpreter, answers and gradients, cut into chunks: one line a call."""

import sys
from itertools import product

import torch
from gradients import checked, saved
from stress import VARIANTS, answered, differentiated, names

from mamba_probe.kernels.scan import Emit, backward, chunked, chunked_backward, fused, mass, selective_scan
from mamba_probe.kernels.scan.backward import Upstream

TOKEN = 20


def scan(emit, **given):
    return selective_scan(**given, emit=Emit(emit), backend="triton")


def go_back(given, above):
    a, up = checked(given), Upstream(**above)
    if a.scalar_A:
        found = chunked_backward.backward(a, None, up, chunked_backward.Tile(16, 1, 16, 16))
    else:
        found = backward.backward(a, saved(a, 8, fused.Tile(32, 8, 2)), up, backward.Tile(32, 4, 3, 8, 1))
    found["D"] = found["D"].reshape(len(given["D"]), -1).sum(1)
    return found


def calls(family=None, variant=None):
    """Of the families and the variants, or of one: the cases that can share a group are one call."""
    held = (
        ("answers", lambda *of: answered(scan, of[0], of[1], TOKEN, of[2])),
        ("gradients", lambda *of: differentiated(go_back, of[0], of[1], TOKEN, of[2])),
    )
    for every in product(("mamba1", "mamba2"), VARIANTS, (True, False), held):
        if (family or every[0], variant or every[1]) == every[:2] and names(*every[:3]):
            yield every


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    fused.choose_tile = lambda a: fused.Tile(32, 8, 3)
    chunked.choose_tile = lambda a: chunked.Tile(16, 16, 2)
    mass.choose_tile = lambda a: mass.Tile(32, 8, 2)
    broken = {}
    for family, variant, shared, (what, held) in calls(*sys.argv[1:]):
        found = held(family, variant, shared)
        broken |= {(family, variant, what, *key): value for key, value in found.items()}
        print("broken" if found else "held", family, variant, what, flush=True)
    assert not broken, "\n".join(f"{key}: {value}" for key, value in broken.items())


if __name__ == "__main__":
    main()
