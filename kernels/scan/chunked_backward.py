"""The backward of `chunked`: gradients of everything a scan took, from those of everything it answered. A (head,).

The forward saves its inputs and nothing else: the states before all chunks of tokens, which are larger than x, are
found again. Six launches, of which each reads what those before it wrote:

| kernel | finds |
|---|---|
| `steps_kernel` | step sizes and decays, as forward |
| `boundary_kernel` | h before and e = dL/dh after every chunk, in one launch; dy, the gradient of y |
| `inputs_kernel` | dx, dz, and of every token those of the log of its decay and of the scale of its write |
| `projections_kernel` | dB and dC, summed over a block of a group's heads |
| `steps_backward_kernel` | d delta and d log_decay, with them dA and d delta_bias |
| `sums_kernel` | dA, dB, dC, dD and d delta_bias, from what the others left in parts |

Deterministic: what is a sum over heads (dB, dC), tokens or batch items (dA, dD, d delta_bias) is written in parts, one
a program, and summed in one order (`sums`).

Where x is bfloat16, so is what is multiplied: h, e, dy and the weights of a chunk. Gradients of 16-bit inputs are then
right to their type; those of A, delta_bias and log_decay, if they are float32, have the accuracy of such products too:
what rounding the inputs once more would change. For any other x, and for small heads, products are exact (`products`).

A gradient of the emitted h, as large as all else together, goes the plain way: A is repeated over the states, `fused`
runs once more for the states that its own backward begins from, and that backward does the rest, token after token.
"""

import math
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
from mamba_probe.kernels.scan.launcher import Plan, Plans, blocks, padded, planned, slots, start
from mamba_probe.kernels.scan.sums import ANSWERS, add_sums, gradients

__all__ = ["Tile", "backward", "choose_tile"]


FEW = 2048
"""Channels x states of a head whose products are exact also for bfloat16: what these err would not average out."""

STEPS = 64
"""Tokens of a program of `steps_backward_kernel`."""

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
    plan: Plan
    above: dict[str, Tensor | None]
    tile: Tile
    chunks: int
    steps: str
    dy: str
    """The gradient of y; that of the output where these are the same."""
    dy_strides: tuple[Any, ...]
    parts: dict[str, str | None]
    """Of gradients that are sums, by the name of what they are of."""

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

    def make(self, name: str, given: Tensor | None, *shape: int) -> str | None:
        """A gradient of what was given, if anything was."""
        return None if given is None else self.plan.make(ANSWERS[name], shape, given.dtype)

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> str:
        """What later launches read, in the compute dtype where no other is named."""
        return self.plan.empty(name, shape, dtype or self.arguments.dtype)

    def part(self, name: str, given: Tensor | None, *shape: int) -> str | None:
        """Parts of such a gradient."""
        self.parts[name] = None if given is None else self.empty(f"parts_{name}", *shape)
        return self.parts[name]


def backward(
    a: Arguments, states: Tensor | None, given: Upstream, tile: Tile | None = None, plans: Plans | None = None
) -> dict[str, Tensor]:
    """Gradients by the name of the argument, for each that was given; of its dtype, and of its shape but for a D
    (head,) that several channels share: that is (head, head_channel).

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
        return _by_token(a, given, plans)
    try:
        return _by_chunk(a, given, tile, plans)
    except OutOfResources as error:
        sizes = f"{a.x.shape[3]} channels and {a.B.shape[3]} states a head"
        raise ValueError(f'backend "triton" has no gradients of {sizes}: use backend="cpu"; {error}') from error


def _by_chunk(a: Arguments, given: Upstream, tile: Tile | None, plans: Plans | None) -> dict[str, Tensor]:
    """`backward` by the kernels of `chunked_backward_kernel`."""
    more = _more(a, given)
    above = {
        "d_out": given.out,
        "d_last": None if given.last_state is None else given.last_state.to(a.dtype).contiguous(),
        "d_y": None if given.y is None else _spread(given.y, a, a.dtype),
        "more_delta": more.delta, "more_log": more.log, "more_write": more.write,
        "more_B": more.B,
    }  # fmt: skip
    kinds = tuple([None if value is None else value.dtype for value in above.values()])
    key = choose_tile, tile, kinds, None if given.out is None else given.out.stride()
    plan = planned(plans, key, lambda: _plan(a, above, tile or choose_tile(a)))
    return gradients(a, start(plan, chunked.inputs(a) | {"token_slot": None, "head_slot": None} | above))


def _plan(a: Arguments, above: dict[str, Tensor | None], tile: Tile) -> Plan:
    """The launches, which read of the gradients what `above` names."""
    plan, n_chunk = Plan(a.x.device), blocks(a.n_token, tile.tokens)
    whole = chunked.Tile(tile.tokens, tile.channels, 1)
    steps, _ = chunked.add_steps(chunked._Work(a, plan, {}, whole, 0, n_chunk, tile.tokens), None)
    is_found = a.z is not None or above["d_y"] is not None or above["d_out"] is None
    strides = _strides(torch.empty(a.x.shape, device="meta") if is_found else above["d_out"])
    work = _Work(a, plan, above, tile, n_chunk, steps, "dy" if is_found else "d_out", strides, {})
    for add in (_add_boundaries, _add_inputs, _add_projections, _add_steps):
        add(work)
    counts = blocks(a.heads_per_group, tile.heads), len(a.x) * blocks(a.n_token, STEPS), len(a.x) * n_chunk
    add_sums(plan, a, work.parts, counts, None if above["more_B"] is None else "more_B")
    return plan


def _add_boundaries(work: _Work) -> None:
    """h before and e after every chunk, (batch, head, chunk, state, head_channel), dy, and d initial_state."""
    a, plan, above, tile, n_chunk, steps, dy, *_ = work
    n_batch, n_token, n_head, head_channel = a.x.shape
    channels = min(tile.channels, work.covers[0])
    h, e = (work.empty(name, n_batch, n_head, n_chunk, a.B.shape[3], head_channel, dtype=work.kept) for name in "he")
    fresh = None if dy == "d_out" else work.empty(dy, *a.x.shape, dtype=work.kept)
    d_initial = work.make("initial_state", a.given_state, *a.state_shape)
    plan.add(
        boundary_kernel, (2, n_head * blocks(head_channel, channels), n_batch),
        "x", "B", "C", "z", steps, "initial", "d_out", "d_last", "d_y", h, e, fresh, d_initial,
        *map(_strides, (a.x, a.B, a.C, a.z, above["d_out"])), n_token, n_chunk,
        *work.sizes, tile.tokens, channels, work.covers[1], *work.precision,
        num_warps=tile.warps, num_stages=3 if work.kept == torch.bfloat16 else 2,
    )  # fmt: skip


def _add_inputs(work: _Work) -> None:
    """Gradients of x, z and D; and d_steps (batch x head, 2, token), those of the log of the decay and of the scale."""
    a, plan, above, tile, n_chunk, steps, dy, dy_strides, _ = work
    n_batch, n_token, n_head, head_channel = a.x.shape
    d_x, d_z = work.make("x", a.x, *a.x.shape), work.make("z", a.z, *a.x.shape)
    d_D = work.part("D", a.D, n_batch, n_chunk, n_head, head_channel)
    d_steps = work.empty("d_steps", n_batch * n_head, 2, n_chunk * tile.tokens)
    plan.add(
        inputs_kernel, (n_head, n_chunk, n_batch),
        "x", "B", "C", "D", "z", steps, "h", "e", dy, "d_out", "d_y", d_x, d_z, d_D, d_steps,
        *map(_strides, (a.x, a.B, a.C)), (0, 0) if a.D is None else a.D.stride(),
        *map(_strides, (a.z, above["d_out"])), dy_strides, n_token, n_chunk,
        *work.sizes, tile.tokens, *work.covers, *work.precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def _add_projections(work: _Work) -> None:
    """Gradients of B and C, (2, block, batch, token, group, state), and parts of <e, h>, (batch x head, chunk, ...)."""
    a, plan, _, tile, n_chunk, steps, dy, dy_strides, parts = work
    n_batch, n_token, n_head, _ = a.x.shape
    n_group, n_state = a.B.shape[2:]
    channels, states = work.covers[0], min(tile.states, work.covers[1])
    n_block = blocks(a.heads_per_group, tile.heads)
    shape = n_block, n_batch, n_token, n_group, n_state
    d_BC = work.part("B", a.B, 2, *shape)
    parts["C"] = plan.part("parts_C", "parts_B", math.prod(shape))
    both = work.empty("both", n_batch * n_head, n_chunk, blocks(n_state, states))
    plan.add(
        projections_kernel, (n_block * blocks(n_state, states), n_chunk, n_batch * n_group),
        "x", "B", "C", steps, "h", "e", dy, d_BC, parts["C"], both,
        *map(_strides, (a.x, a.B, a.C)), dy_strides, n_token, n_chunk,
        *work.sizes, tile.heads, tile.tokens, channels, states, *work.precision,
        num_warps=4, num_stages=tile.stages,
    )  # fmt: skip


def _add_steps(work: _Work) -> None:
    """Gradients of delta, A, delta_bias and log_decay."""
    a, plan, n_head = work.arguments, work.plan, work.sizes[0]
    n_block, heads, n_padded = blocks(a.n_token, STEPS), min(16, padded(n_head)), work.chunks * work.tile.tokens
    fade = plan.part("fade", work.steps, 4 * len(a.x) * n_head * n_padded)
    d_delta, d_log = (work.make(name, vars(a)[name], *a.delta.shape) for name in ("delta", "log_decay"))
    d_A, d_bias = (work.part(name, vars(a)[name], len(a.x), n_block, n_head) for name in ("A", "delta_bias"))
    plan.add(
        steps_backward_kernel, (n_block, blocks(n_head, heads), len(a.x)),
        "delta", "A", "bias", fade, "d_steps", "both", "more_delta", "more_log", "more_write", d_delta, d_A, d_bias,
        d_log, _strides(a.delta), a.n_token, n_padded,
        n_head, plan.scratch["both"][1][2], work.tile.tokens, STEPS, heads,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh", num_warps=4,
    )  # fmt: skip


class _More(NamedTuple):
    """Gradients that come from what is emitted: of delta, the log of the decay, the scale of the write and B."""

    delta: Tensor | None = None
    log: Tensor | None = None
    write: Tensor | None = None
    B: Tensor | None = None


def _more(a: Arguments, given: Upstream) -> _More:
    """In the compute dtype. Plain torch, since none of it has channels."""
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
        d_B = torch.einsum("btghn,btgh->btgn", grouped, scale).contiguous()
    return _More(delta, log, write, d_B)


def _spread(value: Tensor, a: Arguments, dtype: torch.dtype) -> Tensor:
    """Of the tokens and heads that are emitted -> of all, (batch, token, head, ...), 0 where none is."""
    value = value.to(dtype)
    for axis, indices in ((1, a.emit.tokens), (2, a.emit.channels)):
        slot = slots(indices, a.x.shape[axis], value.device)
        if slot is not None:
            is_kept = (slot >= 0).view(-1, *[1] * (value.ndim - 1 - axis))
            value = value.index_select(axis, slot.clamp(min=0)).where(is_kept, 0)
    return value.contiguous()


def _by_token(a: Arguments, given: Upstream, plans: Plans | None) -> dict[str, Tensor]:
    """The gradients where one of h is given: of a scan in which each state has its own A."""
    n_state = a.B.shape[3]
    log_decay, A_bar = a.log_decay, given.A_bar
    if log_decay is not None:
        log_decay = log_decay.to(a.dtype).expand(*a.x.shape[:3], n_state)
    if A_bar is not None:  # that of one state, so that their sum is right
        A_bar = torch.nn.functional.pad(A_bar[..., None], (0, n_state - 1))
    wide = replace(a, A=a.A.expand(-1, n_state).contiguous(), scalar_A=False, log_decay=log_decay)
    found = by_token.backward(wide, _saved_states(wide, plans), given._replace(A_bar=A_bar), plans=plans)
    found["A"] = found["A"].sum(1)
    if a.log_decay is not None:
        found["log_decay"] = found["log_decay"].sum(3).to(a.log_decay.dtype)
    return found


def _saved_states(a: Arguments, plans: Plans | None) -> Tensor | None:
    """Those before every SEGMENT-th token, as `fused` leaves them."""
    n_state = blocks(a.n_token, fused.SEGMENT) - 1
    if not n_state:
        return None
    states = a.x.new_empty((len(a.x), n_state, *a.state_shape[1:]), dtype=a.dtype)
    out, last = torch.empty_like(a.x), torch.empty_like(states[:, 0])
    fused.launch(replace(a, emit=Emit()), out, last, {}, None, None, states=states, plans=plans)
    return states
