"""The kernel of the backward of `fused`, and its pieces: A (head, state), real.

A program keeps g = dL/dh of BLOCK_R rows (of one group and one batch item) in registers and walks back over the tokens
of one chunk, BLOCK_T at a time. States come again from the saved ones, one every SEGMENT tokens: a segment is walked
forward once, leaving its state every BLOCK_T tokens in the program's own scratch, and then block by block backward; a
block's states are in registers. dB and dC are sums over rows: one partial a program, summed later.

    dy_t = dout_t silu(z_t) (+ upstream of y)           g_t = C_t dy_t + A_bar_{t+1} g_{t+1} (+ upstream of h_t)
    dC_t = sum over rows of dy_t h_t                    dB_t = sum over rows of g_t delta_t x_t
    u_t  = sum_n g_t B_t                                dx_t = delta_t u_t + D dy_t
    q_t  = A_bar_t (g_t h_{t-1} + upstream of A_bar_t)  dA = sum_t delta_t q_t;  d log_decay_t = q_t
    ddelta_t = x_t u_t + sum_n A q_t (+ upstream), then through limits and softplus

Without d_x it is LOCAL: g from nothing, of every chunk but the first; it leaves A_bar_start g_start and the chunk's
decay.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from mamba_probe.kernels.scan.adjoint import back
from mamba_probe.kernels.scan.discretization import Given, load_starts
from mamba_probe.kernels.scan.elementwise import LN2, LOG2E, bounded, decay
from mamba_probe.kernels.scan.folds import over_states
from mamba_probe.kernels.scan.loads import load_block
from mamba_probe.kernels.scan.places import kept_rows, load, masked, program_rows, states_at
from mamba_probe.kernels.scan.rows import columns
from mamba_probe.kernels.scan.segments import rewalk, segment_state, states_of
from mamba_probe.kernels.scan.upstream import Pairs, Upstream, batch_item, fetch, ready

__all__ = ["backward_kernel"]


class Form(NamedTuple):
    """What the kernel is compiled for, beside its tile."""

    H: tl.constexpr
    P: tl.constexpr
    G: tl.constexpr
    N: tl.constexpr
    KEPT_HEAD: tl.constexpr
    SOFTPLUS: tl.constexpr
    MIN: tl.constexpr
    MAX: tl.constexpr
    ZOH: tl.constexpr
    LOCAL: tl.constexpr
    GATED: tl.constexpr
    WHOLE: tl.constexpr
    WARPS: tl.constexpr
    NARROW: tl.constexpr
    dtype: tl.constexpr
    B_dtype: tl.constexpr
    C_dtype: tl.constexpr
    AXIS: tl.constexpr  # of the states' high part, in a tile of states


class Gradients(NamedTuple):
    """Pointers to what is found of the inputs; None where an input was not given."""

    x: tl.tensor
    delta: tl.tensor
    A: tl.tensor
    B: tl.tensor
    C: tl.tensor
    D: tl.tensor
    z: tl.tensor
    bias: tl.tensor
    initial: tl.tensor
    log: tl.tensor


@triton.jit
def _leaving(p_decay, p_local, g, at, o_v, m_state, o_state, i_chunk, n_chunk, form: tl.constexpr):
    """dL/dh after a chunk: the last state's, then what the chunks after it leave, from the last one on."""
    b_g = tl.zeros((o_v.shape[0], at.row.shape[0], o_v.shape[2]), form.dtype)
    if not form.LOCAL:
        if g.last is not None:
            b_g = load(g.last, o_state, m_state, form.dtype)
        if p_local is not None:
            for i in range(n_chunk - 1 - i_chunk):
                i_left = at.batch * (n_chunk - 1) + n_chunk - 2 - i
                o_whole = (i_left * (form.H * form.P) + at.row)[None, :, None] * form.N + o_v
                b_g = decay(load(p_decay, o_whole, m_state, form.dtype), form.NARROW) * b_g
                b_g += load(p_local, o_whole, m_state, form.dtype)
    return b_g


@triton.jit
def _answer(b_dD, b_dbias, b, us, vs, qs, ys, b_D, o_out, g, d, at, kept, i_kept, n_token, t, stop, m_now,
            form: tl.constexpr):  # fmt: skip
    """Store dx, dz and ddelta of a block: dD and dbias so far."""
    o_token = tl.arange(0, b.x.shape[1])
    b_u = over_states(us)
    b_v = b_u
    if form.ZOH:
        b_v = over_states(vs)
    b_ddelta = b.x * b_v + over_states(qs) * LN2
    b_dx = b.delta * b_u
    if d.D is not None:
        b_dx += b.dy * b_D
        b_dD += b.dy * b.x
    i_out = (at.batch * n_token + t) * (form.H * form.P)
    tl.store(d.x + i_out + o_out, b_dx.to(d.x.dtype.element_ty), mask=m_now)
    if form.GATED:
        b_dz = b.dz
        if g.out is not None:
            b_y = over_states(ys)
            if d.D is not None:
                b_y += b.x * b_D
            b_dz *= b_y
        tl.store(d.z + i_out + o_out, b_dz.to(d.z.dtype.element_ty), mask=m_now)
    if g.delta is not None:
        o_kept = (t + o_token).to(tl.int64)[None, :] * form.KEPT_HEAD
        m_pair = m_now & kept.rows[:, None]
        if g.token_slot is not None:
            b_token = tl.load(g.token_slot + t + o_token, mask=t + o_token < stop, other=-1)
            m_pair = m_pair & (b_token >= 0)[None, :]
            o_kept = b_token.to(tl.int64)[None, :] * form.KEPT_HEAD
        o_pair = i_kept * form.KEPT_HEAD + o_kept + kept.slot[:, None]
        b_ddelta += load(g.delta, o_pair, m_pair & (at.row % form.P == 0)[:, None], form.dtype)
    b_ddelta *= b.slope
    tl.store(d.delta + i_out + o_out, b_ddelta.to(d.delta.dtype.element_ty), mask=m_now)
    return b_dD, b_dbias + b_ddelta


@triton.jit
def _leave(p_decay, p_local, d, b_g, b_sum, b_dD, b_dbias, b_A, at, o_v, m_state, o_state, i_chunk, n_chunk,
           form: tl.constexpr):  # fmt: skip
    """Store what a chunk leaves: LOCAL, A_bar g of its first token and log2 of its decay; else what is summed over its
    tokens, and g before the first token of all."""
    ROWS: tl.constexpr = form.H * form.P
    if form.LOCAL:
        if not form.WHOLE:
            b_sum = bounded(tl.sum(b_dbias, axis=1))[None, :, None] * b_A
        o_left = (at.batch * (n_chunk - 1) + i_chunk - 1) * ROWS + at.row
        o_whole = o_left[None, :, None] * form.N + o_v
        tl.store(p_decay + o_whole, b_sum, mask=m_state)
        tl.store(p_local + o_whole, b_g, mask=m_state)
    else:
        o_part = (at.batch * n_chunk + i_chunk) * ROWS + at.row
        tl.store(d.A + o_part[None, :, None] * form.N + o_v, b_sum, mask=m_state)
        if d.D is not None:
            tl.store(d.D + o_part, tl.sum(b_dD, axis=1), mask=at.mask)
        if d.bias is not None:
            tl.store(d.bias + o_part, tl.sum(b_dbias, axis=1), mask=at.mask)
        if d.initial is not None:  # noqa: SIM102
            if i_chunk == 0:
                tl.store(d.initial + o_state, b_g, mask=m_state)


@triton.jit
def backward_kernel(
    p_x, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_starts, p_log_decay, p_initial, p_states, p_scratch,
    g_out, g_last, g_delta, g_A_bar, g_B_bar, g_h, g_y, p_token_slot, p_head_slot, p_decay, p_local,
    d_x, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial, d_log,
    x_strides, delta_strides, B_strides, C_strides, z_strides, out_strides,
    n_token, n_chunk, chunk, n_kept_token, n_batch,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT_HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, SEGMENT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows x chunks x (batch x group)."""
    LOCAL: tl.constexpr = d_x is None
    WHOLE: tl.constexpr = p_log_decay is not None or p_starts is not None  # the decay is no multiple of delta's sum
    NARROW: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    N_BLOCK: tl.constexpr = SEGMENT // BLOCK_T
    SCRATCH: tl.constexpr = BLOCK_R * HIGH * LOW
    dtype: tl.constexpr = p_A.dtype.element_ty
    form: tl.constexpr = Form(
        H, P, G, N, KEPT_HEAD, SOFTPLUS, MIN, MAX, ZOH, LOCAL, p_z is not None, WHOLE, WARPS, NARROW, dtype,
        p_B.dtype.element_ty, p_C.dtype.element_ty, 0)  # fmt: skip
    given = Given(p_starts, p_log_decay)
    g = Upstream(g_out, g_last, g_delta, g_A_bar, g_B_bar, g_h, g_y, p_token_slot)
    d = Gradients(d_x, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial, d_log)
    i_chunk = tl.program_id(1) + (1 if LOCAL else 0)
    at = program_rows(H, P, G, BLOCK_R)
    o_v, m_v = states_at(HIGH, LOW, N, 0)
    o_w, m_w = states_at(HIGH, LOW, N)  # of a tile (token, high, low)
    m_state = at.mask[None, :, None] & m_v
    start = i_chunk * chunk
    stop = tl.minimum(start + chunk, n_token)

    b_A = bounded(load(p_A, at.head[None, :, None] * N + o_v, m_state, dtype) * LOG2E)
    o_state = (at.batch * (H * P) + at.row)[None, :, None] * N + o_v
    strides = Pairs(x_strides, delta_strides, z_strides, out_strides)
    p, o = batch_item(Pairs(p_x, p_delta, p_x if p_z is None else p_z, p_x if g_out is None else g_out), strides, at,
                      BLOCK_T, P)  # fmt: skip
    p_B += at.batch * B_strides[0] + at.group * B_strides[2]
    p_C += at.batch * C_strides[0] + at.group * C_strides[2]
    o_out = at.row[:, None] + tl.arange(0, BLOCK_T)[None, :] * (H * P)
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + at.head, mask=at.mask, other=0.0)[:, None]
    b_D = 0.0 if p_D is None else tl.load(p_D + at.row, mask=at.mask, other=0.0)[:, None]
    kept = kept_rows(p_head_slot, at, P)
    i_kept = at.batch * n_kept_token
    i_program = ((tl.program_id(2) * n_chunk + i_chunk) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    if p_scratch is not None:
        p_scratch += i_program * (N_BLOCK * SCRATCH)
    o_scratch = tl.arange(0, BLOCK_R)[None, :, None] * (HIGH * LOW) + o_v

    b_g = _leaving(p_decay, p_local, g, at, o_v, m_state, o_state, i_chunk, n_chunk, form)
    b_sum = tl.zeros((HIGH, BLOCK_R, LOW), dtype)
    b_dD = tl.zeros((BLOCK_R, BLOCK_T), dtype)
    b_dbias = tl.zeros((BLOCK_R, BLOCK_T), dtype)  # LOCAL: the sum of delta
    t = start + (tl.cdiv(stop - start, BLOCK_T) - 1) * BLOCK_T
    n = fetch(p, o, strides, g, at, kept, i_kept, t, start, stop, BLOCK_T, form)
    b = ready(n, g, b_bias, at, t, start, stop, form)
    b_BCs = load_block(p_B, p_C, B_strides, C_strides, o_w, m_w, t, stop, BLOCK_T)
    n_segment = tl.cdiv(stop - start, SEGMENT)
    for i_back in range(n_segment):
        first = start + (n_segment - 1 - i_back) * SEGMENT
        n_block = tl.minimum(tl.cdiv(stop - first, BLOCK_T), N_BLOCK)
        b_h = b_g if LOCAL else segment_state(p_initial, p_states, at, o_v, m_state, o_state, first, n_token, SEGMENT,
                                              form)  # fmt: skip
        if not LOCAL and N_BLOCK > 1:
            b_h = rewalk(b_h, p_scratch, o_scratch, b_A, b_bias, p, o, strides, p_B, B_strides, given, at, o_v, o_w,
                         m_w, m_state, n_token, first, n_block, stop, BLOCK_T, STAGES, form)  # fmt: skip
        for i_block in tl.range(0, n_block, num_stages=STAGES):
            t = first + (n_block - 1 - i_block) * BLOCK_T
            m_now = masked(at, t, stop, BLOCK_T)
            n_t = t - BLOCK_T  # before the first block nothing is needed, but B and C must exist
            n = fetch(p, o, strides, g, at, kept, i_kept, n_t, start, stop, BLOCK_T, form)
            n_BCs = load_block(p_B, p_C, B_strides, C_strides, o_w, m_w, tl.maximum(n_t, 0), stop, BLOCK_T)
            starts = load_starts(given, at, n_token, t, stop, BLOCK_T, dtype)
            deltas, dys, writes = columns(b.delta), columns(b.dy), columns(b.write)
            hs = (b_h,)
            if not LOCAL and N_BLOCK > 1:  # for the next round
                b_h = tl.load(p_scratch + tl.maximum(n_block - 2 - i_block, 0) * SCRATCH + o_scratch)
            if not LOCAL:
                hs = states_of(hs[0], b_A, deltas, writes, b_BCs, starts, given, at, o_v, m_state, n_token, t, stop,
                               form)  # fmt: skip
            b_g, b_sum, us, vs, qs, ys = back(
                b_g, b_sum, hs, b_A, deltas, writes, dys, b_BCs, starts, given, g, d, at, kept, o_v, m_v, m_state,
                i_kept, t, n_token, n_batch, stop, form)  # fmt: skip
            if not LOCAL:
                b_dD, b_dbias = _answer(b_dD, b_dbias, b, us, vs, qs, ys, b_D, o_out, g, d, at, kept, i_kept, n_token,
                                        t, stop, m_now, form)  # fmt: skip
            elif not WHOLE:
                b_dbias += b.delta
            b = ready(n, g, b_bias, at, n_t, start, stop, form)
            b_BCs = n_BCs

    _leave(p_decay, p_local, d, b_g, b_sum, b_dD, b_dbias, b_A, at, o_v, m_state, o_state, i_chunk, n_chunk, form)
