"""Where the tensors of a recorded model call are kept: on the host, or on the device that made them.

A layer's tensors go to the host on a stream of their own, into page-locked memory that holds all layers of a variable:
the copies run while the next layers compute, and what has arrived is the trace's array, copied no further.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["IN_FLIGHT", "KEEPS", "Courier", "Kept", "widened"]

KEEPS = ("host", "device")

IN_FLIGHT = 2**29
"""Bytes of device memory that may wait for their copy to the host; past that the next layer waits for the oldest."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """That of a trace: fp32 at least, so that bf16 and fp16 widen exactly.

    >>> widened(torch.bfloat16)
    torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


class Courier:
    """Copies tensors to the host beside the model's own work."""

    def __init__(self, in_flight: int = IN_FLIGHT):
        self._in_flight = in_flight
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: deque[tuple[torch.cuda.Event, Sequence[tuple[Tensor, Tensor]], int]] = deque()
        self._bytes = 0

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each source into its target on the host; from a GPU they arrive later, see `wait`.

        Args:
            pairs: (target, source); nothing may write to a source any more. Those of one call are on one device.
        """
        device = pairs[0][1].device
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)  # widened and made contiguous on the device
        size = sum(source.untyped_storage().nbytes() for _, source in pairs)
        arrived = torch.cuda.Event()
        arrived.record(stream)
        self._under_way.append((arrived, pairs, size))  # held: their memory is not used again till then
        self._bytes += size
        while self._bytes > self._in_flight and len(self._under_way) > 1:
            self._arrive()

    def wait(self) -> None:
        """Until everything sent has arrived."""
        while self._under_way:
            self._arrive()

    def _arrive(self) -> None:
        event, _, size = self._under_way.popleft()
        event.synchronize()
        self._bytes -= size


class Kept:
    """The tensors (batch, token, ...) of one model call, by layer and variable."""

    def __init__(self, layers: Sequence[int], courier: Courier, keep: str):
        self._place = {layer: at for at, layer in enumerate(layers)}
        self._courier = courier
        self._on_host = keep == "host"
        self._stacks: dict[str, Tensor] = {}
        self._totals: dict[tuple[int, str], Tensor] = {}
        self.tensors: dict[tuple[int, str], Tensor] = {}
        """Those that stayed on their device."""

    def put(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what one layer made. Its tensors must be the recording's own: nothing writes to them any more."""
        for name, tensor in tensors.items():
            self._totals[layer, name] = tensor.sum(dtype=widened(tensor.dtype))
        if self._on_host:
            self._send(layer, tensors)
        else:
            self.tensors |= {(layer, name): tensor for name, tensor in tensors.items()}

    def suspects(self) -> list[tuple[int, str]]:
        """Layers and variables whose sum is NaN or infinite: one of their entries is, or their sum overflows."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, str]]] = {}
        for key, total in self._totals.items():
            groups.setdefault((total.device, total.dtype), []).append(key)
        found = set()
        for keys in groups.values():  # one answer from the device for all of them
            finite = torch.stack([self._totals[key] for key in keys]).isfinite().tolist()
            found |= {key for key, is_finite in zip(keys, finite, strict=True) if not is_finite}
        suspects = [key for key in self._totals if key in found]
        self._totals = {}
        return suspects

    def array(self, layer: int, name: str) -> np.ndarray:
        """One layer's tensor on the host, fp32 at least."""
        if self._on_host:
            self._courier.wait()
            return self._stacks[name][self._place[layer]].numpy()
        tensor = self.tensors[layer, name]
        return tensor.to(widened(tensor.dtype)).cpu().numpy()

    def take(self, name: str) -> np.ndarray:
        """A variable of all layers, (layer, batch, token, ...), fp32 at least; let go of where it was on the host.

        Its values are there once the courier has waited.
        """
        if not self._on_host:
            for layer in self._place:
                self._send(layer, {name: self.tensors[layer, name]})
        return self._stacks.pop(name).numpy()

    def _send(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._stacks:
                shape, pinned = (len(self._place), *tensor.shape), tensor.device.type == "cuda"
                self._stacks[name] = torch.empty(shape, dtype=widened(tensor.dtype), device="cpu", pin_memory=pinned)
        if not tensors:  # everything asked for is constant
            return
        at = self._place[layer]
        self._courier.send([(self._stacks[name][at], tensor) for name, tensor in tensors.items()])
