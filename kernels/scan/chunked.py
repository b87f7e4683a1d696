"""The selective scan with one real decay a head: A (head,). Mamba-2, as matrix products within chunks of tokens.

A program keeps the state (state, head_channel) of one head, or of BLOCK_P of its channels, in registers and walks over
the chunks of one span of tokens. With log a the log of the decay, w the scale of the write and h the state before the
chunk, a chunk is three products (Dao & Gu 2024, arXiv 2405.21060, section 6):

    y_t = exp(sum_{r <= t} log a_r) C_t h  +  sum_{s <= t} (C_t B_s) exp(sum_{s < r <= t} log a_r) w_s x_s
    h   = exp(sum_r log a_r) h  +  sum_s B_s exp(sum_{r > s} log a_r) w_s x_s

`steps` finds the sums and w ahead, for all heads at once. Sums of log a over a segment are differences of cumulative
sums in float64 (carried into the [token, token] matrix as a float32 and a factor for the rest), each log a held above
-2048: what is lost beside a reset is 2048 x 128 x 2^-48, not 2048 x 128 x 2^-24.

Spans share one launch, the first span of all sequences before the second of any (`handover`). Where programs are more
than the card runs at once, a span begins from what the span before it left, which has ended by then: spans are there
for even rounds. Where they are fewer, every span but the last goes over its tokens twice: first from nothing (LOCAL),
which it hands over, then from what all spans before it left so.

What is emitted of every token, h above all, is left to the kernels of `states`; h begins there from the states that
this one leaves before every BOUNDARY-th token.

Where y is bfloat16 and is not emitted, the weights of x and the state that C reads are rounded to one bfloat16; the
state itself never is (`products`).
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.elementwise import silu
from mamba_probe.kernels.scan.handover import hand_over, numbered, received
from mamba_probe.kernels.scan.launcher import Plan, Plans, blocks, fusible, padded, planned, start
from mamba_probe.kernels.scan.products import dot, narrowed, terms
from mamba_probe.kernels.scan.states import STAGES, states_kernel, tokens_kernel
from mamba_probe.kernels.scan.steps import steps_kernel

__all__ = ["Tile", "choose_tile", "launch", "scan_kernel"]


@triton.jit
def _segment_decays(p_high, o_t):
    """exp2 of high[t] - high[s], 0 for s > t."""
    b_log2 = tl.load(p_high + o_t)[:, None] - tl.load(p_high + o_t)[None, :]
    return tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_log2, -float("inf")))


@triton.jit
def _outputs(b_x, b_B, b_C, b_h, p_high, n_padded, o_t, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """y of a chunk, without D x."""
    dtype: tl.constexpr = b_h.dtype
    B_terms = terms(b_B, dtype, SPLIT)
    C_terms = terms(b_C, dtype, SPLIT)
    x_terms = terms(b_x, dtype, SPLIT)
    b_weight = tl.zeros((b_x.shape[0], b_x.shape[0]), dtype)
    b_weight = dot(C_terms, B_terms, b_weight, len(C_terms), len(B_terms), TRANS_B=True)
    b_weight *= _segment_decays(p_high, o_t) * tl.load(p_high + 2 * n_padded + o_t)[None, :]
    weights = narrowed(b_weight, dtype, SPLIT, EXACT)
    h_terms = narrowed(b_h, dtype, SPLIT, EXACT)
    b_zero = tl.zeros(b_x.shape, dtype)
    b_y = dot(C_terms, h_terms, b_zero, len(C_terms), len(h_terms))
    b_y *= tl.exp2(tl.load(p_high + o_t))[:, None]
    if EXACT:
        b_y += dot(weights, x_terms, b_zero, len(weights), len(x_terms))
    else:
        b_y = dot(weights, x_terms, b_y, len(weights), len(x_terms))
    return b_y * tl.load(p_high + n_padded + o_t)[:, None]


@triton.jit
def _advanced(b_h, b_x, b_B, p_end, b_fade, SPLIT: tl.constexpr):
    """The state after a chunk; rounded in the last line, since the tensor cores' own sums are cut off."""
    dtype: tl.constexpr = b_h.dtype
    B_terms = terms(b_B, dtype, SPLIT)
    writes = terms(tl.load(p_end)[:, None] * b_x.to(dtype), dtype, SPLIT)
    b_new = dot(B_terms, writes, tl.zeros(b_h.shape, dtype), len(B_terms), len(writes), TRANS_A=True)
    return b_fade * b_h + b_new


@triton.jit
def _tile(p, t, t_stride, stride, o_t, o, mask):
    """(token, channel or state) of tokens t + o_t, 0 outside `mask`."""
    o_tile = o_t[:, None] * t_stride + o[None, :] * stride
    return tl.load(p + tl.cast(t, tl.int64) * t_stride + o_tile, mask=mask, other=0.0)


@triton.jit
def _local(b_h, p_x, p_B, p_end, p_fade, x_strides, B_strides, start, stop, o_t, o_n, o_p, m_n, m_p,
           BLOCK_T: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The state b_h after the tokens start .. stop - 1, and the decay over them."""
    b_whole = tl.full((), 1.0, b_h.dtype)
    for t in range(start, stop, BLOCK_T):
        m_t = t + o_t < stop
        b_fade = tl.load(p_fade + t // BLOCK_T)
        b_x = _tile(p_x, t, x_strides[1], x_strides[3], o_t, o_p, m_t[:, None] & m_p[None, :])
        b_B = _tile(p_B, t, B_strides[1], B_strides[3], o_t, o_n, m_t[:, None] & m_n[None, :])
        b_h = _advanced(b_h, b_x, b_B, p_end + t + o_t, b_fade, SPLIT)
        b_whole *= b_fade
    return b_h, b_whole


@triton.jit
def _emit(e_y, b_y, p_token_slot, p_head_slot, n_token, n_kept_token, n_kept_head, i_batch, i_head, o_t, o_p, m_p,
          P: tl.constexpr):  # fmt: skip
    """y of the tokens o_t where they and the head are asked for."""
    m_t = o_t < n_token
    t_slot = o_t if p_token_slot is None else tl.load(p_token_slot + o_t, mask=m_t, other=-1)
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    o_kept = ((i_batch * n_kept_token + t_slot) * n_kept_head + i_slot) * P
    m_kept = m_t & (tl.minimum(t_slot, i_slot) >= 0)
    tl.store(e_y + o_kept[:, None] + o_p[None, :], b_y, mask=m_kept[:, None] & m_p[None, :])


@triton.jit
def scan_kernel(
    p_x, p_B, p_C, p_D, p_z, p_steps, p_initial, p_handed, p_flag, p_out, p_last, p_boundary,
    p_token_slot, p_head_slot, e_y, x_strides, B_strides, C_strides, D_strides, z_strides,
    n_token, n_sequence, n_span, span, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDARY: tl.constexpr,
    LOCAL: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: spans, in each all sequences: batch x heads x blocks of BLOCK_P channels."""
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_steps.dtype.element_ty
    i_program = numbered(p_flag)
    i_span = i_program // n_sequence
    i_sequence = i_program % n_sequence
    i_row = (i_sequence // N_P).to(tl.int64)
    i_batch = i_row // H
    i_head = i_row % H
    i_group = i_head // (H // G)
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_p = i_sequence % N_P * BLOCK_P + tl.arange(0, BLOCK_P)
    m_n = o_n < N if N < BLOCK_N else tl.full((BLOCK_N,), True, tl.int1)
    m_p = o_p < P if P % BLOCK_P else tl.full((BLOCK_P,), True, tl.int1)
    start = i_span * span
    stop = tl.minimum(start + span, n_token)
    n_padded = n_span * span
    p_high = p_steps + i_row * (4 * n_padded)
    p_end = p_high + 3 * n_padded
    p_fade = p_steps + tl.cast(n_sequence // N_P, tl.int64) * (4 * n_padded) + i_row * (n_padded // BLOCK_T)
    p_x += i_batch * x_strides[0] + i_head * x_strides[2]
    p_B += i_batch * B_strides[0] + i_group * B_strides[2]
    p_C += i_batch * C_strides[0] + i_group * C_strides[2]
    p_out += (i_batch * n_token * H + i_head) * P
    if p_z is not None:
        p_z += i_batch * z_strides[0] + i_head * z_strides[2]
    if p_D is not None:
        b_D = tl.load(p_D + i_head * D_strides[0] + o_p * D_strides[1], mask=m_p, other=0.0)
    o_state = o_p.to(tl.int64)[None, :] * N + o_n[:, None]
    m_state = m_n[:, None] & m_p[None, :]
    b_h = tl.zeros((BLOCK_N, BLOCK_P), dtype)
    if LOCAL:
        if i_span < n_span - 1:
            b_local, b_whole = _local(b_h, p_x, p_B, p_end, p_fade, x_strides, B_strides, start, stop, o_t, o_n, o_p,
                                      m_n, m_p, BLOCK_T, SPLIT)  # fmt: skip
            hand_over(p_handed, p_flag, i_program, n_sequence, b_local, b_whole)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_row * (P * N) + o_state, mask=m_state, other=0.0)
    if p_handed is not None:
        b_h = received(p_handed, p_flag, i_program, n_sequence, b_h, LOCAL)

    for t in range(start, stop, BLOCK_T):
        m_t = t + o_t < stop
        m_x = m_t[:, None] & m_p[None, :]
        m_B = m_t[:, None] & m_n[None, :]
        b_fade = tl.load(p_fade + t // BLOCK_T)
        b_x = _tile(p_x, t, x_strides[1], x_strides[3], o_t, o_p, m_x)
        b_B = _tile(p_B, t, B_strides[1], B_strides[3], o_t, o_n, m_B)
        b_C = _tile(p_C, t, C_strides[1], C_strides[3], o_t, o_n, m_B)
        if p_z is not None:  # long before it is used
            b_z = _tile(p_z, t, z_strides[1], z_strides[3], o_t, o_p, m_x)
        if p_boundary is not None:
            i_boundary = i_row * tl.cdiv(n_token, BOUNDARY) + t // BOUNDARY
            is_boundary = t % BOUNDARY == 0
            tl.store(p_boundary + i_boundary * (P * N) + o_state, b_h, mask=tl.where(is_boundary, m_state, False))
        b_y = _outputs(b_x, b_B, b_C, b_h, p_high + t, n_padded, o_t, SPLIT, EXACT)
        if p_D is not None:
            b_y += b_D[None, :] * b_x.to(dtype)
        if e_y is not None:
            _emit(e_y, b_y, p_token_slot, p_head_slot, n_token, n_kept_token, n_kept_head, i_batch, i_head,
                  t + o_t, o_p, m_p, P)  # fmt: skip
        if p_z is not None:
            b_y *= silu(b_z.to(dtype), SPLIT and not EXACT)
        o_out = o_t[:, None] * (H * P) + o_p[None, :]
        tl.store(p_out + tl.cast(t, tl.int64) * (H * P) + o_out, b_y.to(p_out.dtype.element_ty), mask=m_x)
        b_h = _advanced(b_h, b_x, b_B, p_end + t + o_t, b_fade, SPLIT)

    if i_span == n_span - 1:
        tl.store(p_last + i_row * (P * N) + o_state, b_h, mask=m_state)
    elif p_handed is not None and not LOCAL:
        hand_over(p_handed, p_flag, i_program, n_sequence, b_h, 0.0)


COMPILED = isinstance(scan_kernel, triton.JITFunction)
"""Interpreted, products are exact without splitting."""

PROGRAMS = 264
"""As many as an H200 runs at once, two on each of its multiprocessors."""

CHANNELS = 64
"""Of one program of `states_kernel`."""

BOUNDARY = 256
"""Tokens of one."""


class Tile(NamedTuple):
    """What one program does: tokens of a chunk, channels, spans of a sequence; and how it is compiled."""

    tokens: int
    channels: int
    spans: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None


def choose_tile(a: Arguments) -> Tile:
    """Chunks of 64 tokens, the least that fills a tensor core's tile, but short ones where products are split: those
    would not fit the registers."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    if a.dtype == torch.float64:
        return Tile(16, 16, 1)
    narrow = a.B.dtype == a.C.dtype == a.x.dtype == torch.bfloat16 and "y" not in a.emit.variables
    state = padded(a.B.shape[3])
    channels = min(max(16, padded(head_channel)), max(16, 8192 // state))
    spans = _choose_spans(n_batch * n_head * blocks(head_channel, channels), n_token)
    return Tile(64, channels, spans) if narrow else Tile(16, channels, spans, warps=8)


@cache
def _choose_spans(sequences: int, n_token: int) -> int:
    """Of 256 tokens or more. Few sequences: as many spans as run at once. More: those that take least time, in rounds
    of all programs that run at once; to begin one takes the time of 64 tokens. Many: one, rounds are even as it is."""
    most = max(1, n_token // 256)
    if sequences < PROGRAMS:
        return min(PROGRAMS // sequences, most)
    if sequences > 16 * PROGRAMS:
        return 1
    return min(range(1, min(16, most) + 1), key=lambda n: blocks(sequences * n, PROGRAMS) * (blocks(n_token, n) + 64))


class _Work(NamedTuple):
    """A call, its plan, and how it is cut: into sequences, and these into spans of whole chunks.

    `asked` names the tensors of what is emitted.
    """

    arguments: Arguments
    plan: Plan
    asked: dict[str, str]
    tile: Tile
    sequences: int
    spans: int
    span: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """head, head_channel, group, state."""
        (_, _, n_head, head_channel), (_, _, n_group, n_state) = self.arguments.x.shape, self.arguments.B.shape
        return n_head, head_channel, n_group, n_state

    @property
    def asks(self) -> set[str]:
        """What the kernels of `states` emit."""
        return {"h", "energy", "B_bar", "delta_cumsum"}.intersection(self.asked)


def launch(
    a: Arguments,
    out: Tensor,
    last: Tensor,
    emitted: dict[str, Tensor],
    token_slot: Tensor | None,
    head_slot: Tensor | None,
    tile: Tile | None = None,
    plans: Plans | None = None,
) -> None:
    """Fill `out`, `last` and what is `emitted`."""
    plan = planned(plans, (choose_tile, tile), lambda: _plan(a, emitted, tile or choose_tile(a)))
    more = {"out": out, "last": last, "token_slot": token_slot, "head_slot": head_slot}
    start(plan, inputs(a) | more | {f"e_{name}": value for name, value in emitted.items()})


def inputs(a: Arguments) -> dict[str, Tensor | None]:
    """By the names that the plans of A (head,) have for them."""
    return {
        "x": a.x, "delta": a.delta, "A": a.A, "B": a.B, "C": a.C, "D": a.D, "z": a.z, "bias": a.delta_bias,
        "starts": None if a.starts is None else a.starts.to(torch.uint8).contiguous(), "log": a.log_decay,
        "initial": a.given_state,
    }  # fmt: skip


def _plan(a: Arguments, emitted: Iterable[str], tile: Tile) -> Plan:
    """The launches."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    sequences = n_batch * n_head * blocks(head_channel, tile.channels)
    span = blocks(blocks(n_token, tile.tokens), tile.spans) * tile.tokens
    plan, asked = Plan(a.x.device), {name: f"e_{name}" for name in emitted}
    work = _Work(a, plan, asked, tile, sequences, blocks(n_token, span), span)
    block_n = max(16, padded(a.B.shape[3]))
    handed = flag = boundary = None
    n_handed = sequences * (work.spans - 1)
    if work.spans > 1:
        handed = plan.empty("handed", (n_handed * (tile.channels * block_n + 1),), a.dtype)
        flag = plan.empty("flag", (padded(n_handed + 1),), torch.int32)
    if "h" in asked or "energy" in asked:
        shape = n_batch, n_head, blocks(n_token, BOUNDARY), *a.state_shape[2:]
        boundary = plan.empty("boundary", shape, a.dtype)
    steps, tokens = add_steps(work, flag)
    plan.add(
        scan_kernel, (sequences * work.spans, 1, 1),
        "x", "B", "C", "D", "z", steps, "initial", handed, flag,
        "out", "last", boundary, "token_slot", "head_slot", asked.get("y"),
        *map(_strides, (a.x, a.B, a.C)), (0, 0) if a.D is None else a.D.stride(), _strides(a.z),
        n_token, sequences, work.spans, span, *a.kept, *work.sizes, tile.tokens, tile.channels, block_n, BOUNDARY,
        1 < work.spans <= PROGRAMS // sequences, COMPILED and a.dtype == torch.float32,
        a.x.dtype != torch.bfloat16 or "y" in asked,
        num_warps=tile.warps, num_stages=tile.stages, **({} if tile.registers is None else {"maxnreg": tile.registers}),
    )  # fmt: skip
    if tokens is not None:
        _add_tokens(work, tokens, boundary)
    return plan


def add_steps(work: _Work, flag: str | None) -> tuple[str, str | None]:
    """What `steps_kernel` finds, for a whole number of chunks; of every token only where that is needed."""
    a, plan, chunk, n_padded = work.arguments, work.plan, work.tile.tokens, work.spans * work.span
    n_batch, n_token, n_head, _ = a.x.shape
    rows, n_chunk, heads = n_batch * n_head, n_padded // chunk, min(16, padded(n_head))
    steps = plan.empty("steps", (rows * (4 * n_padded + n_chunk),), a.dtype)
    tokens = plan.empty("tokens", (rows, 3, n_padded), a.dtype) if work.asks else None
    plan.add(
        steps_kernel, (n_chunk, blocks(n_head, heads), n_batch),
        "delta", "A", "bias", "starts", "log", steps, tokens, flag, "token_slot", "head_slot",
        work.asked.get("delta"), work.asked.get("A_bar"), _strides(a.delta), _strides(a.log_decay),
        n_token, n_chunk, *a.kept, n_head, 1 if flag is None else plan.scratch[flag][1][0], chunk, heads,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh", num_warps=4,
    )  # fmt: skip
    return steps, tokens


def _add_tokens(work: _Work, tokens: str, boundary: str | None) -> None:
    """What is emitted of every token by the kernels of `states`."""
    a, plan, asked, (n_head, head_channel, n_group, n_state) = work.arguments, work.plan, work.asked, work.sizes
    lengths = a.n_token, plan.scratch[tokens][1][2], *a.kept
    block_n = padded(n_state)
    if boundary is not None:
        channels = min(CHANNELS, padded(head_channel))
        plan.add(
            states_kernel, (n_head * blocks(head_channel, channels), plan.scratch[boundary][1][2], len(a.x)),
            "x", "B", tokens, boundary, "token_slot", "head_slot", asked.get("h"), asked.get("energy"),
            _strides(a.x), _strides(a.B), *lengths, *work.sizes, channels, block_n, BOUNDARY, STAGES,
            num_warps=4, num_stages=1, enable_fp_fusion=fusible(n_state),
        )  # fmt: skip
    if "B_bar" in asked or "delta_cumsum" in asked:
        plan.add(
            tokens_kernel, (n_head, 1, len(a.x)),
            "B", tokens, "token_slot", "head_slot", asked.get("B_bar"), asked.get("delta_cumsum"), _strides(a.B),
            *lengths, n_head, n_group, n_state, 16, block_n, num_warps=4,
        )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[Any, ...]:
    """Strides; the token's is compiled in where the last axis is contiguous: it is then the model's, not the call's."""
    if tensor is None:
        return (0, 0, 0, 0)
    strides = tensor.stride()
    fixed = strides[-1] == 1 or tensor.ndim == 3
    return (strides[0], _compiled_in(strides[1]) if fixed else strides[1], *strides[2:])


@cache
def _compiled_in(value: int) -> tl.constexpr:
    """One object a number: Triton looks its kernels up by these objects, and finds the same faster than an equal."""
    return tl.constexpr(value)
