"""The scan's loop over tokens for A (head, state), compiled by torch.compile: one kernel of `STEPS` unrolled tokens.

The rule, in one place. `cpu_compile("auto")`, the default: a call is compiled when it updates at least `WORTH` states
(batch x token x head x head_channel x state), whatever ran before, so that equal calls have equal bits. A first
compile takes 9 to 39 s and a compiled update 0.6 ns in place of 2.3 (two cores, float32): at `WORTH` one call earns it
back. "always" compiles every call, "never" none. Real A (head,) is matrix products always, and tensors on another
device than the CPU run in blocks.

A compile serves every length, since the last chunk is padded with delta = 0: A_bar = 1 and no write. Another one is
needed for other sizes of batch, head, head_channel or state, another dtype, whether h is emitted or gradients are
needed, and where A_bar is not just exp(delta A) (complex A, zoh, seq_idx, log_decay: then it is given, not computed).
"""

import sys
import warnings
from collections.abc import Callable, Hashable
from functools import cache, partial
from time import perf_counter
from types import FunctionType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.block import Block, Step, select

__all__ = ["attempt", "cpu_compile", "length", "needs_grad", "needs_states", "step", "wanted"]

STEPS = 32
"""Tokens unrolled in one kernel."""
GRADIENT_STEPS = 8
"""The same where gradients are needed: the compile of its derivative grows faster than its length."""
WORTH = 10**10
"""State updates of one call that save as much time as a compile takes: 17 s."""
NO_COMPILER = 'install one (g++), name it in the environment variable CXX, or ask for cpu_compile("never")'
MODES = ("auto", "always", "never")

T = TypeVar("T")
Parts: TypeAlias = tuple[Tensor, ...]
"""A real tensor, or the real and the imaginary part of a complex one, which inductor does not know."""


class cpu_compile:
    """Say when the cpu backend compiles its loop; from now on, or inside a with statement. The process has one setting.

    Compiling needs a C++ compiler and prints its seconds to stderr. Without a compiler, "auto" warns once and goes on
    in blocks of plain torch, "always" raises.

    Source: ours.

    Args:
        when: "auto" for calls of at least `WORTH` state updates, "always" or "never".

    Raises:
        ValueError: another setting.

    >>> with cpu_compile("never"):
    ...     cpu_compile.when
    'never'
    >>> cpu_compile.when
    'auto'
    """

    when = "auto"

    def __init__(self, when: str) -> None:
        if when not in MODES:
            raise ValueError(f"`when` must be one of {', '.join(MODES)}; got {when!r}")
        self._before, cpu_compile.when = cpu_compile.when, when

    def __enter__(self) -> "cpu_compile":
        return self

    def __exit__(self, *_: object) -> None:
        cpu_compile.when = self._before


def wanted(a: Arguments) -> bool:
    """Whether this call is to be compiled, by the rule above."""
    products = a.scalar_A and not a.A.is_complex()
    if cpu_compile.when == "never" or products or a.x.device.type != "cpu":
        return False
    return cpu_compile.when == "always" or a.initial_state.numel() * a.n_token >= WORTH


def attempt(scan: Callable[[], T]) -> T | None:
    """What a scan with `step` answers; None, with a warning, where "auto" finds no C++ compiler."""
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        return scan()
    except InductorError as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        if cpu_compile.when == "always":
            raise ValueError(f'cpu_compile("always"), but {error.inner_exception}: {NO_COMPILER}') from error
        warnings.warn(f"the CPU scan runs uncompiled: {error.inner_exception}: {NO_COMPILER}",
                      RuntimeWarning, stacklevel=4)  # fmt: skip
    return None


def length(a: Arguments, block_bytes: int) -> int:
    """Tokens of a block: whole kernels, whose states (and A_bar and scale, where given) fit `block_bytes`."""
    n_tensor = 2 if _lean(a) else 6
    n_token = block_bytes // (n_tensor * a.initial_state.numel() * a.initial_state.itemsize)
    return max(1, n_token // _unrolled(a)) * _unrolled(a)


def step(h: Tensor, block: Block) -> Step:
    """One block, kernel by kernel."""
    a, n_token, unrolled = block.a, block.x.shape[1], _unrolled(block.a)
    inputs = [_parts(_padded(tensor, unrolled, fill)) for tensor, fill in _inputs(block)]
    state, outputs, states = _with_grad(_parts(h), a), [], []
    for start in range(0, n_token, unrolled):
        pieces = [tuple(part[:, start : start + unrolled].contiguous() for part in parts) for parts in inputs]
        pieces = [*pieces, (a.A[:, None],)] if _lean(a) else pieces
        with torch.set_grad_enabled(needs_grad(a)):
            y, state, kept = _kernel(needs_states(a), _key(state, *pieces))(state, *pieces)
        outputs += y
        states += kept
    y = torch.stack(outputs[:n_token], dim=1)
    return y, _whole(state), lambda chosen: [_whole(parts) for parts in select(states[:n_token], chosen)]


def _chunk(keep: bool, h: Parts, x: Parts, scale: Parts, B: Parts, C: Parts, decay: Parts):
    """y after each token, the last state, and each state if `keep`; decay is A (head, 1, state), or A_bar by token."""
    outputs, states = [], []
    for t in range(x[0].shape[1]):
        factor = _at(scale, t)
        A_bar = (torch.exp(factor[0] * decay[0]),) if decay[0].ndim == 3 else _at(decay, t)
        wrote = [part * x[0][:, t, :, :, None] for part in _times(factor, _at(B, t))]
        h = tuple(old + new for old, new in zip(_times(A_bar, h), wrote, strict=True))
        outputs.append(_times(_at(C, t), h)[0].sum(-1) * len(h))
        states += [h] if keep else []
    return outputs, h, states


def _at(parts: Parts, t: int) -> Parts:
    """Token t of (batch, token, head, state) -> (batch, head, 1, state)."""
    return tuple(part[:, t, :, None] for part in parts)


def _times(a: Parts, b: Parts) -> Parts:
    """The product of two numbers, each real or complex."""
    if len(a) == 1 or len(b) == 1:
        return tuple(left * right for left in a for right in b)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@cache
def _kernel(keep: bool, key: Hashable) -> Callable:
    """`_chunk`, compiled for the sizes, dtype and gradients in `key`: each has a code object, since dynamo counts the
    compiles of one and gives up after eight."""
    chunk = FunctionType(_chunk.__code__.replace(), globals())
    compiled = torch.compile(chunk, fullgraph=True, dynamic=False, backend=_inductor)
    return partial(compiled, keep)


def _inductor(graph: Any, inputs: Any) -> Any:
    """torch.compile's own backend, its seconds shown."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def timed(*args: Any, **options: Any) -> Any:
        begin = perf_counter()
        compiled = compile_fx_inner(*args, **options)
        what = "gradient of the CPU scan" if options.get("is_backward") else "CPU scan"
        print(f"mamba_probe: compiled the {what} in {perf_counter() - begin:.1f} s", file=sys.stderr)
        return compiled

    return compile_fx(graph, inputs, inner_compile=timed)


def _inputs(block: Block) -> list[tuple[Tensor, float]]:
    """What varies with the token, in the order of `_chunk`, each with what a padded token holds: it changes nothing."""
    n_token, B, C = block.x.shape[1], block.per_head(block.B), block.per_head(block.C)
    inputs = [(block.x, 0.0), (block.scale.expand(-1, n_token, -1, -1), 0.0), (B, 0.0), (C, 0.0)]
    return inputs if _lean(block.a) else [*inputs, (torch.exp(block.exponent).expand(-1, n_token, -1, -1), 1.0)]


def _padded(tensor: Tensor, unrolled: int, fill: float) -> Tensor:
    """Whole kernels of (batch, token, head, ...)."""
    missing = -tensor.shape[1] % unrolled
    return F.pad(tensor, (0, 0, 0, 0, 0, missing), value=fill) if missing else tensor


def _parts(tensor: Tensor) -> Parts:
    return (tensor.real, tensor.imag) if tensor.is_complex() else (tensor,)


def _whole(parts: Parts) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.complex(*parts)


def _with_grad(parts: Parts, a: Arguments) -> Parts:
    """The first state asks for a gradient where later ones will: they are one compile."""
    parts = tuple(part.contiguous() for part in parts)
    if not needs_grad(a):
        return parts
    return tuple(part if part.requires_grad else part.detach().clone().requires_grad_() for part in parts)


def _lean(a: Arguments) -> bool:
    """Whether A_bar is exp(delta A) and the write delta B, which the kernel computes; else both are given to it."""
    varied = a.starts is not None or a.log_decay is not None or a.constant_delta
    return not varied and a.discretization == "euler" and not a.A.is_complex()


def _unrolled(a: Arguments) -> int:
    return GRADIENT_STEPS if needs_grad(a) else STEPS


def _key(*pieces: Parts) -> Hashable:
    return tuple((part.shape, part.dtype, part.requires_grad) for parts in pieces for part in parts)


def needs_states(a: Arguments) -> bool:
    """Whether states of single tokens are emitted, or what is computed from them."""
    return not {"h", "energy"}.isdisjoint(a.emit.variables)


def needs_grad(a: Arguments) -> bool:
    """Whether a gradient flows through this call."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in a.tensors())
