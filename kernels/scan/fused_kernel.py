"""The kernel of `fused`, and its pieces.

A program keeps the states of BLOCK_R rows (a row is one head_channel of one head), of one group and one batch item, in
registers and walks over the tokens of one chunk, BLOCK_T at a time. What belongs to a (row, token) pair is computed
on a tile, once; B and C of a block of tokens go through shared memory; all of it is loaded one block ahead, in
registers or, with STAGES above 1, by copies into shared memory that the compiler lays out.

Without C it is LOCAL: it starts from nothing, and leaves a chunk's last state and the sum of its delta; where that does
not tell the decay (log_decay, seq_idx), the log2 of its whole decay.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from mamba_probe.kernels.scan.discretization import Given, decay_at, load_starts, write_at
from mamba_probe.kernels.scan.elementwise import LOG2E, bounded, decay, silu, step_size
from mamba_probe.kernels.scan.emitting import Emitted, emit_block, emit_token, slots
from mamba_probe.kernels.scan.loads import load_states, widened
from mamba_probe.kernels.scan.places import first, load, masked, pairs_at, program_rows, states_at
from mamba_probe.kernels.scan.rows import columns, from_columns, slices

__all__ = ["scan_kernel"]


class Form(NamedTuple):
    """What the kernel is compiled for, beside its tile."""

    H: tl.constexpr
    P: tl.constexpr
    N: tl.constexpr
    KEPT_HEAD: tl.constexpr
    SOFTPLUS: tl.constexpr
    MIN: tl.constexpr
    MAX: tl.constexpr
    ZOH: tl.constexpr
    LOCAL: tl.constexpr
    SKIPS: tl.constexpr
    GATED: tl.constexpr
    COUNTED: tl.constexpr
    WHOLE: tl.constexpr
    NARROW: tl.constexpr
    B_dtype: tl.constexpr
    C_dtype: tl.constexpr
    AXIS: tl.constexpr  # of the rows in a tile of states is not this one


class Sources(NamedTuple):
    """Of what is read by blocks of tokens: pointers to a block's first token, or strides. What is not given repeats
    another one, and is not read."""

    x: tl.tensor
    delta: tl.tensor
    B: tl.tensor
    C: tl.tensor
    z: tl.tensor


@triton.jit
def _from(p, strides, at, t):
    """The sources `p` from token t of the batch item and the group on."""
    return Sources(
        first(p.x, strides.x, at, t), first(p.delta, strides.delta, at, t), first(p.B, strides.B, at, t, True),
        first(p.C, strides.C, at, t, True), first(p.z, strides.z, at, t),
    )  # fmt: skip


@triton.jit
def _after(p, strides, n: tl.constexpr):
    """The sources `p`, n tokens on."""
    return Sources(
        p.x + n * strides.x[1], p.delta + n * strides.delta[1], p.B + n * strides.B[1], p.C + n * strides.C[1],
        p.z + n * strides.z[1],
    )  # fmt: skip


@triton.jit
def _fetch(p, o_x, o_delta, o_z, m_x, m_delta, form: tl.constexpr):
    """Of a block, as they came: x, delta and z; delta may be that of another block."""
    n_x = tl.load(p.x + o_x, mask=m_x, other=0.0)
    n_delta = tl.load(p.delta + o_delta, mask=m_delta, other=0.0)
    n_z = n_x
    if form.GATED:
        n_z = tl.load(p.z + o_z, mask=m_x, other=0.0)
    return n_x, n_delta, n_z


@triton.jit
def _ready(n_x, n_delta, n_z, b_bias, b_D, mask, form: tl.constexpr):
    """Of a block, by (row, token): delta; delta beside delta x; D x and silu(z), anything where there is no D or z."""
    dtype: tl.constexpr = b_D.dtype
    b_x = n_x.to(dtype)
    b_delta = tl.where(mask, step_size(n_delta.to(dtype) + b_bias, form.SOFTPLUS, form.MIN, form.MAX), 0.0)
    b_pair = tl.join(b_delta, b_delta * b_x)
    b_skip = b_x
    b_gate = b_x
    if form.SKIPS:
        b_skip = b_x * b_D
    if form.GATED:
        b_gate = silu(n_z.to(dtype), form.NARROW)
    return b_delta, b_pair, b_skip, b_gate


@triton.jit
def _entering(p_initial, p_decay, p_local, b_A, at, o_v, m_state, o_state, i_chunk, n_chunk, EARLY: tl.constexpr,
              form: tl.constexpr):  # fmt: skip
    """The state before a chunk: the initial one, or nothing; then, in order, what the chunks before it left."""
    ROWS: tl.constexpr = form.H * form.P
    b_h = tl.zeros(b_A.shape, b_A.dtype)
    if p_initial is not None:
        if i_chunk == 0:
            b_h = load(p_initial, o_state, m_state, b_A.dtype)
    if not form.LOCAL and p_local is not None:
        if EARLY and i_chunk > 0:
            tl.extra.cuda.gdc_wait()
        i_first = at.batch * (n_chunk - 1)
        for i in tl.range(0, i_chunk, loop_unroll_factor=4):
            o_left = (i_first + i) * ROWS + at.row
            o_whole = o_left[:, None, None] * form.N + o_v
            if form.WHOLE:
                b_log2 = load(p_decay, o_whole, m_state, b_h.dtype)
            else:
                b_log2 = load(p_decay, o_left, at.mask, b_h.dtype)[:, None, None] * b_A
            b_h = decay(b_log2, form.NARROW) * b_h + load(p_local, o_whole, m_state, b_h.dtype)
    return b_h


@triton.jit
def _elapsed(p_elapsed, e_cumsum, at, i_chunk, n_chunk, EARLY: tl.constexpr, form: tl.constexpr):
    """The sum of delta before a chunk, where it is emitted; else 0."""
    b_cumsum = tl.zeros(at.row.shape, tl.float64)
    if e_cumsum is not None and p_elapsed is not None:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        for i_earlier in range(i_chunk):
            p_whole = p_elapsed + (at.batch * (n_chunk - 1) + i_earlier) * form.H + at.head
            b_cumsum += tl.load(p_whole, mask=at.mask, other=0.0)
    return b_cumsum


@triton.jit
def _save(p_states, b_h, at, o_v, m_state, t, n_token, SEGMENT: tl.constexpr, form: tl.constexpr):
    """The state before token t, for the backward, where t begins a segment but the first."""
    if t % SEGMENT == 0 and t > 0:
        i_saved = at.batch * (tl.cdiv(n_token, SEGMENT) - 1) + t // SEGMENT - 1
        o_saved = (i_saved * (form.H * form.P) + at.row)[:, None, None] * form.N + o_v
        tl.store(p_states + o_saved, b_h, mask=m_state)


@triton.jit
def _walk(b_h, b_gone, b_cumsum, b_A, b_pair, b_BCs, given, emitted, at, kept, o_v, m_state, t, i_kept, n_token, stop,
          form: tl.constexpr):  # fmt: skip
    """A block of tokens, one after another: the state after them, what has gone by, and of each token C h and |h|^2."""
    BLOCK_T: tl.constexpr = b_pair.shape[1]
    dtype: tl.constexpr = b_h.dtype
    starts = load_starts(given, at, n_token, t, stop, BLOCK_T, dtype)
    b_delta, b_write = tl.split(b_pair)
    deltas = columns(b_delta)
    writes = columns(b_write)
    outs = ()
    energies = ()
    for j in tl.static_range(BLOCK_T // 4):
        b_four = widened(b_BCs[2 * j], form.B_dtype, dtype)
        if not form.LOCAL:  # one way through shared memory for both
            b_four = tl.join(b_four, widened(b_BCs[2 * j + 1], form.C_dtype, dtype))
        BCs = slices(b_four)
        for u in tl.static_range(4):
            if form.LOCAL:
                b_B = BCs[u]
            else:
                b_B, b_C = tl.split(BCs[u])
            b_delta_t = deltas[4 * j + u]
            b_decay, b_log2 = decay_at(b_A, b_delta_t, starts, 4 * j + u, given, at, o_v, m_state, n_token, t, stop,
                                       form)  # fmt: skip
            b_in, b_phi = write_at(b_A, b_delta_t, writes[4 * j + u], b_B, form)
            b_h = b_decay * b_h + b_in
            if form.COUNTED:
                b_cumsum += b_delta_t.to(tl.float64)
            if form.LOCAL:
                if form.WHOLE:
                    b_gone += b_log2
            else:
                outs = outs + (tl.sum(tl.sum(b_h * b_C, axis=2), axis=1),)
                if emitted.energy is not None:
                    energies = energies + (tl.sum(tl.sum(b_h * b_h, axis=2), axis=1),)
                emit_token(emitted, kept, b_cumsum, b_decay, b_delta_t, b_B, b_phi, b_h, i_kept, t, 4 * j + u, stop,
                           form.ZOH, form.KEPT_HEAD, form.P, form.N)  # fmt: skip
    return b_h, b_gone, b_cumsum, outs, energies


@triton.jit
def _answer(p_out, o_out, outs, energies, b_delta, b_skip, b_gate, emitted, kept, at, t, i_kept, stop, m_now,
            form: tl.constexpr):  # fmt: skip
    """Store the output of a block, and what is emitted of its (row, token) pairs."""
    b_y = from_columns(outs)
    if form.SKIPS:
        b_y += b_skip
    b_out = b_y
    if form.GATED:
        b_out = b_y * b_gate
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_now)
    if emitted.delta is not None or emitted.y is not None or emitted.energy is not None:
        b_energy = b_y
        if emitted.energy is not None:
            b_energy = from_columns(energies)
        emit_block(emitted, kept, at, b_delta, b_y, b_energy, i_kept, t, stop, m_now, form.KEPT_HEAD, form.P)


@triton.jit
def _leave(p_decay, p_local, p_elapsed, b_h, b_gone, b_cumsum, at, o_v, m_state, i_chunk, n_chunk,
           form: tl.constexpr):  # fmt: skip
    """Store a chunk's last state and its decay, and the sum of its delta."""
    o_left = (at.batch * (n_chunk - 1) + i_chunk) * (form.H * form.P) + at.row
    o_whole = o_left[:, None, None] * form.N + o_v
    if form.WHOLE:
        tl.store(p_decay + o_whole, b_gone, mask=m_state)
    else:
        tl.store(p_decay + o_left, bounded(tl.sum(b_gone, axis=1)), mask=at.mask)
    tl.store(p_local + o_whole, b_h, mask=m_state)
    if p_elapsed is not None:
        p_whole = p_elapsed + (at.batch * (n_chunk - 1) + i_chunk) * form.H + at.head
        tl.store(p_whole, b_cumsum, mask=at.mask & (at.row % form.P == 0))


@triton.jit
def scan_kernel(
    p_x, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_starts, p_log_decay, p_initial, p_decay, p_local, p_elapsed,
    p_out, p_last, p_token_slot, p_head_slot, e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y, e_energy, p_states,
    x_strides, delta_strides, B_strides, C_strides, z_strides,
    n_token, n_chunk, chunk, n_kept_token,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT_HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows x chunks x (batch x group). A state is (high, low), low contiguous in memory."""
    LOCAL: tl.constexpr = p_C is None
    SKIPS: tl.constexpr = p_D is not None and not LOCAL
    GATED: tl.constexpr = p_z is not None and not LOCAL
    COUNTED: tl.constexpr = p_elapsed is not None or e_cumsum is not None
    WHOLE: tl.constexpr = p_log_decay is not None or p_starts is not None  # the decay is no multiple of delta's sum
    NARROW: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    HELD: tl.constexpr = NARROW and STAGES == 1
    AHEAD: tl.constexpr = 2 if HELD else 1  # blocks; what follows a load of delta is a long chain
    form: tl.constexpr = Form(
        H, P, N, KEPT_HEAD, SOFTPLUS, MIN, MAX, ZOH, LOCAL, SKIPS, GATED, COUNTED, WHOLE, NARROW,
        p_B.dtype.element_ty, (p_B if LOCAL else p_C).dtype.element_ty, 1)  # fmt: skip
    dtype: tl.constexpr = p_A.dtype.element_ty
    given = Given(p_starts, p_log_decay)
    emitted = Emitted(e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y, e_energy, p_token_slot)
    strides = Sources(x_strides, delta_strides, B_strides, C_strides, z_strides)
    i_chunk = tl.program_id(1)
    at = program_rows(H, P, G, BLOCK_R)
    o_token = tl.arange(0, BLOCK_T)
    o_v, m_v = states_at(HIGH, LOW, N)
    m_state = at.mask[:, None, None] & m_v
    start = i_chunk * chunk
    stop = tl.minimum(start + chunk, n_token)

    b_A = bounded(load(p_A, at.head[:, None, None] * N + o_v, m_state, dtype) * LOG2E)
    o_state = (at.batch * (H * P) + at.row)[:, None, None] * N + o_v
    p = Sources(p_x, p_delta, p_B, p_B if LOCAL else p_C, p_z if GATED else p_x)
    p = _from(p, strides, at, start.to(tl.int64))
    p_out += (at.batch * n_token + start) * (H * P)
    o_x = pairs_at(at, o_token, x_strides, P)
    o_delta = pairs_at(at, o_token, delta_strides, P)
    o_z = pairs_at(at, o_token, z_strides, P)
    o_out = at.row[:, None] + o_token[None, :] * (H * P)
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + at.head, mask=at.mask, other=0.0)[:, None]
    b_D = tl.load(p_D + at.row, mask=at.mask, other=0.0)[:, None] if SKIPS else tl.zeros((1, 1), dtype)
    kept = slots(p_head_slot, at, o_v, m_v, P, N)
    i_kept = at.batch * n_kept_token + (start if p_token_slot is None else 0)  # of the block's first token
    b_cumsum = _elapsed(p_elapsed, e_cumsum, at, i_chunk, n_chunk, EARLY, form)
    b_gone = tl.zeros((BLOCK_R, HIGH, LOW) if WHOLE else (BLOCK_R, BLOCK_T), dtype)  # where LOCAL: log2 decay, or delta
    if EARLY and LOCAL:
        tl.extra.cuda.gdc_launch_dependents()

    # the first block; what is loaded in the loop belongs to the next
    m_next = masked(at, start, stop, BLOCK_T)
    n_x, n_delta, n_z = _fetch(p, o_x, o_delta, o_z, m_next, m_next, form)
    b_delta, b_pair, b_skip, b_gate = _ready(n_x, n_delta, n_z, b_bias, b_D, m_next, form)
    b_BCs = load_states(p.B, p.C, B_strides, C_strides, o_v, m_v, start, stop, BLOCK_T, not LOCAL, HELD)
    if HELD:
        p = Sources(p.x, p.delta + BLOCK_T * delta_strides[1], p.B, p.C, p.z)
        n_delta = tl.load(p.delta + o_delta, mask=masked(at, start + BLOCK_T, stop, BLOCK_T), other=0.0)
    b_h = _entering(p_initial, p_decay, p_local, b_A, at, o_v, m_state, o_state, i_chunk, n_chunk, EARLY, form)

    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        if p_states is not None:
            _save(p_states, b_h, at, o_v, m_state, t, n_token, SEGMENT, form)
        m_now = m_next
        p = _after(p, strides, BLOCK_T)
        m_next = masked(at, t + BLOCK_T, stop, BLOCK_T)
        n_BCs = load_states(p.B, p.C, B_strides, C_strides, o_v, m_v, t + BLOCK_T, stop, BLOCK_T, not LOCAL, HELD)
        b_due = n_delta
        m_ahead = masked(at, t + AHEAD * BLOCK_T, stop, BLOCK_T)
        n_x, n_delta, n_z = _fetch(p, o_x, o_delta, o_z, m_next, m_ahead, form)
        b_h, b_gone, b_cumsum, outs, energies = _walk(
            b_h, b_gone, b_cumsum, b_A, b_pair, b_BCs, given, emitted, at, kept, o_v, m_state, t, i_kept, n_token, stop,
            form)  # fmt: skip
        if not LOCAL:
            _answer(p_out, o_out, outs, energies, b_delta, b_skip, b_gate, emitted, kept, at, t, i_kept, stop, m_now,
                    form)  # fmt: skip
            p_out += BLOCK_T * (H * P)
            if p_token_slot is None:
                i_kept += BLOCK_T
        elif not WHOLE:
            b_gone += b_delta
        b_delta, b_pair, b_skip, b_gate = _ready(n_x, b_due if HELD else n_delta, n_z, b_bias, b_D, m_next, form)
        b_BCs = n_BCs

    if LOCAL:
        _leave(p_decay, p_local, p_elapsed, b_h, b_gone, b_cumsum, at, o_v, m_state, i_chunk, n_chunk, form)
    elif i_chunk == n_chunk - 1:
        tl.store(p_last + o_state, b_h, mask=m_state)
