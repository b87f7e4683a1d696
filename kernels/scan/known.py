"""Calls on triton like one before, which do again what that one did: nothing is checked, cast or chosen.

Torch's own guards, those of its compiler, tell in half a microsecond whether tensors are like others: of one class,
dtype, device, sizes and strides, with gradients or without, and met by the same dispatch keys, so that calls under
functorch, a dispatch mode or other autocast are not like those outside. To ask each tensor from Python takes ten times
as long, and what such a call would find out, a form's plans hold. Whatever is not like a call before goes the long way.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from triton.runtime.errors import OutOfResources

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan import backward, chunked, chunked_backward, fused
from mamba_probe.kernels.scan.arguments import TENSORS, Arguments, emitted_as
from mamba_probe.kernels.scan.launcher import Plan, Plans, maker, run
from mamba_probe.kernels.scan.sums import ANSWERS

__all__ = ["Known", "is_plain"]

CALLED = {"delta_bias": "bias", "initial_state": "initial"}
"""Arguments that plans know by another name."""

NOTHING = nullcontext()

NONE = Emission()
"""Emitted, by calls that ask for nothing."""

NO_OTHER = (None,) * 6
"""Gradients of what a scan answers beside its output, as the keys of backward plans have them."""


class Forward(NamedTuple):
    """A plan, the names of what it is given in order, and the last of these, which a call makes first: shape, strides
    and dtype."""

    plan: Plan
    names: tuple[str, ...]
    makes: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]


class Backward(NamedTuple):
    """A plan, the names of what it is given in order, where among the answers the gradient of each argument is, and of
    which arguments that is one number a channel too many."""

    plan: Plan
    names: tuple[str, ...]
    order: list[int]
    shared: list[int]


class Known:
    """Calls that give `names` and tensors like `given`, with the same options; those that emit, without gradients."""

    def __init__(self, names: Sequence[str], given: Sequence[Tensor], options: tuple[Any, ...]) -> None:
        self.names, self.options = tuple(names), options
        self.called = tuple([CALLED.get(name, name) for name in names])
        self.is_like: Callable[..., bool] = TensorGuards(
            *given, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        self.wanted = [tensor.requires_grad for tensor in given]
        self.needs_grad = any(self.wanted)
        self.emitted: tuple[str, ...] = ()
        self.copied: list[tuple[str, int]] = []
        self.forwards: dict[bool, Forward] = {}
        self.backwards: dict[Hashable, Backward] = {}

    def keep_forward(self, a: Arguments, plans: Plans, saves: bool) -> None:
        """How a call went that just did: `saves` what its backward begins from."""
        if a.scalar_A:
            plan = plans.get((chunked.choose_tile, None))
        else:
            plan = plans.get((fused.choose_tile, None, fused.SEGMENT, not saves))
        shapes = {"out": (tuple(a.x.shape), a.x.dtype), "last": (a.state_shape, a.dtype)}
        if saves and not a.scalar_A:
            shapes["states"] = fused.saved_shape(a), a.dtype
        emitted = emitted_as(a)
        self.emitted = tuple(emitted)
        self.copied = [(name, self.names.index(name)) for name in "BC" if name in a.emit.variables]
        shapes |= {f"e_{name}": kind for name, kind in emitted.items()}
        if plan is not None:
            makes = [(s, torch.empty(s, device="meta").stride(), dtype) for s, dtype in shapes.values()]
            self.forwards[saves] = Forward(plan, (*self.called, *shapes), makes)

    def forward(self, given: Sequence[Tensor], saves: bool) -> list[Tensor]:
        """Output and last state, and what a backward begins from, if anything, or what is emitted."""
        plan, names, makes = self.forwards[saves]
        with _current(plan.device):
            make = maker(plan.device)
            made = [make(*each) for each in makes]
            run(plan, names, (*given, *made))
        return made

    def emission(self, filled: Sequence[Tensor], given: Sequence[Tensor]) -> Emission:
        """Of what a forward filled, with copies of B and C where they were asked for."""
        if not self.emitted and not self.copied:
            return NONE
        found = dict(zip(self.emitted, filled, strict=True))
        return Emission(**found, **{name: given[i].clone() for name, i in self.copied})

    def keep_backward(self, a: Arguments, plans: Plans, above: Tensor, has_states: bool) -> None:
        """The same of a backward, from `above`, the gradient of the output."""
        kinds, strides = (above.dtype, *NO_OTHER), above.stride()
        if a.scalar_A:
            plan = plans.get((chunked_backward.choose_tile, None, kinds, strides))
        else:
            plan = plans.get((backward.choose_tile, None, not has_states, kinds, strides))
        if plan is not None:
            names = (*self.called, "states", "d_out") if has_states else (*self.called, "d_out")
            order = [plan.made.index(ANSWERS[name]) for name in self.names]
            shared = [self.names.index("D")] if a.shared_D and a.x.shape[3] > 1 else []
            self.backwards[above.dtype, strides] = Backward(plan, names, order, shared)

    def backward(self, saved: Sequence[Tensor], above: Tensor) -> list[Tensor | None] | None:
        """Gradients of what was given, None of what needs none, from what was saved; None in place of the list where no
        such backward is known."""
        known = self.backwards.get((above.dtype, above.stride()))
        if known is None or not self.is_like(*saved[: len(self.names)]):
            return None
        plan, names, order, shared = known
        try:
            with _current(plan.device):
                found = run(plan, names, (*saved, above))
        except OutOfResources:  # of the version for another alignment: the long way says it in words
            return None
        every: list[Any] = [found[i] for i in order]
        for i in shared:
            every[i] = every[i].sum(1)
        return every if all(self.wanted) else [
            gradient if is_wanted else None for gradient, is_wanted in zip(every, self.wanted, strict=True)
        ]  # fmt: skip

    def every(self, given: Sequence[Tensor]) -> list[Tensor | None]:
        """What was given, in the order of TENSORS."""
        by_name = dict(zip(self.names, given, strict=True))
        return [by_name.get(name) for name in TENSORS]


def _current(device: torch.device) -> AbstractContextManager[object]:
    """In which it is the current device, as it is already but for few calls."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(device)


def is_plain(tensors: Sequence[Tensor | None], a: Arguments) -> bool:
    """Whether a call asks for what one kernel makes of all tokens and heads, and the kernels read each of its tensors,
    in the order of TENSORS, where it lies: as `Arguments` has it, or A and D as views of it."""
    x, delta, A, B, C, D, z, bias, initial, seq_idx, log_decay = tensors
    part = a.emit.tokens is not None or a.emit.channels is not None
    more = {"mass", "mass_distance"}.intersection(a.emit.variables)
    if part or more or seq_idx is not None or log_decay is not None or a.A.is_complex():
        return False
    viewed = [A] if D is None else [A, D]
    if any(tensor is None or tensor.dtype != a.dtype or not tensor.is_contiguous() for tensor in viewed):
        return False
    if a.shared_D and a.x.shape[3] > 1 and not a.scalar_A:  # `fused` copies it for every channel
        return False
    was, now = (x, delta, B, C, z, bias, initial), (a.x, a.delta, a.B, a.C, a.z, a.delta_bias, a.given_state)
    return all(one is other for one, other in zip(was, now, strict=True))
