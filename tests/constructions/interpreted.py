"""Small constructions through the interpreted Triton kernel on the CPU: a script for `interpret.py`, a line a case.

In float32; with the argument "all", in float64 too.

A process of its own, since Triton reads the variable when it is imported.
"""

import sys

import numpy as np
import torch

import mamba_probe as mp
from mamba_probe.constructions import haar, keep_nth

SIGNAL = np.random.default_rng(0).standard_normal((2, 16))
TOKENS = np.random.default_rng(0).integers(0, 4, (2, 16))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = {
    "haar": (lambda dtype: haar(16, 2, dtype=dtype), SIGNAL, TOLERANCE),
    "haar, mamba2": (
        lambda dtype: haar(16, 2, variant="ramps", mixer="mamba2", dtype=dtype),
        SIGNAL,
        {torch.float32: 1e-3, torch.float64: 1e-8},
    ),
    "keep, mamba1": (lambda dtype: keep_nth(4, 16, 5, dtype=dtype), TOKENS, TOLERANCE),
    "keep, mamba2": (  # transformers computes the norm in float32
        lambda dtype: keep_nth(4, 16, 5, dtype=dtype, mixer="mamba2"),
        TOKENS,
        dict.fromkeys(TOLERANCE, 1e-6),
    ),
}


def main():
    for name, (build, given, tolerance) in CASES.items():
        for dtype, most in list(tolerance.items())[: None if sys.argv[1:] == ["all"] else 1]:
            construction = build(dtype)
            with mp.attach(construction.model, backend="triton"), torch.no_grad():
                out = construction.model(construction.inputs(given))[:, -1].double().numpy()
            want = construction.expected(given)
            error = (np.abs(out - want).max(1) / np.abs(want).max(1)).max()
            assert error <= most, (name, dtype, error)
            print("held", name, dtype, f"{error:.1e}", flush=True)


if __name__ == "__main__":
    main()
