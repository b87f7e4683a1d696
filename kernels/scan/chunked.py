"""The selective scan with one real decay a head: A (head,). Mamba-2, as matrix products within chunks of tokens.

A program keeps the state (state, head_channel) of one head, or of BLOCK_P of its channels, in registers and walks over
the chunks of one span of tokens. With log a the log of the decay, w the scale of the write and h the state before the
chunk, a chunk is three products (Dao & Gu 2024, arXiv 2405.21060, section 6):

    y_t = exp(sum_{r <= t} log a_r) C_t h  +  sum_{s <= t} (C_t B_s) exp(sum_{s < r <= t} log a_r) w_s x_s
    h   = exp(sum_r log a_r) h  +  sum_s B_s exp(sum_{r > s} log a_r) w_s x_s

`steps` finds the sums and w ahead, for all heads at once. Sums of log a over a segment are differences of cumulative
sums in float64 (carried into the [token, token] matrix as a float32 and a factor for the rest), each log a held above
-2048: what is lost beside a reset is 2048 x 128 x 2^-48, not 2048 x 128 x 2^-24.

h after every token is the kernel of `states`, where it is asked for: what the dots know is the state after a chunk.

With several spans the kernel runs twice: with LOCAL for every span but the last, from nothing, which leaves its last
state, its decay and its sum of delta; then for every span, from what the spans before it left, in order.

Tensor cores multiply bfloat16. A float32 operand is the sum of three of those, a float16 one of two; products below
2^-24 of the largest are left out. Where y is bfloat16 and is not emitted, the weights of x and the state that C reads
are rounded to one bfloat16; the state itself never is.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.elementwise import silu
from mamba_probe.kernels.scan.states import entering, states_kernel
from mamba_probe.kernels.scan.steps import steps_kernel

__all__ = ["Tile", "choose_tile", "launch", "scan_kernel"]


import os

PRECISION = tl.constexpr(os.environ.get("PRECISION", "ieee"))


@triton.jit
def _cut(v):
    """float32 without the bits that bfloat16 has not."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _terms(v, dtype: tl.constexpr, SPLIT: tl.constexpr):
    """Terms that the tensor cores multiply, and whose sum is v; v itself in `dtype` where nothing is split."""
    if not SPLIT:
        return (v.to(dtype),)
    elif v.dtype == tl.bfloat16:
        return (v,)
    elif v.dtype == tl.float16:
        high = v.to(tl.bfloat16)
        return (high, (v.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16))
    else:
        high = _cut(v)
        middle = _cut(v - high)
        low = (v - high) - middle
        return (high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16))


@triton.jit
def _narrowed(v, dtype: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """As `_terms`, but one term where EXACT is not asked for."""
    if SPLIT and not EXACT:
        return (v.to(tl.bfloat16),)
    else:
        return _terms(v, dtype, SPLIT)


@triton.jit
def _dot(a, b, acc, N_A: tl.constexpr, N_B: tl.constexpr, TRANS_A: tl.constexpr = False, TRANS_B: tl.constexpr = False):
    """acc + a b for N_A terms of a and N_B of b, the small products first: tensor cores cut off what acc cannot hold.

    Triton 3.6 tells functions apart by the tensors they are given, not by the tuples these come in: hence N_A, N_B.
    """
    for order in tl.static_range(2, -1, -1):
        for i in tl.static_range(N_A):
            for j in tl.static_range(N_B):
                if i + j == order:
                    left = tl.trans(a[i]) if TRANS_A else a[i]
                    right = tl.trans(b[j]) if TRANS_B else b[j]
                    acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _segment_decays(p_high, o_t):
    """exp2 of high[t] - high[s], 0 for s > t."""
    b_log2 = tl.load(p_high + o_t)[:, None] - tl.load(p_high + o_t)[None, :]
    return tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_log2, -float("inf")))


@triton.jit
def _emit(e_cumsum, e_B_bar, e_y, p_size, p_rest, n_padded, o_t, o_kept, m_kept, m_first, o_n, m_n, o_p, m_p,
          b_elapsed, b_B, b_y, P: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """What of a chunk is asked for; m_first where this program is the one that writes what all channels share."""
    if e_cumsum is not None:
        b_cumsum = b_elapsed + tl.cumsum(tl.load(p_size + o_t).to(tl.float64), 0)
        tl.store(e_cumsum + o_kept, b_cumsum, mask=m_first)
    if e_B_bar is not None:
        b_scale = tl.load(p_rest + o_t) * tl.load(p_rest + n_padded + o_t)
        b_B_bar = (b_scale[:, None] * b_B.to(b_scale.dtype)).to(e_B_bar.dtype.element_ty)
        tl.store(e_B_bar + o_kept[:, None] * N + o_n[None, :], b_B_bar, mask=m_first[:, None] & m_n[None, :])
    if e_y is not None:
        tl.store(e_y + o_kept[:, None] * P + o_p[None, :], b_y, mask=m_kept[:, None] & m_p[None, :])


@triton.jit
def scan_kernel(
    p_x, p_B, p_C, p_D, p_z, p_steps, p_fade, p_size, p_initial, p_whole, p_local,
    p_out, p_last, p_token_slot, p_head_slot, e_cumsum, e_B_bar, e_y,
    x_strides, B_strides, C_strides, z_strides, n_token, n_span, span, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOCAL: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: heads x blocks of BLOCK_P channels, spans, batch."""
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_steps.dtype.element_ty
    i_p = tl.program_id(0) % N_P
    i_head = (tl.program_id(0) // N_P).to(tl.int64)
    i_span = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group = i_head // (H // G)
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_n = o_n < N if N < BLOCK_N else tl.full((BLOCK_N,), True, tl.int1)
    m_p = o_p < P if P % BLOCK_P else tl.full((BLOCK_P,), True, tl.int1)
    m_state = m_n[:, None] & m_p[None, :]
    start = i_span * span
    stop = tl.minimum(start + span, n_token)
    n_padded = n_span * span
    p_high = p_steps + (i_batch * H + i_head) * (4 * n_padded)
    p_fade += (i_batch * H + i_head) * (n_padded // BLOCK_T)
    if p_size is not None:
        p_size += (i_batch * H + i_head) * n_padded
    p_x += i_batch * x_strides[0] + i_head * x_strides[2]
    p_B += i_batch * B_strides[0] + i_group * B_strides[2]
    p_C += i_batch * C_strides[0] + i_group * C_strides[2]
    p_out += (i_batch * n_token * H + i_head) * P
    if p_z is not None:
        p_z += i_batch * z_strides[0] + i_head * z_strides[2]
    if p_D is not None:
        b_D = tl.load(p_D + i_head * P + o_p, mask=m_p, other=0.0)
    o_x = o_t[:, None] * x_strides[1] + o_p[None, :] * x_strides[3]
    o_B = o_t[:, None] * B_strides[1] + o_n[None, :] * B_strides[3]
    o_C = o_t[:, None] * C_strides[1] + o_n[None, :] * C_strides[3]
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    i_kept = i_batch * n_kept_token * n_kept_head + i_slot
    o_state = o_p[None, :] * N + o_n[:, None]
    b_fading = tl.full((), 1.0, tl.float64)
    if LOCAL:
        b_elapsed = tl.full((), 0.0, tl.float64)
        b_h = tl.zeros((BLOCK_N, BLOCK_P), dtype)
    else:
        b_h, b_elapsed = entering(
            p_initial, p_whole, p_local, i_batch, i_span, n_span, i_head, o_state, m_state, H, P * N, dtype
        )

    for t in range(start, stop, BLOCK_T):
        t_wide = tl.cast(t, tl.int64)
        m_t = t + o_t < stop
        m_x = m_t[:, None] & m_p[None, :]
        b_fade = tl.load(p_fade + t // BLOCK_T)
        b_x = tl.load(p_x + t_wide * x_strides[1] + o_x, mask=m_x, other=0.0)
        b_B = tl.load(p_B + t_wide * B_strides[1] + o_B, mask=m_t[:, None] & m_n[None, :], other=0.0)
        x_terms = _terms(b_x, dtype, SPLIT)
        B_terms = _terms(b_B, dtype, SPLIT)
        if not LOCAL:
            b_C = tl.load(p_C + t_wide * C_strides[1] + o_C, mask=m_t[:, None] & m_n[None, :], other=0.0)
            C_terms = _terms(b_C, dtype, SPLIT)
            b_weight = tl.zeros((BLOCK_T, BLOCK_T), dtype)
            b_weight = _dot(C_terms, B_terms, b_weight, len(C_terms), len(B_terms), TRANS_B=True)
            b_weight *= _segment_decays(p_high + t, o_t) * tl.load(p_high + 2 * n_padded + t + o_t)[None, :]
            if p_z is not None:  # long before it is used
                o_z = o_t[:, None] * z_strides[1] + o_p[None, :] * z_strides[3]
                b_z = tl.load(p_z + t_wide * z_strides[1] + o_z, mask=m_x, other=0.0)
            x_weights = _narrowed(b_weight, dtype, SPLIT, EXACT)
            h_terms = _narrowed(b_h, dtype, SPLIT, EXACT)
            b_y = _dot(C_terms, h_terms, tl.zeros((BLOCK_T, BLOCK_P), dtype), len(C_terms), len(h_terms))
            b_y *= tl.exp2(tl.load(p_high + t + o_t))[:, None]
            if EXACT:
                b_zero = tl.zeros((BLOCK_T, BLOCK_P), dtype)
                b_y += _dot(x_weights, x_terms, b_zero, len(x_weights), len(x_terms))
            else:
                b_y = _dot(x_weights, x_terms, b_y, len(x_weights), len(x_terms))
            b_y *= tl.load(p_high + n_padded + t + o_t)[:, None]
            if p_D is not None:
                b_y += b_D[None, :] * b_x.to(dtype)
            if e_cumsum is not None or e_B_bar is not None or e_y is not None:
                b_slot = t + o_t if p_token_slot is None else tl.load(p_token_slot + t + o_t, mask=m_t, other=-1)
                m_kept = m_t & (tl.minimum(b_slot, i_slot) >= 0)
                o_kept = i_kept + b_slot.to(tl.int64) * n_kept_head
                _emit(e_cumsum, e_B_bar, e_y, p_size, p_high + n_padded, n_padded, t + o_t, o_kept, m_kept,
                      tl.where(i_p == 0, m_kept, False), o_n, m_n, o_p, m_p, b_elapsed, b_B, b_y, P, N)  # fmt: skip
            if p_z is not None:
                b_y *= silu(b_z.to(dtype), SPLIT and not EXACT)
            o_out = o_t[:, None] * (H * P) + o_p[None, :]
            tl.store(p_out + t_wide * (H * P) + o_out, b_y.to(p_out.dtype.element_ty), mask=m_x)
        if p_size is not None:
            b_elapsed += tl.sum(tl.load(p_size + t + o_t).to(tl.float64), 0)
        b_end = tl.load(p_high + 3 * n_padded + t + o_t)
        b_write = _terms(b_end[:, None] * b_x.to(dtype), dtype, SPLIT)
        b_new = tl.zeros((BLOCK_N, BLOCK_P), dtype)
        b_new = _dot(B_terms, b_write, b_new, len(B_terms), len(b_write), TRANS_A=True)
        b_h = b_fade * b_h + b_new  # rounded here; the tensor cores' own sums are cut off
        b_fading *= b_fade.to(tl.float64)

    if LOCAL:
        i_whole = (i_batch * (n_span - 1) + i_span) * H + i_head
        tl.store(p_local + i_whole * (P * N) + o_state, b_h, mask=m_state)
        tl.store(p_whole + 2 * i_whole, b_fading)
        tl.store(p_whole + 2 * i_whole + 1, b_elapsed)
    else:
        p_end = p_last + (i_batch * H + i_head) * (P * N) + o_state
        tl.store(p_end, b_h, mask=tl.where(i_span == n_span - 1, m_state, False))


COMPILED = isinstance(scan_kernel, triton.JITFunction)
"""Interpreted, products are exact without splitting."""

STATES = 32
"""Channels of one program of `states_kernel`."""


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
    would not fit the registers. Spans until there are programs enough."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    if a.dtype == torch.float64:
        return Tile(16, 16, 1)
    narrow = a.B.dtype == a.C.dtype == a.x.dtype == torch.bfloat16 and "y" not in a.emit.variables
    state = _power(a.B.shape[3])
    channels = min(max(16, _power(head_channel)), max(16, 8192 // state))
    programs = n_batch * n_head * _ceil(head_channel, channels)
    spans = max(1, min(264 // programs, n_token // 256))
    return Tile(64, channels, spans) if narrow else Tile(16, channels, spans, warps=8)


def launch(
    a: Arguments,
    out: Tensor,
    last: Tensor,
    emitted: dict[str, Tensor],
    token_slot: Tensor | None,
    head_slot: Tensor | None,
    tile: Tile | None = None,
) -> None:
    """Fill `out`, `last` and what is `emitted`."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    tile = tile or choose_tile(a)
    span = _ceil(_ceil(n_token, tile.spans), tile.tokens) * tile.tokens
    n_span = _ceil(n_token, span)
    whole = local = None
    if n_span > 1:
        whole = torch.empty((n_batch, n_span - 1, n_head, 2), dtype=torch.float64, device=a.x.device)
        local = torch.empty((n_batch, n_span - 1, *last.shape[1:]), dtype=a.dtype, device=a.x.device)
    slots = token_slot, head_slot
    kept = {
        "n_kept_token": n_token if token_slot is None else len(a.emit.tokens or ()),
        "n_kept_head": n_head if head_slot is None else len(a.emit.channels or ()),
    }
    starts = None if a.starts is None else a.starts.to(torch.uint8).contiguous()
    steps = _find_steps(a, starts, emitted, slots, kept, tile.tokens, n_span * span)
    D = None if a.D is None else a.D.contiguous()
    sizes = {"n_token": n_token, "n_span": n_span, "span": span, **kept, **_sizes(a)}
    x, B, C, z = (_strides(tensor) for tensor in (a.x, a.B, a.C, a.z))
    names = ("delta_cumsum", "B_bar", "y")
    for is_local in (True, False) if n_span > 1 else (False,):
        cast(Any, scan_kernel)[(n_head * _ceil(head_channel, tile.channels), n_span - is_local, n_batch)](
            a.x, a.B, a.C, D, a.z, *steps, a.given_state, whole, local,
            out, last, *slots, *[None if is_local else emitted.get(name) for name in names], x, B, C, z, **sizes,
            BLOCK_T=tile.tokens, BLOCK_P=tile.channels, LOCAL=is_local, SPLIT=COMPILED and a.dtype == torch.float32,
            EXACT=a.x.dtype != torch.bfloat16 or "y" in emitted, num_warps=tile.warps, num_stages=tile.stages,
            **({} if tile.registers is None else {"maxnreg": tile.registers}),
        )  # fmt: skip
    if "h" in emitted or "energy" in emitted:
        channels = min(STATES, _power(head_channel))
        cast(Any, states_kernel)[(n_head * _ceil(head_channel, channels), n_span, n_batch)](
            a.x, a.delta, a.A, a.B, a.delta_bias, starts, a.log_decay, a.given_state, whole, local,
            *slots, emitted.get("h"), emitted.get("energy"), x, _strides(a.delta), B, _strides(a.log_decay),
            **sizes, **_rule(a), BLOCK_P=channels, num_warps=4, num_stages=2,
        )  # fmt: skip


def _find_steps(
    a: Arguments,
    starts: Tensor | None,
    emitted: dict[str, Tensor],
    slots: tuple[Tensor | None, Tensor | None],
    kept: dict[str, int],
    chunk: int,
    n_padded: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `steps_kernel` finds, for a whole number of chunks: steps, the decay of each chunk, and delta if needed."""
    n_batch, n_token, n_head, _ = a.x.shape
    n_chunk = n_padded // chunk
    steps = torch.empty((n_batch, n_head, 4, n_padded), dtype=a.dtype, device=a.x.device)
    fade = torch.empty((n_batch, n_head, n_chunk), dtype=a.dtype, device=a.x.device)
    size = torch.empty_like(steps[:, :, 0]) if "delta_cumsum" in emitted else None
    heads = min(16, _power(n_head))
    cast(Any, steps_kernel)[(n_chunk, _ceil(n_head, heads), n_batch)](
        a.delta, a.A, a.delta_bias, starts, a.log_decay, steps, fade, size, *slots,
        emitted.get("delta"), emitted.get("A_bar"), _strides(a.delta), _strides(a.log_decay),
        n_token=n_token, n_chunk=n_chunk, **kept, H=n_head, BLOCK_T=chunk, BLOCK_H=heads, **_rule(a), num_warps=4,
    )  # fmt: skip
    return steps, fade, size


def _sizes(a: Arguments) -> dict[str, int]:
    """Sizes that are compiled in."""
    n_group, n_state = a.B.shape[2:]
    padded = max(16, _power(n_state))
    return {"H": a.x.shape[2], "P": a.x.shape[3], "G": n_group, "N": n_state, "BLOCK_N": padded}


def _rule(a: Arguments) -> dict[str, Any]:
    low, high = a.delta_limits
    return {"SOFTPLUS": a.delta_softplus, "MIN": low, "MAX": high, "ZOH": a.discretization == "zoh"}


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


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, takes longer, as does its power of two."""
    return -(-a // b)


def _power(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()
