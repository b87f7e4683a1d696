"""Where the tensors of a recorded model call are kept: on the host, or on the device that made them.

A layer's tensors go to the host on a stream of their own, into page-locked memory that holds all layers of a variable:
the copies run while the next layers compute, and what has arrived is the trace's array, copied no further. Tensors too
small for a copy of their own go together with those of the next layers.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["IN_FLIGHT", "KEEPS", "PARCEL", "Courier", "Kept", "host_like", "widened"]

KEEPS = ("host", "device")

IN_FLIGHT = 2**29
"""Bytes of device memory that may wait for their copy to the host; past that the next layer waits for the oldest."""

PARCEL = 2**22
"""Bytes from which on a variable's tensors are checked and copied; till then they wait for the next layer's."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """That of a trace: fp32 at least, so that bf16 and fp16 widen exactly.

    >>> widened(torch.bfloat16)
    torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def host_like(whole: Tensor, n_layer: int) -> Tensor:
    """Host memory for `n_layer` layers of a variable, page-locked where they come from a GPU; `whole` (layer, ...)."""
    pinned = whole.device.type == "cuda"
    return torch.empty((n_layer, *whole.shape[1:]), dtype=widened(whole.dtype), device="cpu", pin_memory=pinned)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies from a device: one, since torch keeps the memory it works with by stream, and what a new
    one needs is asked of the driver, which can take longer than the copies."""
    return torch.cuda.Stream(device)


class Courier:
    """Copies tensors to the host beside the model's own work."""

    def __init__(self, in_flight: int = IN_FLIGHT):
        self._in_flight = in_flight
        self._under_way: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()
        self._bytes = 0

    def send(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy `source` into `target` on the host; from a GPU it arrives later: at the event, see `wait`.

        Nothing may write to the source any more.
        """
        device = source.device
        if device.type != "cuda":
            target.copy_(source)
            return None
        stream = _copying(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)  # widened and made contiguous on the device
        arrived = torch.cuda.Event()
        arrived.record(stream)
        self._under_way.append((arrived, target, source))  # held: their memory is not used again till then
        self._bytes += source.nbytes
        while self._bytes > self._in_flight and len(self._under_way) > 1:
            self._arrive()
        return arrived

    def wait(self) -> None:
        """Until everything sent has arrived."""
        while self._under_way:
            self._arrive()

    def _arrive(self) -> None:
        event, _, source = self._under_way.popleft()
        event.synchronize()
        self._bytes -= source.nbytes


@dataclass
class _Parcel:
    """A variable's tensors of layers that follow one another, from the place `first` on."""

    first: int
    tensors: list[Tensor] = field(default_factory=list)
    n_byte: int = 0

    def fits(self, at: int, tensor: Tensor) -> bool:
        """Whether `tensor`, of the layer at place `at`, may come next."""
        return at == self.first + len(self.tensors) and self.tensors[0].device == tensor.device

    def add(self, tensor: Tensor) -> None:
        """Put it in."""
        self.tensors.append(tensor)
        self.n_byte += tensor.nbytes

    @property
    def whole(self) -> Tensor:
        """(layer, batch, token, ...)."""
        return self.tensors[0][None] if len(self.tensors) == 1 else torch.stack(self.tensors)


class Kept:
    """The tensors (batch, token, ...) of one model call, by layer and variable."""

    posted = False
    """Whether they leave for somewhere else, and cannot be taken from here."""

    def __init__(self, layers: Sequence[int], courier: Courier, keep: str):
        self._place = {layer: at for at, layer in enumerate(layers)}
        self._courier = courier
        self._on_host = keep == "host"
        self._stacks: dict[str, Tensor] = {}
        self._open: dict[str, _Parcel] = {}
        self._totals: list[tuple[list[tuple[int, str]], Tensor]] = []
        """Sums, one a layer and variable."""
        self.tensors: dict[tuple[int, str], Tensor] = {}
        """Those that stayed on their device."""

    def put(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what one layer made. Its tensors must be the recording's own: nothing writes to them any more."""
        at = self._place[layer]
        for name, tensor in tensors.items():
            if not self._on_host:
                self.tensors[layer, name] = tensor
            if name in self._open and not self._open[name].fits(at, tensor):
                self._close(name)
            parcel = self._open.setdefault(name, _Parcel(at))
            parcel.add(tensor)
            if parcel.n_byte >= PARCEL:
                self._close(name)

    def suspects(self) -> list[tuple[int, str]]:
        """Layers and variables whose sum is NaN or infinite: one of their entries is, or their sum overflows.

        To be asked once all layers are there.
        """
        for name in list(self._open):
            self._close(name)
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[list[tuple[int, str]], Tensor]]] = {}
        for keys, totals in self._totals:
            groups.setdefault((totals.device, totals.dtype), []).append((keys, totals))
        found = []
        for group in groups.values():  # one answer from the device for all of them
            finite = torch.cat([totals for _, totals in group]).isfinite().tolist()
            every = [key for keys, _ in group for key in keys]
            found += [key for key, is_finite in zip(every, finite, strict=True) if not is_finite]
        self._totals = []
        return sorted(found, key=lambda key: self._place[key[0]])

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
            for layer, at in self._place.items():
                self._send(name, at, self.tensors[layer, name][None])
        return self._stacks.pop(name).numpy()

    def _close(self, name: str) -> None:
        """Check a parcel, and send it to the host where that is the place."""
        parcel = self._open.pop(name)
        whole = parcel.whole
        layers = list(self._place)[parcel.first : parcel.first + len(whole)]
        totals = whole.sum(tuple(range(1, whole.ndim)), dtype=widened(whole.dtype))
        self._totals.append(([(layer, name) for layer in layers], totals))
        if self._on_host:
            self._send(name, parcel.first, whole)

    def _send(self, name: str, first: int, whole: Tensor) -> None:
        if name not in self._stacks:
            self._stacks[name] = host_like(whole, len(self._place))
        self._courier.send(self._stacks[name][first : first + len(whole)], whole)
