"""A tap: what stands in one layer between the library's mixer and our scan while a probe is attached."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.hooks import Edit
from mamba_probe.kernels.emission import Emission, Emit
from mamba_probe.kernels.scan import ScanResult, selective_scan
from mamba_probe.mixers.offload import refuse_absent

__all__ = ["OPEN_GATE", "Call", "Listener", "Tap"]

OPEN_GATE = 1.2784645427610738
"""The z with silu(z) = 1: where a library insists on a gate, this one is open."""
NO_LIMITS = (0.0, float("inf"))


@dataclass
class Call:
    """One forward of one mixer: what its caller passed and what came of it."""

    layer: int
    valid: Tensor | None = None
    """(batch, token) bool, or None where nothing was masked."""
    continues: bool = False
    """Whether a cached state was carried in."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Executed tensors in the scan's layout: those of the emission, and x, z, u, out."""
    edits: tuple[str, ...] = ()
    """The edits that acted on this layer."""
    state_in: Tensor | None = None
    state_out: Tensor | None = None
    parts: list["Call"] = field(default_factory=list)
    """One a scan, where a mixer scans its channels in parts; together they make this call."""


class Listener(Protocol):
    """Who records: asked before a mixer's scan what to emit, handed the call afterwards."""

    def wants(self, layer: int, continues: bool, length: int) -> Emit | None:
        """What to emit in this layer and call; None is nothing."""
        ...

    def receive(self, call: Call) -> None:
        """Take what the call made."""
        ...


@dataclass
class Tap:
    """The scan of one layer, with the edits that act on it and the listener that records it."""

    layer: int
    backend: str = "auto"
    edits: list[Edit] = field(default_factory=list)
    listener: Listener | None = None
    call: Call | None = None

    def edited(self, target: str, tensor: Tensor) -> Tensor:
        """`tensor` (batch, token, ...) after the edits on `target`, in the order they were given."""
        valid = None if self.call is None else self.call.valid
        for edit in self.edits:
            if edit.acts_on(target, self.layer):
                tensor = edit.apply(tensor, valid)
        return tensor

    def touches(self, target: str) -> bool:
        """Whether an edit acts on `target` in this layer."""
        return any(edit.acts_on(target, self.layer) for edit in self.edits)

    def scan(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, *, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        delta_limits: tuple[float, float] = NO_LIMITS, initial_state: Tensor | None = None,
        discretization: str = "euler", **_backend: Any,
    ) -> ScanResult:  # fmt: skip
        """Our scan in place of the mixer's, edited and recorded: `selective_scan` but for its backend, the tap's."""
        refuse_absent(self.layer, "scan", (x, delta, A, B, C, D, z, delta_bias))
        if self.touches("delta"):
            delta = self.edited("delta", _step_size(delta, delta_bias, delta_softplus, delta_limits))
            delta_bias, delta_softplus, delta_limits = None, False, NO_LIMITS
        B, C = self.edited("B", B), self.edited("C", C)
        gate = None if self.touches("gate") else z
        if x.dtype == torch.float64:  # the library rounds these to fp32 whatever the model is
            A, D, delta_bias = _double(A), _double(D), _double(delta_bias)
        log_decay = None
        if self.touches("decay"):  # with euler the write does not know A
            log_decay = None if discretization == "euler" else torch.zeros((*delta.shape, A.shape[1])).to(A)
            A = torch.zeros_like(A) if discretization == "euler" else A
        emit = self._wanted(x.shape[1])
        state = None if initial_state is None else initial_state.to(_state_dtype(x))
        result = selective_scan(
            x, delta, A, B, C, D, gate,
            delta_bias=delta_bias, delta_softplus=delta_softplus, delta_limits=delta_limits,
            initial_state=state, log_decay=log_decay, discretization=discretization, emit=emit, backend=self.backend,
        )  # fmt: skip
        self._note(result, emit, x, z, initial_state)
        return result

    def _wanted(self, length: int) -> Emit | None:
        if self.listener is None or self.call is None:
            return None
        return self.listener.wants(self.layer, self.call.continues, length)

    def _note(self, result: ScanResult, emit: Emit | None, x: Tensor, z: Tensor | None, state: Tensor | None) -> None:
        if self.call is None or emit is None:
            return
        self.call.tensors |= emitted(result.emission) | {"x": x}
        if z is not None:
            self.call.tensors["z"] = z
        self.call.state_in = None if state is None else state.clone()  # the library updates it in place
        self.call.state_out = result.last_state

    def conv(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The library's convolution, or, when ablated, the identity before its activation."""

        def convolution(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            refuse_absent(self.layer, "convolution", (hidden, *args, *kwargs.values()))
            out = original(hidden, *args, **kwargs)  # always: it updates the cached window
            if not self.touches("conv"):
                return out
            activation = kwargs.get("activation")
            if activation not in ("silu", "swish"):
                raise ValueError(f"ablate(conv): expected activation 'silu', got {activation!r}: unknown to the probe")
            return F.silu(hidden)[..., -out.shape[-1] :]

        return convolution


def emitted(emission: Emission) -> dict[str, Tensor]:
    """The tensors of an emission that were asked for, by name."""
    fields = vars(emission)
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


def _double(tensor: Tensor | None) -> Any:
    return tensor if tensor is None or tensor.is_complex() else tensor.double()


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limits: tuple[float, float]) -> Tensor:
    """Delta as the scan would make it, for edits that act on the step size itself."""
    dt = dt.to(_state_dtype(dt))
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    dt = F.softplus(dt) if softplus else dt
    return dt.clamp(*limits)
