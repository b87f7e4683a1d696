"""What a recording will weigh, before anything runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mamba_probe.recorder import Plan
from mamba_probe.trace.memory import readable

__all__ = ["Estimate", "estimate", "layout_of"]

COMPLEX = ("A", "B", "C", "A_bar", "B_bar", "h")
"""Variables that S4D holds as complex numbers."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a trace's variables, uncompressed: in memory, and about so many in a store.

    Coordinates (token ids, validity, positions) are not counted: some 60 bytes a token.

    Arguments:
        variables: bytes by variable.
        layers, rows, tokens: what they are of.
    """

    variables: Mapping[str, int]
    layers: int
    rows: int
    tokens: int

    @property
    def nbytes(self) -> int:
        """Of all variables."""
        return sum(self.variables.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.variables.items())
        return f"{readable(self.nbytes)} for {self.layers} layer(s), {self.rows} x {self.tokens} tokens: {parts}"


def estimate(plan: Plan, rows: int, tokens: int, dtype: torch.dtype, width: int) -> Estimate:
    """Return the bytes of what a plan records.

    Each variable has the product of its dimensions of the schema, times 4 bytes (8 in a float64 model, and for
    delta_cumsum; complex numbers twice that). Source: ours.

    Arguments:
        plan: a checked plan.
        rows, tokens: of the recording.
        dtype: of the model's weights.
        width: features of the model.
    """
    found = {}
    for name in plan.variables:
        shape, kind = layout_of(plan, name, rows, tokens, dtype, width)
        found[name] = math.prod(shape) * kind.itemsize
    return Estimate(found, len(plan.layers), rows, tokens)


def layout_of(
    plan: Plan, name: str, rows: int, tokens: int, dtype: torch.dtype, width: int
) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the dtype that a variable of the plan will have in the trace; see `estimate`."""
    kept, heads = (len(every) if every is not None else whole for every, whole in (
        (plan.tokens, tokens), (plan.channels, plan.sizes.n_heads)))  # fmt: skip
    sizes = plan.sizes
    extent = {
        "layer": len(plan.layers), "batch": rows, "token": kept, "channel": heads, "head": heads, "model": width,
        "head_channel": sizes.head_channels, "group": sizes.n_groups, "state": sizes.n_states,
        "direction": len(sizes.directions),
    }  # fmt: skip
    wide = dtype == torch.float64 or name == "delta_cumsum"
    is_complex = sizes.family == "s4d" and name in COMPLEX
    kind = ("complex128" if wide else "complex64") if is_complex else ("float64" if wide else "float32")
    return tuple(extent[dim] for dim in sizes.dims(name)), np.dtype(kind)
