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

import triton
import triton.language as tl

from mamba_probe.kernels.scan.elementwise import LOG2E, decay, phi1, silu, step_size
from mamba_probe.kernels.scan.rows import columns, from_columns, slices

__all__ = ["scan_kernel"]


@triton.jit
def _load(p, o, mask, dtype: tl.constexpr):
    return tl.load(p + o, mask=mask, other=0.0).to(dtype)


@triton.jit
def _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t, stop, BLOCK_T: tl.constexpr,
                 HELD: tl.constexpr):  # fmt: skip
    """B and C of BLOCK_T tokens from t on, where the pointers point: of every 4, tiles (4, high, low), as `_held`."""
    tiles = ()
    for j in tl.static_range(BLOCK_T // 4):
        o_four = 4 * j + tl.arange(0, 4)
        mask = (t + o_four < stop)[:, None, None] & m_v
        b_B = tl.load(p_B + o_four[:, None, None] * B_strides[1] + o_v * B_strides[3], mask=mask, other=0.0)
        b_C = b_B
        if p_C is not None:
            b_C = tl.load(p_C + o_four[:, None, None] * C_strides[1] + o_v * C_strides[3], mask=mask, other=0.0)
        tiles = tiles + (_held(b_B, HELD), _held(b_C, HELD))
    return tiles


@triton.jit
def _held(tile, HELD: tl.constexpr):
    """A tile (4, high, low) as it waits for its turn. Of 16-bit numbers in registers, two are HELD in one: those that
    are widened take a register each, and the widening would wait for the load."""
    if tile.dtype.primitive_bitwidth != 16:
        return tile
    elif HELD and tile.shape[2] > 1:
        pairs = tl.reshape(tile.to(tl.uint16, bitcast=True), tile.shape[:2] + (tile.shape[2] // 2, 2))
        first, second = tl.split(pairs)
        return first.to(tl.uint32) | (second.to(tl.uint32) << 16)
    else:
        return tile.to(tl.float32)


@triton.jit
def _widened(tile, element: tl.constexpr, dtype: tl.constexpr):
    """The tile (4, high, low) that is `_held`, in the compute dtype."""
    if tile.dtype == tl.uint32:
        first = (tile & 0xFFFF).to(tl.uint16).to(element, bitcast=True).to(dtype)
        second = (tile >> 16).to(tl.uint16).to(element, bitcast=True).to(dtype)
        return tl.reshape(tl.join(first, second), tile.shape[:2] + (2 * tile.shape[2],))
    else:
        return tile.to(dtype)


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
def _pairs(b_raw, b_x, b_bias, mask, SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr):
    """Of a block, by (row, token): delta, and delta beside delta x."""
    b_delta = tl.where(mask, step_size(b_raw + b_bias, SOFTPLUS, MIN, MAX), 0.0)
    return b_delta, tl.join(b_delta, b_delta * b_x)


@triton.jit
def _skip_and_gate(b_x, b_D, b_z, NARROW: tl.constexpr):
    """D x and silu(z), by (row, token); anything where there is no D or z."""
    b_skip = b_x
    b_gate = b_x
    if b_D is not None:
        b_skip = b_x * b_D
    if b_z is not None:
        b_gate = silu(b_z.to(b_x.dtype), NARROW)
    return b_skip, b_gate


@triton.jit
def _entering(b_h, b_A, p_decay, p_local, i_first, i_chunk, o_row, o_v, m_row, m_state, ROWS: tl.constexpr,
              N: tl.constexpr, WHOLE: tl.constexpr, NARROW: tl.constexpr):  # fmt: skip
    """The state before a chunk, from what the chunks before it left."""
    for i in tl.range(0, i_chunk, loop_unroll_factor=4):
        o_left = (i_first + i) * ROWS + o_row
        o_whole = o_left[:, None, None] * N + o_v
        if WHOLE:
            b_log2 = _load(p_decay, o_whole, m_state, b_h.dtype)
        else:
            b_log2 = _load(p_decay, o_left, m_row, b_h.dtype)[:, None, None] * b_A
        b_h = decay(b_log2, NARROW) * b_h + _load(p_local, o_whole, m_state, b_h.dtype)
    return b_h


@triton.jit
def _emit_token(e_cumsum, e_A_bar, e_B_bar, e_h, p_token_slot, b_cumsum, b_decay, b_B_bar, b_h, i_kept, t, u, stop,
                b_slot, o_slot, o_h, m_head, m_kept, m_v,
                KEPT_HEAD: tl.constexpr, P: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """What is asked for of token t + u, the block's u-th."""
    m_token = b_slot * 0 + (t + u) < stop  # a tile: the interpreter needs one
    i_head = i_kept * KEPT_HEAD + u * KEPT_HEAD
    if p_token_slot is not None:
        i_slot = tl.load(p_token_slot + tl.minimum(t + u, stop - 1))
        m_token = m_token & (b_slot * 0 + i_slot >= 0)
        i_head = (i_kept + i_slot) * KEPT_HEAD
    m_slot = (m_head & m_token)[:, None, None] & m_v
    if e_cumsum is not None:
        tl.store(e_cumsum + i_head + b_slot, b_cumsum, mask=m_head & m_token)
    if e_A_bar is not None:
        tl.store(e_A_bar + i_head * N + o_slot, b_decay.to(e_A_bar.dtype.element_ty), mask=m_slot)
    if e_B_bar is not None:
        tl.store(e_B_bar + i_head * N + o_slot, b_B_bar.to(e_B_bar.dtype.element_ty), mask=m_slot)
    if e_h is not None:
        m_h = (m_kept & m_token)[:, None, None] & m_v
        tl.store(e_h + i_head * (P * N) + o_h, b_h.to(e_h.dtype.element_ty), mask=m_h)


@triton.jit
def _emit_block(e_delta, e_y, e_energy, p_token_slot, b_delta, b_y, b_energy, i_kept, t, stop, o_token, o_row, b_slot,
                mask, KEPT_HEAD: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """What is asked for of a block's (row, token) pairs."""
    i_head = i_kept * KEPT_HEAD
    o_kept = o_token[None, :] * KEPT_HEAD
    if p_token_slot is not None:
        b_token = tl.load(p_token_slot + t + o_token, mask=t + o_token < stop, other=-1)
        mask = mask & (b_token >= 0)[None, :]
        o_kept = b_token.to(tl.int64)[None, :] * KEPT_HEAD
    o_pair = o_kept + b_slot[:, None]
    o_channel = o_pair * P + (o_row % P)[:, None]
    if e_delta is not None:
        tl.store(e_delta + i_head + o_pair, b_delta, mask=mask & (o_row % P == 0)[:, None])
    if e_y is not None:
        tl.store(e_y + i_head * P + o_channel, b_y, mask=mask)
    if e_energy is not None:
        tl.store(e_energy + i_head * P + o_channel, b_energy, mask=mask)


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
    GATED: tl.constexpr = p_z is not None and not LOCAL
    WHOLE: tl.constexpr = p_log_decay is not None or p_starts is not None  # the decay is no multiple of delta's sum
    NARROW: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    HELD: tl.constexpr = NARROW and STAGES == 1
    AHEAD: tl.constexpr = 2 if HELD else 1  # blocks; what follows a load of delta is a long chain
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
    b_D = None
    if p_D is not None and not LOCAL:
        b_D = tl.load(p_D + o_row, mask=m_row, other=0.0)[:, None]
    if GATED:
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
    b_cumsum = None
    if p_elapsed is not None or e_cumsum is not None:
        b_cumsum = tl.zeros((BLOCK_R,), tl.float64)
        if e_cumsum is not None and p_elapsed is not None:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            for i_earlier in range(i_chunk):
                p_whole = p_elapsed + (i_batch * (n_chunk - 1) + i_earlier) * H + o_head
                b_cumsum += tl.load(p_whole, mask=m_row, other=0.0)
    if LOCAL:
        if not WHOLE:
            b_elapsed = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        else:
            b_whole = tl.zeros((BLOCK_R, HIGH, LOW), dtype)

    if EARLY and LOCAL:
        tl.extra.cuda.gdc_launch_dependents()

    # the first block; what is loaded in the loop belongs to the next
    m_next = m_row[:, None] & (start + o_token < stop)[None, :]
    b_x = _load(p_x, o_x, m_next, dtype)
    b_first = _load(p_delta, o_delta, m_next, dtype)
    b_delta, b_pair = _pairs(b_first, b_x, b_bias, m_next, SOFTPLUS, MIN, MAX)
    b_BCs = _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, start, stop, BLOCK_T, HELD)
    if HELD:
        p_delta += BLOCK_T * delta_strides[1]
        b_raw = tl.load(p_delta + o_delta, mask=m_row[:, None] & (start + BLOCK_T + o_token < stop)[None, :], other=0.0)
    b_z = None
    if GATED:
        b_z = _load(p_z, o_z, m_next, dtype)
    b_skip, b_gate = _skip_and_gate(b_x, b_D, b_z, NARROW)

    # what the chunks before this one left
    b_h = tl.zeros((BLOCK_R, HIGH, LOW), dtype)
    if p_initial is not None:
        if i_chunk == 0:
            b_h = _load(p_initial, o_state, m_state, dtype)
    if not LOCAL and p_local is not None:
        if EARLY and i_chunk > 0:
            tl.extra.cuda.gdc_wait()
        b_h = _entering(b_h, b_A, p_decay, p_local, i_batch * (n_chunk - 1), i_chunk, o_row, o_v, m_row, m_state,
                        H * P, N, WHOLE, NARROW)  # fmt: skip

    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        m_now = m_next
        if p_states is not None:
            if t % SEGMENT == 0 and t > 0:
                i_saved = i_batch * (tl.cdiv(n_token, SEGMENT) - 1) + t // SEGMENT - 1
                tl.store(p_states + (i_saved * (H * P) + o_row)[:, None, None] * N + o_v, b_h, mask=m_state)
        m_next = m_row[:, None] & (t + BLOCK_T + o_token < stop)[None, :]
        p_B += BLOCK_T * B_strides[1]
        if p_C is not None:
            p_C += BLOCK_T * C_strides[1]
        n_BCs = _load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t + BLOCK_T, stop, BLOCK_T, HELD)
        p_x += BLOCK_T * x_strides[1]
        p_delta += BLOCK_T * delta_strides[1]
        n_x = tl.load(p_x + o_x, mask=m_next, other=0.0)
        m_after = m_row[:, None] & (t + AHEAD * BLOCK_T + o_token < stop)[None, :]
        n_raw = tl.load(p_delta + o_delta, mask=m_after, other=0.0)
        n_z = None
        if GATED:
            p_z += BLOCK_T * z_strides[1]
            n_z = tl.load(p_z + o_z, mask=m_next, other=0.0)
        if p_starts is not None:
            p_start = p_starts + i_batch * n_token + t + o_token
            b_starts = tl.load(p_start, mask=t + o_token < stop, other=0).to(dtype)
            starts = columns(tl.broadcast_to(b_starts[None, :], (BLOCK_R, BLOCK_T)))
        b_now, b_write = tl.split(b_pair)
        deltas = columns(b_now)
        writes = columns(b_write)
        outs = ()
        energies = ()
        for j in tl.static_range(BLOCK_T // 4):
            b_both = _widened(b_BCs[2 * j], p_B.dtype.element_ty, dtype)
            if p_C is not None:  # one way through shared memory for both
                b_both = tl.join(b_both, _widened(b_BCs[2 * j + 1], p_C.dtype.element_ty, dtype))
            BCs = slices(b_both)
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
                    if WHOLE:
                        b_whole += b_log2
                else:
                    outs = outs + (tl.sum(tl.sum(b_h * b_C, axis=2), axis=1),)
                    if e_energy is not None:
                        energies = energies + (tl.sum(tl.sum(b_h * b_h, axis=2), axis=1),)
                    if e_A_bar is not None or e_B_bar is not None or e_h is not None or e_cumsum is not None:
                        b_B_bar = b_delta_t[:, None, None] * b_B
                        if ZOH:
                            b_B_bar *= b_phi
                        _emit_token(e_cumsum, e_A_bar, e_B_bar, e_h, p_token_slot, b_cumsum, b_decay, b_B_bar, b_h,
                                    i_kept, t, 4 * j + u, stop, b_slot, o_slot, o_h, m_head, m_kept, m_v,
                                    KEPT_HEAD, P, N)  # fmt: skip
        if LOCAL:
            if not WHOLE:
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
                b_energy = b_y
                if e_energy is not None:
                    b_energy = from_columns(energies)
                _emit_block(e_delta, e_y, e_energy, p_token_slot, b_delta, b_y, b_energy, i_kept, t, stop, o_token,
                            o_row, b_slot, m_now & m_kept[:, None], KEPT_HEAD, P)  # fmt: skip
            if p_token_slot is None:
                i_kept += BLOCK_T
        b_x = n_x.to(dtype)
        b_due = n_raw
        if HELD:
            b_due = b_raw
            b_raw = n_raw
        b_delta, b_pair = _pairs(b_due.to(dtype), b_x, b_bias, m_next, SOFTPLUS, MIN, MAX)
        b_BCs = n_BCs
        b_skip, b_gate = _skip_and_gate(b_x, b_D, n_z, NARROW)

    if LOCAL:
        o_left = (i_batch * (n_chunk - 1) + i_chunk) * (H * P) + o_row
        o_whole = o_left[:, None, None] * N + o_v
        if WHOLE:
            tl.store(p_decay + o_whole, b_whole, mask=m_state)
        else:
            tl.store(p_decay + o_left, tl.sum(b_elapsed, axis=1), mask=m_row)
        tl.store(p_local + o_whole, b_h, mask=m_state)
        if p_elapsed is not None:
            p_whole = p_elapsed + (i_batch * (n_chunk - 1) + i_chunk) * H + o_head
            tl.store(p_whole, b_cumsum, mask=m_row & (o_row % P == 0))
    else:
        if i_chunk == n_chunk - 1:
            tl.store(p_last + o_state, b_h, mask=m_state)
