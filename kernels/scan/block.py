"""A block of tokens of one scan, as the cpu backend's loops read it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.naive import decay_exponent, write_scale

__all__ = ["Block", "Step", "select"]


@dataclass(frozen=True)
class Block:
    """The tokens `span` of the arguments `a`, in the compute dtype; what is state-sized only where it is read.

    delta is the step size, of one token where it is constant (`Arguments.constant_delta`).
    """

    a: Arguments
    delta: Tensor
    span: slice

    @property
    def x(self) -> Tensor:
        """(batch, token, head, head_channel)."""
        return self.a.widened(self.a.x[:, self.span])

    @property
    def B(self) -> Tensor:
        """(batch, token, group, state)."""
        return self.a.widened(self.a.B[:, self.span])

    @property
    def C(self) -> Tensor:
        """(batch, token, group, state)."""
        return self.a.widened(self.a.C[:, self.span])

    @property
    def exponent(self) -> Tensor:
        """log A_bar (batch, token, head, state or 1); one token where delta is constant and nothing else varies."""
        log_decay = None if self.a.log_decay is None else self.a.widened(self.a.log_decay[:, self.span])
        starts = None if self.a.starts is None else self.a.starts[:, self.span]
        return decay_exponent(self.delta, self.a.A, log_decay, starts)

    @property
    def scale(self) -> Tensor:
        """B_bar / B (batch, token, head, state or 1); one token where delta is constant."""
        return write_scale(self.delta, self.a.A, self.a.discretization)

    def per_head(self, tensor: Tensor) -> Tensor:
        """(batch, token, group, state) -> its head axis, left at 1 where one group serves all."""
        return tensor if tensor.shape[2] == 1 else tensor.repeat_interleave(self.a.heads_per_group, dim=2)


Step: TypeAlias = tuple[Tensor, Tensor, Callable[[slice | list[int]], list[Tensor]]]
"""Of one block: y (batch, token, head, head_channel) without D, the state after it, the states after chosen tokens."""


def select(states: list, chosen: slice | list[int]) -> list:
    """The states after the chosen tokens of a block."""
    return states[chosen] if isinstance(chosen, slice) else [states[token] for token in chosen]
