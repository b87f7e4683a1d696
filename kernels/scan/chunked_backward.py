"""The backward of `chunked`: gradients of everything a scan took, from those of everything it answered. A (head,).

The forward saves its inputs and nothing else: the states before all chunks of tokens, which are larger than x, are
found again. Five launches, of which each reads what those before it wrote:

| kernel | finds |
|---|---|
| `steps_kernel` | step sizes and decays, as forward |
| `boundary_kernel` | h before and e = dL/dh after every chunk, in one launch; dy, the gradient of y |
| `inputs_kernel` | dx, dz, and of every token those of the log of its decay and of the scale of its write |
| `projections_kernel` | dB and dC, summed over a block of a group's heads |
| `steps_backward_kernel` | d delta and d log_decay, with them dA and d delta_bias |

Deterministic: what is a sum over heads (dB, dC), tokens or batch items (dA, dD, d delta_bias) is written in parts, one
a program, and summed in one order.

Where x is bfloat16, so is what is multiplied: h, e, dy and the weights of a chunk. Gradients of 16-bit inputs are then
right to their type; those of A, delta_bias and log_decay, if they are float32, have the accuracy of such products too:
what rounding the inputs once more would change. For any other x, and for small heads, products are exact (`products`).

A gradient of the emitted h, as large as all else together, goes the plain way: A is repeated over the states, `fused`
runs once more for the states that its own backward begins from, and that backward does the rest, token after token.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import backward as by_token
from mamba_probe.kernels.scan import chunked, fused, naive
from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.backward import REFUSED, Upstream
from mamba_probe.kernels.scan.chunked import _strides
from mamba_probe.kernels.scan.chunked_backward_kernel import (
    boundary_kernel,
    inputs_kernel,
    projections_kernel,
    steps_backward_kernel,
)
from mamba_probe.kernels.scan.launcher import blocks, padded, slots, start

__all__ = ["Tile", "backward", "choose_tile"]


FEW = 2048
"""Channels x states of a head whose products are exact also for bfloat16: what these err would not average out."""

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on an H200."""


class Tile(NamedTuple):
    """Tokens of a chunk; heads, states and stages of a program of `projections_kernel`, channels of one of
    `boundary_kernel`."""

    tokens: int
    heads: int
    states: int = 64
    channels: int = 32
    stages: int = 2

    @property
    def warps(self) -> int:
        """Of `boundary_kernel`."""
        return max(4, self.channels // 8)


def choose_tile(a: Arguments) -> Tile:
    """Chunks of 64 tokens, the least that fills a tensor core's tile, or of 16 where what `inputs_kernel` loads would
    not fit shared memory; fewer states where products are split."""
    n_group, n_state = a.B.shape[2:]
    if a.dtype == torch.float64:
        return Tile(16, a.heads_per_group, 16, 16)
    narrow = a.B.dtype == a.C.dtype == a.x.dtype == torch.bfloat16
    covered, channels = max(16, padded(n_state)), max(16, padded(a.x.shape[3]))
    held = (4 if narrow else 6) * (64 * covered + 64 * channels + covered * channels)
    tokens = 64 if held <= SHARED else 16
    states = min(128 if narrow else 64, covered)
    programs = len(a.x) * n_group * blocks(a.n_token, tokens) * blocks(n_state, states)
    wide = narrow and len(a.x) * a.x.shape[2] >= chunked.PROGRAMS
    heads = _choose_heads(programs, a.heads_per_group)
    return Tile(tokens, heads, states, 64 if wide else 32, stages=2 if narrow else 1)


@cache
def _choose_heads(programs: int, heads: int) -> int:
    """The fewest rounds of what runs at once; to begin and to end a program takes the time of two heads."""
    return min(range(1, heads + 1), key=lambda n: blocks(programs * blocks(heads, n), chunked.PROGRAMS) * (n + 2))


class _Work(NamedTuple):
    """A call, how it is cut, and what its kernels share."""

    arguments: Arguments
    given: Upstream
    tile: Tile
    chunks: int
    steps: Tensor
    y: Tensor | None
    """The gradient of y, of all tokens and heads."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """head, head_channel, group, state."""
        (_, _, n_head, head_channel), (_, _, n_group, n_state) = self.arguments.x.shape, self.arguments.B.shape
        return n_head, head_channel, n_group, n_state

    @property
    def covers(self) -> tuple[int, int]:
        """Channels and states, at least as many as a tensor core takes."""
        _, head_channel, _, n_state = self.sizes
        return max(16, padded(head_channel)), max(16, padded(n_state))

    @property
    def precision(self) -> tuple[bool, bool]:
        """Whether products are of 16-bit terms, and whether of as many as they need to be exact."""
        a, (channels, states) = self.arguments, self.covers
        is_exact = a.x.dtype != torch.bfloat16 or channels * states <= FEW
        return chunked.COMPILED and a.dtype == torch.float32, is_exact

    @property
    def kept(self) -> torch.dtype:
        """That of h, e and dy between the kernels."""
        return torch.bfloat16 if self.precision == (True, False) else self.arguments.dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor to be filled, in the compute dtype where no other is named."""
        return self.arguments.x.new_empty(shape, dtype=dtype or self.arguments.dtype)


def backward(a: Arguments, states: Tensor | None, given: Upstream, tile: Tile | None = None) -> dict[str, Tensor]:
    """Gradients by the name of the argument, for each that was given; of its dtype, D (head, head_channel).

    states: None, since the forward saves none; it is there for the signature that all backwards have.

    Raises ValueError for saved states, for gradients of an emitted energy, mass or mass_distance, and where a head has
    more channels and states than the card can hold.
    """
    for name in REFUSED:
        if getattr(given, name) is not None:
            raise ValueError(f'backend "triton" has no gradient of the emitted `{name}`: use backend="cpu"')
    if states is not None:
        raise ValueError(f"`states` must be None where A is (head,): none is saved; got shape {tuple(states.shape)}")
    if given.h is not None:
        return _by_token(a, given)
    try:
        return _by_chunk(a, given, tile or choose_tile(a))
    except OutOfResources as error:
        sizes = f"{a.x.shape[3]} channels and {a.B.shape[3]} states a head"
        raise ValueError(f'backend "triton" has no gradients of {sizes}: use backend="cpu"; {error}') from error


def _by_chunk(a: Arguments, given: Upstream, tile: Tile) -> dict[str, Tensor]:
    """`backward` by the kernels of `chunked_backward_kernel`."""
    y = None if given.y is None else _spread(given.y, a, a.dtype)
    work = _Work(a, given, tile, blocks(a.n_token, tile.tokens), _find_steps(a, tile), y)
    h, e, dy, d_initial = _boundaries(work)
    found, d_steps = _of_inputs(work, h, e, dy)
    d_BC, both = _of_projections(work, h, e, dy)
    more, d_B = _more(a, given)
    found |= _of_steps(work, d_steps, both, more) | {"initial_state": d_initial}
    if d_B is not None:
        d_BC[0] += d_B
    for name, value in zip("BC", d_BC, strict=True):
        found[name] = (value.sum((0, 1)) if name in a.constant else value).to(getattr(a, name).dtype)
    return {name: value for name, value in found.items() if value is not None}


def _find_steps(a: Arguments, tile: Tile) -> Tensor:
    """What `steps_kernel` finds, for whole chunks."""
    whole = chunked.Tile(tile.tokens, tile.channels, 1)
    work = chunked._Work(a, {}, (None, None), whole, 0, blocks(a.n_token, tile.tokens), tile.tokens)
    return chunked._find_steps(work, None)[0]


def _boundaries(work: _Work) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """h before and e after every chunk, (batch, head, chunk, state, head_channel), dy, and d initial_state."""
    a, given, tile, n_chunk, steps, y = work
    n_batch, n_token, n_head, head_channel = a.x.shape
    channels = min(tile.channels, work.covers[0])
    h, e = (work.empty(n_batch, n_head, n_chunk, a.B.shape[3], head_channel, dtype=work.kept) for _ in range(2))
    fresh = None
    if a.z is not None or y is not None or given.out is None:
        fresh = work.empty(*a.x.shape, dtype=work.kept)
    dy: Any = given.out if fresh is None else fresh
    d_initial = None if a.given_state is None else work.empty(*a.state_shape)
    last = None if given.last_state is None else given.last_state.to(a.dtype).contiguous()
    start(
        boundary_kernel, (2, n_head * blocks(head_channel, channels), n_batch),
        a.x, a.B, a.C, a.z, steps, a.given_state, given.out, last, y, h, e, fresh, d_initial,
        *map(_strides, (a.x, a.B, a.C, a.z, given.out)), n_token, n_chunk,
        *work.sizes, tile.tokens, channels, work.covers[1], *work.precision,
        num_warps=tile.warps, num_stages=3 if work.kept == torch.bfloat16 else 2,
    )  # fmt: skip
    return h, e, dy, d_initial


def _of_inputs(work: _Work, h: Tensor, e: Tensor, dy: Tensor) -> tuple[dict[str, Tensor | None], Tensor]:
    """Gradients of x, z and D; and d_steps (batch x head, 2, token), those of the log of the decay and of the scale."""
    a, given, tile, n_chunk, steps, y = work
    n_batch, n_token, n_head, head_channel = a.x.shape
    d_x = work.empty(*a.x.shape, dtype=a.x.dtype)
    d_z = None if a.z is None else work.empty(*a.z.shape, dtype=a.z.dtype)
    d_D = None if a.D is None else work.empty(n_batch, n_chunk, n_head, head_channel)
    d_steps = work.empty(n_batch * n_head, 2, n_chunk * tile.tokens)
    start(
        inputs_kernel, (n_head, n_chunk, n_batch),
        a.x, a.B, a.C, a.D, a.z, steps, h, e, dy, given.out, y, d_x, d_z, d_D, d_steps,
        *map(_strides, (a.x, a.B, a.C)), (0, 0) if a.D is None else a.D.stride(),
        *map(_strides, (a.z, given.out, dy)), n_token, n_chunk,
        *work.sizes, tile.tokens, *work.covers, *work.precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return {"x": d_x, "z": d_z, "D": None if d_D is None else d_D.sum((0, 1))}, d_steps


def _of_projections(work: _Work, h: Tensor, e: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of B and C, (2, batch, token, group, state), and parts of <e, h>, (batch x head, chunk, part)."""
    a, _, tile, n_chunk, steps, _ = work
    n_batch, n_token, n_head, _ = a.x.shape
    n_group, n_state = a.B.shape[2:]
    channels, states = work.covers[0], min(tile.states, work.covers[1])
    n_block = blocks(a.heads_per_group, tile.heads)
    d_BC = work.empty(2, n_block, n_batch, n_token, n_group, n_state)
    both = work.empty(n_batch * n_head, n_chunk, blocks(n_state, states))
    start(
        projections_kernel, (n_block * blocks(n_state, states), n_chunk, n_batch * n_group),
        a.x, a.B, a.C, steps, h, e, dy, d_BC[0], d_BC[1], both,
        *map(_strides, (a.x, a.B, a.C, dy)), n_token, n_chunk,
        *work.sizes, tile.heads, tile.tokens, channels, states, *work.precision,
        num_warps=4, num_stages=tile.stages,
    )  # fmt: skip
    return d_BC.sum(1) if n_block > 1 else d_BC[:, 0], both


class _More(NamedTuple):
    """Gradients of delta, of the log of the decay and of the scale of the write that come from what is emitted."""

    delta: Tensor | None = None
    log: Tensor | None = None
    write: Tensor | None = None


def _of_steps(work: _Work, d_steps: Tensor, both: Tensor, more: _More) -> dict[str, Tensor | None]:
    """Gradients of delta, A, delta_bias and log_decay."""
    a, n_head = work.arguments, work.sizes[0]
    n_block, heads = blocks(a.n_token, 64), min(16, padded(n_head))
    fade = work.steps[2 * d_steps.numel() :]
    d_delta = work.empty(*a.delta.shape, dtype=a.delta.dtype)
    d_log = None if a.log_decay is None else work.empty(*a.delta.shape, dtype=a.log_decay.dtype)
    d_A = work.empty(len(a.x), n_block, n_head)
    d_bias = None if a.delta_bias is None else torch.empty_like(d_A)
    start(
        steps_backward_kernel, (n_block, blocks(n_head, heads), len(a.x)),
        a.delta, a.A, a.delta_bias, fade, d_steps, both, *more, d_delta, d_A, d_bias, d_log,
        _strides(a.delta), a.n_token, d_steps.shape[2],
        n_head, both.shape[2], work.tile.tokens, 64, heads,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh", num_warps=4,
    )  # fmt: skip
    d_bias = None if d_bias is None else d_bias.sum((0, 1))
    return {"delta": d_delta, "A": d_A.sum((0, 1)), "delta_bias": d_bias, "log_decay": d_log}


def _more(a: Arguments, given: Upstream) -> tuple[_More, Tensor | None]:
    """And that of B, in the compute dtype. Plain torch, since none of it has channels."""
    delta = None if given.delta is None else _spread(given.delta, a, a.dtype)
    if given.delta_cumsum is not None:
        summed = _spread(given.delta_cumsum, a, torch.float64).flip(1).cumsum(1).flip(1).to(a.dtype)
        delta = summed if delta is None else delta + summed
    log = write = d_B = None
    step = naive.step_size(a.delta.to(a.dtype), a) if given.A_bar is not None or given.B_bar is not None else a.delta
    if given.A_bar is not None:
        log_decay = None if a.log_decay is None else a.log_decay.to(a.dtype)
        A_bar = torch.exp(naive.decay_exponent(step, a.A, log_decay, a.starts))[..., 0]
        log = (_spread(given.A_bar, a, a.dtype) * A_bar).contiguous()
    if given.B_bar is not None:
        grouped = _spread(given.B_bar, a, a.dtype).unflatten(2, (a.B.shape[2], -1))
        scale = naive.write_scale(step, a.A, a.discretization)[..., 0].unflatten(2, (a.B.shape[2], -1))
        write = torch.einsum("btghn,btgn->btgh", grouped, a.B.to(a.dtype)).flatten(2).contiguous()
        d_B = torch.einsum("btghn,btgh->btgn", grouped, scale)
    return _More(delta, log, write), d_B


def _spread(value: Tensor, a: Arguments, dtype: torch.dtype) -> Tensor:
    """Of the tokens and heads that are emitted -> of all, (batch, token, head, ...), 0 where none is."""
    value = value.to(dtype)
    for axis, indices in ((1, a.emit.tokens), (2, a.emit.channels)):
        slot = slots(indices, a.x.shape[axis], value.device)
        if slot is not None:
            is_kept = (slot >= 0).view(-1, *[1] * (value.ndim - 1 - axis))
            value = value.index_select(axis, slot.clamp(min=0)).where(is_kept, 0)
    return value.contiguous()


def _by_token(a: Arguments, given: Upstream) -> dict[str, Tensor]:
    """The gradients where one of h is given: of a scan in which each state has its own A."""
    n_state = a.B.shape[3]
    log_decay, A_bar = a.log_decay, given.A_bar
    if log_decay is not None:
        log_decay = log_decay.to(a.dtype).expand(*a.x.shape[:3], n_state)
    if A_bar is not None:  # that of one state, so that their sum is right
        A_bar = torch.nn.functional.pad(A_bar[..., None], (0, n_state - 1))
    wide = replace(a, A=a.A.expand(-1, n_state).contiguous(), scalar_A=False, log_decay=log_decay)
    found = by_token.backward(wide, _saved_states(wide), replace(given, A_bar=A_bar))
    found["A"] = found["A"].sum(1)
    if a.log_decay is not None:
        found["log_decay"] = found["log_decay"].sum(3).to(a.log_decay.dtype)
    return found


def _saved_states(a: Arguments) -> Tensor | None:
    """Those before every SEGMENT-th token, as `fused` leaves them."""
    n_state = blocks(a.n_token, fused.SEGMENT) - 1
    if not n_state:
        return None
    states = a.x.new_empty((len(a.x), n_state, *a.state_shape[1:]), dtype=a.dtype)
    out, last = torch.empty_like(a.x), torch.empty_like(states[:, 0])
    fused.launch(replace(a, emit=Emit()), out, last, {}, None, None, states=states)
    return states
