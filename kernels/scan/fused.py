"""The selective scan with a decay for each state: A (head, state), real. Mamba-1 is head_channel 1.

A program keeps the states of BLOCK_R rows (a row is one head_channel of one head), of one group and one batch item, in
registers and walks over the tokens of one chunk, BLOCK_T at a time. What belongs to a (row, token) pair is computed
on a tile, once; B and C of a block of tokens go through shared memory; all of it is loaded one block ahead.

With several chunks the kernel runs twice: with LOCAL for every chunk but the last, from nothing, which leaves its last
state and the log2 of its whole decay; then for every chunk, from what the chunks before it left, in order.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import math
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.elementwise import LOG2E, decay, phi1, silu, step_size
from mamba_probe.kernels.scan.rows import columns, from_columns, slices

__all__ = ["Tile", "choose_tile", "launch", "scan_kernel"]

WARPS = 12
"""Programs that an SM holds at REGISTERS registers a thread."""

REGISTERS = 168

SHORTEST = 64
"""Tokens of a chunk, at least."""


@triton.jit
def _load(p, o, mask, dtype: tl.constexpr):
    return tl.load(p + o, mask=mask, other=0.0).to(dtype)


@triton.jit
def _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t, stop, BLOCK_T: tl.constexpr, dtype: tl.constexpr):
    """B and C of BLOCK_T tokens from t on, where the pointers point: tiles (4, high, low, 2), or without 2 B alone."""
    tiles = ()
    for j in tl.static_range(BLOCK_T // 4):
        o_four = 4 * j + tl.arange(0, 4)
        mask = (t + o_four < stop)[:, None, None] & m_v
        b_B = _load(p_B, o_four[:, None, None] * B_strides[1] + o_v * B_strides[3], mask, dtype)
        if p_C is not None:
            b_C = _load(p_C, o_four[:, None, None] * C_strides[1] + o_v * C_strides[3], mask, dtype)
            b_B = tl.join(b_B, b_C)  # one way through shared memory for both
        tiles = tiles + (b_B,)
    return tiles


@triton.jit
def _step(b_h, b_A, b_delta, b_write, b_B, b_log, b_start, ZOH: tl.constexpr, NARROW: tl.constexpr):
    """One token: the new state, its decay and the scale of its write; b_write is delta x."""
    b_log2 = b_delta[:, None, None] * b_A if b_log is None else b_log * LOG2E
    b_decay = decay(b_log2, NARROW)
    b_in = b_write[:, None, None] * b_B
    b_phi = b_in  # unused unless ZOH
    if ZOH:
        b_z = b_delta[:, None, None] * b_A * (1.0 / LOG2E)
        b_phi = phi1(b_z, tl.exp2(b_z * LOG2E))
        b_in *= b_phi
    if b_start is not None:
        b_begins = (b_start > 0.5)[:, None, None]
        b_decay = tl.where(b_begins, 0.0, b_decay)
        b_log2 = tl.where(b_begins, -float("inf"), b_log2)
    return b_decay * b_h + b_in, b_decay, b_log2, b_phi


@triton.jit
def scan_kernel(
    p_x, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_starts, p_log_decay, p_initial, p_decay, p_local, p_elapsed,
    p_out, p_last, p_token_slot, p_head_slot, e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y, e_energy,
    x_strides, delta_strides, B_strides, C_strides, z_strides,
    n_token, n_chunk, chunk, n_kept_token,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT_HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows x chunks x (batch x group). A state is (high, low), low contiguous in memory."""
    LOCAL: tl.constexpr = p_C is None
    NARROW: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    ROWS: tl.constexpr = H // G * P
    dtype: tl.constexpr = p_A.dtype.element_ty
    i_chunk = tl.program_id(1)
    i_batch = (tl.program_id(2) // G).to(tl.int64)
    i_group = tl.program_id(2) % G
    o_local = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row = i_group * ROWS + o_local
    o_head = o_row // P
    o_token = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, HIGH)[None, :, None] * LOW + tl.arange(0, LOW)[None, None, :]
    m_row = o_local < ROWS if ROWS % BLOCK_R else tl.full((BLOCK_R,), True, tl.int1)
    m_v = o_v < N if N < HIGH * LOW else tl.full((1, HIGH, LOW), True, tl.int1)
    m_state = m_row[:, None, None] & m_v
    start = i_chunk * chunk
    stop = tl.minimum(start + chunk, n_token)

    b_A = _load(p_A, o_head[:, None, None] * N + o_v, m_state, dtype) * LOG2E
    o_state = (i_batch * (H * P) + o_row)[:, None, None] * N + o_v
    i_start = start.to(tl.int64)
    p_x += i_batch * x_strides[0] + i_start * x_strides[1]
    p_delta += i_batch * delta_strides[0] + i_start * delta_strides[1]
    p_B += i_batch * B_strides[0] + i_start * B_strides[1] + i_group * B_strides[2]
    if p_C is not None:
        p_C += i_batch * C_strides[0] + i_start * C_strides[1] + i_group * C_strides[2]
    p_out += (i_batch * n_token + i_start) * (H * P)
    o_x = (o_head.to(tl.int64) * x_strides[2] + o_row % P * x_strides[3])[:, None] + o_token[None, :] * x_strides[1]
    o_delta = (o_head.to(tl.int64) * delta_strides[2])[:, None] + o_token[None, :] * delta_strides[1]
    o_out = o_row[:, None] + o_token[None, :] * (H * P)
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_head, mask=m_row, other=0.0)[:, None]
    if p_D is not None:
        b_D = tl.load(p_D + o_row, mask=m_row, other=0.0)[:, None]
    if p_z is not None:
        p_z += i_batch * z_strides[0] + i_start * z_strides[1]
        o_z = (o_head.to(tl.int64) * z_strides[2] + o_row % P * z_strides[3])[:, None] + o_token[None, :] * z_strides[1]
    b_slot = o_head
    m_kept = m_row
    if p_head_slot is not None:
        b_slot = tl.load(p_head_slot + o_head, mask=m_row, other=-1)
        m_kept = m_row & (b_slot >= 0)
    m_head = m_kept & (o_row % P == 0)
    o_slot = b_slot[:, None, None] * N + o_v
    o_h = (b_slot * P + o_row % P)[:, None, None] * N + o_v
    i_kept = i_batch * n_kept_token  # of this block's first token, where every token is kept
    if p_token_slot is None:
        i_kept += start
    if p_elapsed is not None or e_cumsum is not None:
        b_cumsum = tl.zeros((BLOCK_R,), tl.float64)
        if e_cumsum is not None and p_elapsed is not None:
            for i_earlier in range(i_chunk):
                p_whole = p_elapsed + (i_batch * (n_chunk - 1) + i_earlier) * H + o_head
                b_cumsum += tl.load(p_whole, mask=m_row, other=0.0)
    if LOCAL:
        if p_log_decay is None and p_starts is None:
            b_elapsed = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        else:
            b_whole = tl.zeros((BLOCK_R, HIGH, LOW), dtype)

    # the first block; what is loaded in the loop belongs to the next
    m_next = m_row[:, None] & (start + o_token < stop)[None, :]
    b_x = _load(p_x, o_x, m_next, dtype)
    b_raw = _load(p_delta, o_delta, m_next, dtype)
    b_delta = tl.where(m_next, step_size(b_raw + b_bias, SOFTPLUS, MIN, MAX), 0.0)
    b_both = tl.join(b_delta, b_delta * b_x)
    b_BCs = _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, start, stop, BLOCK_T, dtype)
    b_skip = b_x
    b_gate = b_x
    if not LOCAL:
        if p_D is not None:
            b_skip = b_x * b_D
        if p_z is not None:
            b_gate = silu(_load(p_z, o_z, m_next, dtype), NARROW)

    # what the chunks before this one left
    b_h = tl.zeros((BLOCK_R, HIGH, LOW), dtype)
    if p_initial is not None:
        if i_chunk == 0:
            b_h = _load(p_initial, o_state, m_state, dtype)
    if not LOCAL and p_local is not None:
        for i_earlier in tl.range(0, i_chunk, loop_unroll_factor=4):
            o_whole = ((i_batch * (n_chunk - 1) + i_earlier) * (H * P) + o_row)[:, None, None] * N + o_v
            b_h = decay(_load(p_decay, o_whole, m_state, dtype), NARROW) * b_h + _load(p_local, o_whole, m_state, dtype)

    for t in range(start, stop, BLOCK_T):
        m_now = m_next
        m_next = m_row[:, None] & (t + BLOCK_T + o_token < stop)[None, :]
        p_x += BLOCK_T * x_strides[1]
        p_delta += BLOCK_T * delta_strides[1]
        p_B += BLOCK_T * B_strides[1]
        n_x = tl.load(p_x + o_x, mask=m_next, other=0.0)
        n_raw = tl.load(p_delta + o_delta, mask=m_next, other=0.0)
        if p_C is not None:
            p_C += BLOCK_T * C_strides[1]
        n_BCs = _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t + BLOCK_T, stop, BLOCK_T, dtype)
        n_z = n_x
        if not LOCAL:
            if p_z is not None:
                p_z += BLOCK_T * z_strides[1]
                n_z = tl.load(p_z + o_z, mask=m_next, other=0.0)
        if p_starts is not None:
            p_start = p_starts + i_batch * n_token + t + o_token
            b_starts = tl.load(p_start, mask=t + o_token < stop, other=0).to(dtype)
            starts = columns(tl.broadcast_to(b_starts[None, :], (BLOCK_R, BLOCK_T)))
        b_now, b_write = tl.split(b_both)
        deltas = columns(b_now)
        writes = columns(b_write)
        outs = ()
        energies = ()
        for j in tl.static_range(BLOCK_T // 4):
            BCs = slices(b_BCs[j])
            for u in tl.static_range(4):
                b_log = None
                if p_log_decay is not None:
                    o_log = ((i_batch * n_token + t + 4 * j + u) * H + o_head)[:, None, None] * N + o_v
                    m_log = m_state & (o_local * 0 + (t + 4 * j + u) < stop)[:, None, None]
                    b_log = _load(p_log_decay, o_log, m_log, dtype)
                b_start = None
                if p_starts is not None:
                    b_start = starts[4 * j + u]
                if LOCAL:
                    b_B = BCs[u]
                else:
                    b_B, b_C = tl.split(BCs[u])
                b_delta_t = deltas[4 * j + u]
                b_h, b_decay, b_log2, b_phi = _step(
                    b_h, b_A, b_delta_t, writes[4 * j + u], b_B, b_log, b_start, ZOH, NARROW
                )
                if p_elapsed is not None or e_cumsum is not None:
                    b_cumsum += b_delta_t.to(tl.float64)
                if LOCAL:
                    if p_log_decay is not None or p_starts is not None:
                        b_whole += b_log2
                else:
                    outs = outs + (tl.sum(tl.sum(b_h * b_C, axis=2), axis=1),)
                    if e_energy is not None:
                        energies = energies + (tl.sum(tl.sum(b_h * b_h, axis=2), axis=1),)
                    if e_A_bar is not None or e_B_bar is not None or e_h is not None or e_cumsum is not None:
                        m_token = o_local * 0 + (t + 4 * j + u) < stop  # a tile: the interpreter needs one
                        i_head = i_kept * KEPT_HEAD + (4 * j + u) * KEPT_HEAD
                        if p_token_slot is not None:
                            i_slot = tl.load(p_token_slot + tl.minimum(t + 4 * j + u, stop - 1))
                            m_token = m_token & (o_local * 0 + i_slot >= 0)
                            i_head = (i_kept + i_slot) * KEPT_HEAD
                        m_slot = (m_head & m_token)[:, None, None] & m_v
                        if e_cumsum is not None:
                            tl.store(e_cumsum + i_head + b_slot, b_cumsum, mask=m_head & m_token)
                        if e_A_bar is not None:
                            tl.store(e_A_bar + i_head * N + o_slot, b_decay.to(e_A_bar.dtype.element_ty), mask=m_slot)
                        if e_B_bar is not None:
                            b_B_bar = b_delta_t[:, None, None] * b_B
                            if ZOH:
                                b_B_bar *= b_phi
                            tl.store(e_B_bar + i_head * N + o_slot, b_B_bar.to(e_B_bar.dtype.element_ty), mask=m_slot)
                        if e_h is not None:
                            m_h = (m_kept & m_token)[:, None, None] & m_v
                            tl.store(e_h + i_head * (P * N) + o_h, b_h.to(e_h.dtype.element_ty), mask=m_h)
        if LOCAL:
            if p_log_decay is None and p_starts is None:
                b_elapsed += b_delta
        else:
            b_y = from_columns(outs)
            if p_D is not None:
                b_y += b_skip
            b_out = b_y
            if p_z is not None:
                b_out = b_y * b_gate
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_now)
            p_out += BLOCK_T * (H * P)
            if e_delta is not None or e_y is not None or e_energy is not None:
                i_head = i_kept * KEPT_HEAD
                o_kept = o_token[None, :] * KEPT_HEAD
                m_pair = m_now & m_kept[:, None]
                if p_token_slot is not None:
                    b_token = tl.load(p_token_slot + t + o_token, mask=t + o_token < stop, other=-1)
                    m_pair = m_pair & (b_token >= 0)[None, :]
                    o_kept = b_token.to(tl.int64)[None, :] * KEPT_HEAD
                o_pair = o_kept + b_slot[:, None]
                o_channel = o_pair * P + (o_row % P)[:, None]
                if e_delta is not None:
                    tl.store(e_delta + i_head + o_pair, b_delta, mask=m_pair & (o_row % P == 0)[:, None])
                if e_y is not None:
                    tl.store(e_y + i_head * P + o_channel, b_y, mask=m_pair)
                if e_energy is not None:
                    tl.store(e_energy + i_head * P + o_channel, from_columns(energies), mask=m_pair)
            if p_token_slot is None:
                i_kept += BLOCK_T
        b_x = n_x.to(dtype)
        b_delta = tl.where(m_next, step_size(n_raw.to(dtype) + b_bias, SOFTPLUS, MIN, MAX), 0.0)
        b_both = tl.join(b_delta, b_delta * b_x)
        b_BCs = n_BCs
        b_skip = b_x
        b_gate = b_x
        if not LOCAL:
            if p_D is not None:
                b_skip = b_x * b_D
            if p_z is not None:
                b_gate = silu(n_z.to(dtype), NARROW)

    if LOCAL:
        o_whole = ((i_batch * (n_chunk - 1) + i_chunk) * (H * P) + o_row)[:, None, None] * N + o_v
        if p_log_decay is None and p_starts is None:
            b_whole = tl.sum(b_elapsed, axis=1)[:, None, None] * b_A
        tl.store(p_decay + o_whole, b_whole, mask=m_state)
        tl.store(p_local + o_whole, b_h, mask=m_state)
        if p_elapsed is not None:
            p_whole = p_elapsed + (i_batch * (n_chunk - 1) + i_chunk) * H + o_head
            tl.store(p_whole, b_cumsum, mask=m_row & (o_row % P == 0))
    else:
        if i_chunk == n_chunk - 1:
            tl.store(p_last + o_state, b_h, mask=m_state)


class Tile(NamedTuple):
    """What one program does: rows and tokens of a block, chunks of a sequence, states side by side in a thread."""

    rows: int
    tokens: int
    chunks: int
    low: int = 4


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; interpreted, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def choose_tile(a: Arguments) -> Tile:
    """A program is a warp, and an SM holds WARPS of them; few rows are cut into chunks of tokens until that is full.

    With rows enough a thread has 8 states, or 4 where that fills the card better; an even share for the four schedulers
    of an SM is worth twice the chunks. `benchmarks/scan_gpu.py --sweep` sets the rule beside other tiles.
    """
    sms = multiprocessors(a.x.device)
    per_row = triton.next_power_of_2(a.B.shape[3])
    n_row = a.x.shape[0] * a.x.shape[2] * a.x.shape[3]
    wide, narrow = (max(4, min(32, states * 32 // per_row)) for states in (8, 4))
    low = 8 if a.emit.dtype in (torch.bfloat16, torch.float16) else 4
    if n_row >= 9 * sms * wide:
        return Tile(wide, 8, 1, low)
    if n_row >= 9 * sms * narrow:
        return Tile(narrow, 16, 1)
    programs = triton.cdiv(n_row, wide)
    chunks = max(1, min(WARPS * sms // programs, a.n_token // SHORTEST))
    share = programs * chunks / (4 * sms)
    uneven = math.ceil(share) > 1.15 * share and 2 * chunks * SHORTEST <= a.n_token
    return Tile(wide, 8, 2 * chunks if uneven else chunks, low)


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
    n_group, n_state = a.B.shape[2:]
    tile = tile or choose_tile(a)
    chunk = triton.cdiv(triton.cdiv(n_token, tile.chunks), tile.tokens) * tile.tokens
    n_chunk = triton.cdiv(n_token, chunk)
    blocks = triton.cdiv(n_head // n_group * head_channel, tile.rows)
    state = triton.next_power_of_2(n_state)
    decay = local = elapsed = None
    if n_chunk > 1:
        decay, local = (
            torch.empty((n_batch, n_chunk - 1, *last.shape[1:]), dtype=a.dtype, device=a.x.device) for _ in range(2)
        )
        if "delta_cumsum" in emitted:
            elapsed = torch.empty((n_batch, n_chunk - 1, n_head), dtype=torch.float64, device=a.x.device)
    names = ("delta", "delta_cumsum", "A_bar", "B_bar", "h", "y", "energy")
    emissions = [emitted.get(name) for name in names]
    A, D, bias, starts, log_decay = (
        None if tensor is None else tensor.contiguous() for tensor in (a.A, a.D, a.delta_bias, a.starts, a.log_decay)
    )
    for is_local in (True, False) if n_chunk > 1 else (False,):
        cast(Any, scan_kernel)[(blocks, n_chunk - is_local, n_batch * n_group)](
            a.x, a.delta, A, a.B, None if is_local else a.C, D, a.z, bias, starts, log_decay, a.given_state,
            decay, local, elapsed,
            out, last, token_slot, head_slot, *(emissions if not is_local else [None] * len(names)),
            a.x.stride(), a.delta.stride(), a.B.stride(), a.C.stride(), (a.x if a.z is None else a.z).stride(),
            n_token, n_chunk, chunk,
            n_kept_token=n_token if token_slot is None else len(a.emit.tokens or ()),
            H=n_head, P=head_channel, G=n_group, N=n_state,
            KEPT_HEAD=n_head if head_slot is None else len(a.emit.channels or ()),
            BLOCK_R=tile.rows, BLOCK_T=tile.tokens, LOW=min(tile.low, state), HIGH=state // min(tile.low, state),
            SOFTPLUS=a.delta_softplus, MIN=a.delta_limits[0], MAX=a.delta_limits[1], ZOH=a.discretization == "zoh",
            num_warps=1, num_stages=1, maxnreg=REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
