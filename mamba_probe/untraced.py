"""What torch.compile does not look into: a recording inside a compiled model breaks its graph there, and only there."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from mamba_probe.kernels.emission import Emit
from mamba_probe.mixers import Call, Listener

__all__ = ["UntracedListener", "untraced"]


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, at which torch.compile breaks its graph; as it is where nothing was compiled yet."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


class UntracedListener:
    """A listener that a compiler does not look into."""

    def __init__(self, listener: Listener):
        self._wants, self._receive = untraced(listener.wants), untraced(listener.receive)

    def wants(self, layer: int, continues: bool, length: int) -> Emit | None:
        """See `Listener`."""
        return self._wants(layer, continues, length)

    def receive(self, call: Call) -> None:
        """See `Listener`."""
        self._receive(call)
