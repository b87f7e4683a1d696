"""A tap: what stands in one layer between the library's mixer and our scan while a probe is attached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.edits import Place, first_token
from mamba_probe.kernels.emission import Emission, Emit
from mamba_probe.kernels.scan import ScanResult, selective_scan
from mamba_probe.mixers.offload import refuse_absent
from mamba_probe.mixers.states import interrupted

__all__ = ["OPEN_GATE", "Action", "Call", "Listener", "Rules", "Tap", "Watcher"]

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
    start: int | None = 0
    """Its first token, as the sequence counts them; None where the beginning of the sequence was not seen."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Executed tensors in the scan's layout: those of the emission, and x, z, u, out."""
    edits: tuple[str, ...] = ()
    """The edits that acted on this layer."""
    A: Tensor | None = None
    """What its scan was given; None where it had none."""
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


class Action(Protocol):
    """Who changes, or follows, a quantity where it stands: an edit, or a hook."""

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """Those it acts on, of the sequence; None is all."""
        ...

    @property
    def counts(self) -> bool:
        """Whether it must know which token of the sequence is which."""
        ...

    @property
    def alters(self) -> bool:
        """Whether a recording must say that it acted."""
        ...

    def acts_on(self, target: str, layer: int) -> bool:
        """Whether it acts on `target` in `layer`."""
        ...

    def apply(self, tensor: Tensor, place: Place) -> Tensor:
        """The tensor (batch, token, ...) that goes on: `tensor` itself where nothing was to be done."""
        ...


class Watcher(Protocol):
    """Who is shown what a scan emits, and changes nothing."""

    name: str
    """Of the emission."""
    layer: int

    def see(self, tensor: Tensor) -> None:
        """Take it."""
        ...


class Rules(Protocol):
    """Who gives a mixer's parts gradients of its own, and leaves their values: see `mamba_probe.relevance`."""

    def scan(
        self, x: Tensor, z: Tensor | None, selection: Mapping[str, Tensor | None], fixed: Mapping[str, Any]
    ) -> ScanResult:
        """`selective_scan` of x, gated by z; `selection` is what the tokens choose."""
        ...

    def conv(self, original: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The library's convolution and its activation."""
        ...


@dataclass
class Tap:
    """The scan of one layer, with the edits that act on it, those who watch, and the listener that records it."""

    layer: int
    backend: str = "auto"
    edits: list[Action] = field(default_factory=list)
    watchers: list[Watcher] = field(default_factory=list)
    listener: Listener | None = None
    rules: Rules | None = None
    call: Call | None = None
    acted: set[int] = field(default_factory=set)
    """Identities of the actions that have changed something."""
    seen: int | None = None
    """Tokens of the sequence so far; None before its beginning."""
    ran: bool = False
    """Whether a forward has started since this was last unset; no count, which a compiled model would be bound to."""

    def begin(self, call: Call, length: int) -> Call:
        """A forward of `length` tokens starts; tokens are counted only where an action must know them."""
        self.ran, self.call = True, call
        call.edits = tuple(repr(edit) for edit in self.edits if edit.alters)
        if any(edit.counts for edit in self.edits):
            call.start = self.seen if call.continues else 0
            self.seen = None if call.start is None else call.start + length
        elif self.seen is not None:
            self.seen = None
        return call

    def edited(self, target: str, tensor: Tensor, at: int = 0) -> Tensor:
        """`tensor` (batch, token, ...), whose first token is the call's `at`-th, after the edits on `target`, in the
        order they were given."""
        call = self.call or Call(self.layer)
        start = None if call.start is None else call.start + at
        valid = call.valid if call.valid is None or call.valid.shape[1] == tensor.shape[1] else None
        for edit in self.edits:
            if edit.acts_on(target, self.layer) or (target == "A_bar" and edit.acts_on("decay", self.layer)):
                before, tensor = tensor, edit.apply(tensor, Place(self.layer, valid, start))
                if tensor is not before:
                    self.acted.add(id(edit))
        return tensor

    def touches(self, *targets: str) -> bool:
        """Whether an edit acts on one of `targets` in this layer."""
        return any(edit.acts_on(target, self.layer) for edit in self.edits for target in targets)

    def taken_out(self, part: str) -> bool:
        """Whether an edit takes `part` out of this layer."""
        acting = [id(edit) for edit in self.edits if edit.acts_on(part, self.layer)]
        if acting:
            self.acted.update(acting)
        return bool(acting)

    def scan(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, *, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        delta_limits: tuple[float, float] = NO_LIMITS, initial_state: Tensor | None = None,
        discretization: str = "euler", **_backend: Any,
    ) -> ScanResult:  # fmt: skip
        """Our scan in place of the mixer's, edited and recorded: `selective_scan` but for its backend, the tap's."""
        refuse_absent(self.layer, "scan", (x, delta, A, B, C, D, z, delta_bias))
        if self.call is not None:
            self.call.A = A
        options: dict[str, Any] = {"discretization": discretization, "backend": self.backend}
        if x.dtype == torch.float64:  # the library rounds these to fp32 whatever the model is
            A, D, delta_bias = _double(A), _double(D), _double(delta_bias)
        if self.rules is not None:
            fixed = {"D": D, "delta_softplus": delta_softplus, "delta_limits": delta_limits} | options
            selection = {"delta": delta, "A": A, "B": B, "C": C, "delta_bias": delta_bias}
            return self.rules.scan(x, z, selection, fixed | {"initial_state": initial_state})
        if self.touches("dt", "delta", "A_bar", "h"):
            delta = self.edited("dt", _biased(delta, delta_bias))
            delta = F.softplus(delta) if delta_softplus else delta
            delta = self.edited("delta", delta.clamp(*delta_limits))
        else:
            options |= {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "delta_limits": delta_limits}
        x, B, C = self.edited("x", x), self.edited("B", B), self.edited("C", C)
        A, log_decay = self._decay(delta, A, discretization)
        gate = z if z is None else self.edited("z", z)
        open_gate = gate is not None and self.taken_out("gate")  # a gate that is elsewhere is not taken out here
        acting = None if open_gate or self.touches("y") else gate
        state = None if initial_state is None else initial_state.to(_state_dtype(x))
        wide = x.to(_state_dtype(x)) if self.touches("y") else x  # y comes in its dtype, and is gated after its edit
        given = {"x": wide, "delta": delta, "B": B, "C": C, "z": acting, "log_decay": log_decay}
        scan = partial(self._scan, given, {"A": A, "D": D} | options, state, _once(partial(self.edited, "h")))
        emit = self._wanted(x.shape[1])
        result = scan(emit)
        y = self.edited("y", result.y) if self.touches("y") else result.y
        self._show(scan, {"y": y} if self.touches("y") else {})
        self._note(result, y, emit, x, gate, initial_state)
        if not self.touches("y"):
            return result
        gated = y if gate is None or open_gate else y * F.silu(gate.to(y.dtype))
        return result._replace(y=gated.to(x.dtype))

    def _decay(self, delta: Tensor, A: Tensor, discretization: str) -> tuple[Tensor, Tensor | None]:
        """A, and what replaces delta A in the decay where an edit acts on it; with euler the write does not know A."""
        if self.touches("A_bar"):
            log_decay = delta * A if A.ndim == 1 else delta[..., None] * A
            return A, _log(self.edited("A_bar", torch.exp(log_decay)))
        gone = self.taken_out("decay")
        if gone and discretization == "euler":
            return torch.zeros_like(A), None
        return A, torch.zeros((*delta.shape, A.shape[1])).to(A) if gone else None

    def _scan(
        self, given: Mapping[str, Tensor | None], fixed: Mapping[str, Any], state: Tensor | None,
        edit: Callable[..., Tensor], emit: Emit | None,
    ) -> ScanResult:  # fmt: skip
        """The scan, interrupted after the tokens whose state is edited."""
        x = given["x"]
        assert x is not None
        edited = self._edited_states(x.shape[1])
        if not edited:
            return selective_scan(**given, **fixed, initial_state=state, emit=emit)  # pyright: ignore[reportArgumentType]
        return interrupted(given, fixed, state, emit, edited, edit)

    def _edited_states(self, length: int) -> list[int]:
        """The tokens of this call after which an edit acts on the state."""
        start = 0 if self.call is None else self.call.start
        named = [edit.tokens for edit in self.edits if edit.acts_on("h", self.layer)]
        if named and start is None:
            first_token(next(edit for edit in self.edits if edit.acts_on("h", self.layer)), start)
        within = {token - (start or 0) for tokens in named for token in tokens or ()}
        return sorted(token for token in within if 0 <= token < length)

    def _show(self, scan: Callable[[Emit], ScanResult], edited: dict[str, Tensor]) -> None:
        """To those who watch, what the same scan emits, but for what was edited after it."""
        watchers = [watcher for watcher in self.watchers if watcher.layer == self.layer]
        names = tuple(dict.fromkeys(watcher.name for watcher in watchers))
        if not names or self.call is None:
            return
        made = emitted(scan(Emit(names)).emission) | edited
        for watcher in watchers:
            watcher.see(made[watcher.name])

    def _wanted(self, length: int) -> Emit | None:
        if self.listener is None or self.call is None:
            return None
        return self.listener.wants(self.layer, self.call.continues, length)

    def _note(
        self, result: ScanResult, y: Tensor, emit: Emit | None, x: Tensor, z: Tensor | None, state: Tensor | None
    ) -> None:
        if self.call is None or emit is None:
            return
        self.call.tensors |= emitted(result.emission) | {"x": x}
        if y is not result.y and "y" in self.call.tensors:  # edited after the scan
            chosen = y if emit.tokens is None else y[:, list(emit.tokens)]
            chosen = chosen if emit.channels is None else chosen[:, :, list(emit.channels)]
            self.call.tensors["y"] = chosen.to(self.call.tensors["y"].dtype)
        if z is not None:
            self.call.tensors["z"] = z
        self.call.state_in = None if state is None else state.clone()  # the library updates it in place
        self.call.state_out = result.last_state

    def conv(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The library's convolution, or, when ablated, the identity before its activation."""

        def convolution(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            refuse_absent(self.layer, "convolution", (hidden, *args, *kwargs.values()))
            if self.rules is not None:
                return self.rules.conv(original, hidden, *args, **kwargs)
            out = original(hidden, *args, **kwargs)  # always: it updates the cached window
            if not self.taken_out("conv"):
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


def _once(edit: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`edit` of a state, that is asked once a token however often a scan is run."""
    left: dict[int, Tensor] = {}

    def edited(state: Tensor, at: int) -> Tensor:
        if at not in left:
            left[at] = edit(state, at=at)
        return left[at]

    return edited


def _log(A_bar: Tensor) -> Tensor:
    """log A_bar, -inf at 0, where the gradient is 0 in place of 0/0."""
    forgets = A_bar == 0
    return torch.where(forgets, -torch.inf, torch.log(torch.where(forgets, 1.0, A_bar)))


def _double(tensor: Tensor | None) -> Any:
    return tensor if tensor is None or tensor.is_complex() else tensor.double()


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _biased(dt: Tensor, bias: Tensor | None) -> Tensor:
    """Delta before its softplus, as wide as the scan would make it."""
    dt = dt.to(_state_dtype(dt))
    return dt if bias is None else dt + bias.to(dt.dtype)
