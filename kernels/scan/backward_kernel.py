"""The kernel of the backward of `fused`, and its pieces: A (head, state), real.

A program keeps g = dL/dh of BLOCK_R rows (of one group and one batch item) in registers and walks back over the tokens of
one chunk, BLOCK_T at a time. States come again from the saved ones, one every SEGMENT tokens: a segment is walked forward
once, leaving its state every BLOCK_T tokens in the program's own scratch, and then block by block backward; a block's
states are in registers. dB and dC are sums over rows: one partial a program, summed later.

    dy_t = dout_t silu(z_t) (+ upstream of y)           g_t = C_t dy_t + A_bar_{t+1} g_{t+1} (+ upstream of h_t)
    dC_t = sum over rows of dy_t h_t                    dB_t = sum over rows of g_t delta_t x_t
    u_t  = sum_n g_t B_t                                dx_t = delta_t u_t + D dy_t
    q_t  = A_bar_t (g_t h_{t-1} + upstream of A_bar_t)  dA = sum_t delta_t q_t;  d log_decay_t = q_t
    ddelta_t = x_t u_t + sum_n A q_t (+ upstream), then through limits and softplus

Without d_x it is LOCAL: g from nothing, of every chunk but the first; it leaves A_bar_start g_start and the chunk's decay.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.elementwise import LOG2E, LN2, _exp, decay, phi1, step_size
from mamba_probe.kernels.scan.fused_kernel import _load, _load_states, _widened
from mamba_probe.kernels.scan.rows import columns

__all__ = ["backward_kernel"]


@triton.jit
def _step_slope(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """d step_size / d raw; at a limit itself 1, as torch's."""
    slope = tl.full(raw.shape, 1.0, raw.dtype)
    value = raw
    if SOFTPLUS:
        e = _exp(-tl.abs(raw))
        slope = tl.where(raw > 20.0, 1.0, tl.where(raw < 0.0, e, 1.0) / (1.0 + e))
        if LOW > 0.0 or HIGH != float("inf"):
            value = step_size(raw, SOFTPLUS, 0.0, float("inf"))
    if not SOFTPLUS or LOW > 0.0 or HIGH != float("inf"):
        slope = tl.where(
            (value >= tl.full((1, 1), LOW, raw.dtype)) & (value <= tl.full((1, 1), HIGH, raw.dtype)), slope, 0.0
        )
    return slope


@triton.jit
def _gates(z):
    """silu(z) and its derivative."""
    e = _exp(-tl.abs(z))
    scale = 1.0 / (1.0 + e)
    one = tl.where(z < 0.0, e, 1.0) * scale
    other = tl.where(z < 0.0, 1.0, e) * scale
    return z * one, one * (1.0 + z * other)


@triton.jit
def _fetch(p_x, p_delta, p_z, g_out, g_y, p_token_slot, o_x, o_delta, o_z, o_up, o_kept, x_stride, delta_stride, z_stride,
           out_stride, i_kept, t, start, stop, o_token, m_row, m_kept, KEPT: tl.constexpr):  # fmt: skip
    """Of the block of tokens from t on, as they lie in memory: x, delta, z, and the gradients of the output and of y."""
    m = m_row[:, None] & ((t + o_token < stop) & (t + o_token >= start))[None, :]
    i_t = t.to(tl.int64)
    n_delta = tl.load(p_delta + i_t * delta_stride + o_delta, mask=m, other=0.0)
    n_x = n_delta
    n_z = n_delta
    n_out = n_delta
    n_y = n_delta
    if p_x is not None:
        n_x = tl.load(p_x + i_t * x_stride + o_x, mask=m, other=0.0)
    if p_z is not None:
        n_z = tl.load(p_z + i_t * z_stride + o_z, mask=m, other=0.0)
    if g_out is not None:
        n_out = tl.load(g_out + i_t * out_stride + o_up, mask=m, other=0.0)
    if g_y is not None:
        b_token = t + o_token
        m = m & m_kept[:, None]
        if p_token_slot is not None:
            b_token = tl.load(p_token_slot + t + o_token, mask=(t + o_token < stop) & (t + o_token >= start), other=-1)
            m = m & (b_token >= 0)[None, :]
        n_y = tl.load(g_y + (i_kept + b_token)[None, :] * KEPT + o_kept[:, None], mask=m, other=0.0)
    return n_x, n_delta, n_z, n_out, n_y


@triton.jit
def _ready(n_x, n_delta, n_z, n_out, n_y, p_z, g_out, g_y, b_bias, t, start, stop, o_token, m_row, dtype: tl.constexpr,
           SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr):  # fmt: skip
    """Of that block, in the compute dtype: x, delta, delta x, dy, delta's slope, and what times y is dz."""
    m = m_row[:, None] & ((t + o_token < stop) & (t + o_token >= start))[None, :]
    b_raw = n_delta.to(dtype) + b_bias
    b_x = n_x.to(dtype)
    b_delta = tl.where(m, step_size(b_raw, SOFTPLUS, MIN, MAX), 0.0)
    b_slope = tl.where(m, _step_slope(b_raw, SOFTPLUS, MIN, MAX), 0.0)
    b_dy = tl.zeros(b_x.shape, dtype)
    b_dz = b_dy
    if g_out is not None:
        b_dy = n_out.to(dtype)
        if p_z is not None:
            b_gate, b_gate_slope = _gates(n_z.to(dtype))
            b_dz = b_dy * b_gate_slope
            b_dy *= b_gate
    if g_y is not None:
        b_dy += n_y.to(dtype)
    return b_x, b_delta, b_delta * b_x, b_dy, b_slope, b_dz


@triton.jit
def _phi1_slope(z, exp_z, phi):
    """phi1'(z) = (exp(z) - phi1(z)) / z, by its series near 0."""
    near = tl.abs(z) < 0.5
    s = tl.where(near, z, 0.0)
    series = 1.0 + s * 0.0
    for k in tl.static_range(15, 0, -1):
        series = 1.0 + s * ((k + 1.0) / (k * (k + 2.0))) * series
    return tl.where(near, 0.5 * series, (exp_z - phi) / tl.where(near, 1.0, z))


@triton.jit
def _decay_of(b_A, b_delta, b_log, b_start, NARROW: tl.constexpr):
    """A_bar of a token and its log2."""
    b_log2 = b_delta[None, :, None] * b_A if b_log is None else b_log * LOG2E
    b_decay = decay(b_log2, NARROW)
    if b_start is not None:
        b_begins = (b_start > 0.5)[None, :, None]
        b_decay = tl.where(b_begins, 0.0, b_decay)
        b_log2 = tl.where(b_begins, -float("inf"), b_log2)
    return b_decay, b_log2


@triton.jit
def _log_of(p_log_decay, i_first, t, stop, o_head, o_v, m_state, H: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr):
    b_log = None
    if p_log_decay is not None:
        o_log = ((i_first + t) * H + o_head)[None, :, None] * N + o_v
        b_log = _load(p_log_decay, o_log, m_state & (o_head * 0 + t < stop)[None, :, None], dtype)
    return b_log


@triton.jit
def _starts_of(p_starts, i_first, t, stop, o_token, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    b_starts = tl.load(p_starts + i_first + t + o_token, mask=t + o_token < stop, other=0).to(dtype)
    return columns(tl.broadcast_to(b_starts[None, :], (BLOCK_R, o_token.shape[0])))


@triton.jit
def _written(b_A, b_delta, b_write, b_B, ZOH: tl.constexpr):
    b_in = b_write[None, :, None] * b_B
    if ZOH:
        b_z = b_delta[None, :, None] * b_A * LN2
        b_in *= phi1(b_z, tl.exp2(b_z * LOG2E))
    return b_in


@triton.jit
def _upstream(p, i_item, b_slot, b_token, N: tl.constexpr, o_v, m, dtype: tl.constexpr):
    """Of one token, (row, high, low): the gradient of an emitted A_bar, B_bar or h; 0 where it was not emitted."""
    return _load(p, ((i_item + b_token) + b_slot)[None, :, None] * N + o_v, m, dtype)


@triton.jit
def _fetch_write(p_x, p_delta, o_x, o_delta, x_stride, delta_stride, t, stop, o_token, m_row):
    """x and delta of the block of tokens from t on."""
    m = m_row[:, None] & (t + o_token < stop)[None, :]
    i_t = t.to(tl.int64)
    n_x = tl.load(p_x + i_t * x_stride + o_x, mask=m, other=0.0)
    return n_x, tl.load(p_delta + i_t * delta_stride + o_delta, mask=m, other=0.0)


@triton.jit
def _written_of(n_x, n_delta, b_bias, t, stop, o_token, m_row, dtype: tl.constexpr, SOFTPLUS: tl.constexpr,
                MIN: tl.constexpr, MAX: tl.constexpr):  # fmt: skip
    """delta beside delta x, by (row, token)."""
    m = m_row[:, None] & (t + o_token < stop)[None, :]
    b_delta = tl.where(m, step_size(n_delta.to(dtype) + b_bias, SOFTPLUS, MIN, MAX), 0.0)
    return tl.join(b_delta, b_delta * n_x.to(dtype))


@triton.jit
def _few_rows(tile, WARPS: tl.constexpr):
    """Sum over rows of one thread: (high, as many rows as there are threads for, low)."""
    LANES: tl.constexpr = 32 * WARPS // tile.shape[0] if tile.shape[0] < 32 * WARPS else 1
    if tile.shape[1] > LANES:
        tile = tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // LANES, LANES, tile.shape[2])), axis=1)
    return tile


@triton.jit
def _folded(t0, t1, t2, t3):
    """Of 4 tokens, each (high, rows, low, 2), the sums over rows: (high, low, 2, 4). Halves move, not copies."""
    both = tl.join(tl.join(t0, t2), tl.join(t1, t3))  # (high, rows, low, 2, 2, 2)
    HIGH: tl.constexpr = t0.shape[0]
    ROWS: tl.constexpr = t0.shape[1]
    LOW: tl.constexpr = t0.shape[2]
    both = tl.reshape(tl.permute(both, (0, 2, 3, 4, 5, 1)), (HIGH, LOW, 2, 4, ROWS))
    for i in tl.static_range(6):
        if both.shape[4] > 1:
            first, second = tl.split(tl.reshape(both, (HIGH, LOW, 2, 4, both.shape[4] // 2, 2)))
            both = first + second
    return tl.reshape(both, (HIGH, LOW, 2, 4))


@triton.jit
def _of_states(t0, t1, t2, t3):
    """Of 4 tokens, each (high, row), the sums over states: (row, 4)."""
    HIGH: tl.constexpr = t0.shape[0]
    ROWS: tl.constexpr = t0.shape[1]
    both = tl.join(tl.join(t0, t2), tl.join(t1, t3))
    both = tl.reshape(tl.permute(both, (1, 2, 3, 0)), (ROWS, 4, HIGH))
    for i in tl.static_range(6):
        if both.shape[2] > 1:
            first, second = tl.split(tl.reshape(both, (ROWS, 4, both.shape[2] // 2, 2)))
            both = first + second
    return tl.reshape(both, (ROWS, 4))


@triton.jit
def _summed(t):
    """Tokens, 4 or 8 or 16, each (high, row), summed over states: (row, token)."""
    if len(t) == 4:
        return _of_states(t[0], t[1], t[2], t[3])
    else:
        n: tl.constexpr = len(t) // 2
        both = tl.join(_summed(t[:n]), _summed(t[n:]))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (both.shape[0], 2 * n))


@triton.jit
def _tokens4(tile):
    """(4, high, low, ...) -> the 4 tokens, each (high, 1, low, ...)."""
    if len(tile.shape) == 3:
        tile = tl.reshape(tl.permute(tile, (1, 2, 0)), tile.shape[1:] + (2, 2))
    else:
        tile = tl.reshape(tl.permute(tile, (1, 2, 3, 0)), tile.shape[1:] + (2, 2))
    even, odd = tl.split(tile)
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0[:, None], t1[:, None], t2[:, None], t3[:, None]


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
    GATED: tl.constexpr = p_z is not None
    WHOLE: tl.constexpr = p_log_decay is not None or p_starts is not None  # the decay is no multiple of delta's sum
    NARROW: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    ROWS: tl.constexpr = H // G * P
    N_BLOCK: tl.constexpr = SEGMENT // BLOCK_T
    dtype: tl.constexpr = p_A.dtype.element_ty
    B_dtype: tl.constexpr = p_B.dtype.element_ty
    C_dtype: tl.constexpr = p_C.dtype.element_ty
    i_chunk = tl.program_id(1)
    if LOCAL:
        i_chunk += 1
    i_batch = (tl.program_id(2) // G).to(tl.int64)
    i_group = tl.program_id(2) % G
    o_local = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row = i_group * ROWS + o_local
    o_head = o_row // P
    o_token = tl.arange(0, BLOCK_T)
    o_v = tl.arange(0, HIGH)[:, None, None] * LOW + tl.arange(0, LOW)[None, None, :]
    o_w = tl.arange(0, HIGH)[None, :, None] * LOW + tl.arange(0, LOW)[None, None, :]  # of a tile (token, high, low)
    m_w = o_w < N if N < HIGH * LOW else tl.full((1, HIGH, LOW), True, tl.int1)
    m_row = o_local < ROWS if ROWS % BLOCK_R else tl.full((BLOCK_R,), True, tl.int1)
    m_v = o_v < N if N < HIGH * LOW else tl.full((HIGH, 1, LOW), True, tl.int1)
    m_state = m_row[None, :, None] & m_v
    start = i_chunk * chunk
    stop = tl.minimum(start + chunk, n_token)
    i_first = i_batch * n_token  # of this batch item's first token

    b_A = _load(p_A, o_head[None, :, None] * N + o_v, m_state, dtype) * LOG2E
    o_state = (i_batch * (H * P) + o_row)[None, :, None] * N + o_v
    p_x += i_batch * x_strides[0]
    p_delta += i_batch * delta_strides[0]
    p_B += i_batch * B_strides[0] + i_group * B_strides[2]
    p_C += i_batch * C_strides[0] + i_group * C_strides[2]
    o_x = (o_head.to(tl.int64) * x_strides[2] + o_row % P * x_strides[3])[:, None] + o_token[None, :] * x_strides[1]
    o_delta = (o_head.to(tl.int64) * delta_strides[2])[:, None] + o_token[None, :] * delta_strides[1]
    o_out = o_row[:, None] + o_token[None, :] * (H * P)
    if g_out is not None:
        g_out += i_batch * out_strides[0]
        o_up = (o_head.to(tl.int64) * out_strides[2] + o_row % P * out_strides[3])[:, None]
        o_up += o_token[None, :] * out_strides[1]
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_head, mask=m_row, other=0.0)[:, None]
    b_D = None
    if p_D is not None:
        b_D = tl.load(p_D + o_row, mask=m_row, other=0.0)[:, None]
    if GATED:
        p_z += i_batch * z_strides[0]
        o_z = (o_head.to(tl.int64) * z_strides[2] + o_row % P * z_strides[3])[:, None] + o_token[None, :] * z_strides[1]
    b_slot = o_head
    m_kept = m_row
    if p_head_slot is not None:
        b_slot = tl.load(p_head_slot + o_head, mask=m_row, other=-1)
        m_kept = m_row & (b_slot >= 0)
    m_head = m_kept & (o_row % P == 0)
    i_kept = i_batch * n_kept_token

    # what the chunks after this one leave
    b_g = tl.zeros((HIGH, BLOCK_R, LOW), dtype)
    if not LOCAL:
        if g_last is not None:
            b_g = _load(g_last, o_state, m_state, dtype)
        if p_local is not None:
            for i in range(n_chunk - 1 - i_chunk):
                o_whole = ((i_batch * (n_chunk - 1) + n_chunk - 2 - i) * (H * P) + o_row)[None, :, None] * N + o_v
                b_g = decay(_load(p_decay, o_whole, m_state, dtype), NARROW) * b_g
                b_g += _load(p_local, o_whole, m_state, dtype)
        b_dA = tl.zeros((HIGH, BLOCK_R, LOW), dtype)
        b_dD = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        b_dbias = tl.zeros((BLOCK_R, BLOCK_T), dtype)
        i_program = ((tl.program_id(2) * n_chunk + i_chunk) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        if p_scratch is not None:
            p_scratch += i_program * (N_BLOCK * BLOCK_R * HIGH * LOW)
        o_scratch = tl.arange(0, BLOCK_R)[None, :, None] * (HIGH * LOW) + o_v
    if LOCAL:
        b_whole = tl.zeros((HIGH, BLOCK_R, LOW), dtype)
        b_elapsed = tl.zeros((BLOCK_R, BLOCK_T), dtype)

    if g_out is None:
        o_up = o_delta
    if not GATED:
        o_z = o_delta
    t = start + (tl.cdiv(stop - start, BLOCK_T) - 1) * BLOCK_T
    n_x, n_delta, n_z, n_out, n_y = _fetch(
        None if LOCAL else p_x, p_delta, p_z, g_out, g_y, p_token_slot, o_x, o_delta, o_z, o_up, b_slot * P + o_row % P,
        x_strides[1], delta_strides[1], z_strides[1], out_strides[1], i_kept, t, start, stop, o_token, m_row, m_kept,
        KEPT_HEAD * P)  # fmt: skip
    b_x, b_delta, b_write, b_dy, b_slope, b_dz = _ready(
        n_x,
        n_delta,
        n_z,
        n_out,
        n_y,
        p_z,
        g_out,
        g_y,
        b_bias,
        t,
        start,
        stop,
        o_token,
        m_row,
        dtype,
        SOFTPLUS,
        MIN,
        MAX,
    )
    b_BCs = _load_states(p_B + t.to(tl.int64) * B_strides[1], p_C + t.to(tl.int64) * C_strides[1], B_strides, C_strides,
                         o_w, m_w, t, stop, BLOCK_T, False)  # fmt: skip

    n_segment = tl.cdiv(stop - start, SEGMENT)
    for i_back in range(n_segment):
        first = start + (n_segment - 1 - i_back) * SEGMENT
        n_block = tl.minimum(tl.cdiv(stop - first, BLOCK_T), N_BLOCK)
        if not LOCAL:
            b_h0 = tl.zeros((HIGH, BLOCK_R, LOW), dtype)
            if first == 0:
                if p_initial is not None:
                    b_h0 = _load(p_initial, o_state, m_state, dtype)
            if p_states is not None:
                if first > 0:
                    i_state = i_batch * (tl.cdiv(n_token, SEGMENT) - 1) + first // SEGMENT - 1
                    b_h0 = _load(p_states, (i_state * (H * P) + o_row)[None, :, None] * N + o_v, m_state, dtype)
            if N_BLOCK > 1:
                f_x, f_delta = _fetch_write(p_x, p_delta, o_x, o_delta, x_strides[1], delta_strides[1], first, stop, o_token,
                                            m_row)  # fmt: skip
                b_pair = _written_of(f_x, f_delta, b_bias, first, stop, o_token, m_row, dtype, SOFTPLUS, MIN, MAX)
                b_Bs = _load_states(p_B + first.to(tl.int64) * B_strides[1], None, B_strides, B_strides, o_w, m_w, first,
                                    stop, BLOCK_T, False)  # fmt: skip
                tl.debug_barrier()
                for i_block in tl.range(0, n_block - 1, num_stages=STAGES):
                    tl.store(p_scratch + i_block * (BLOCK_R * HIGH * LOW) + o_scratch, b_h0)
                    t = first + i_block * BLOCK_T
                    n_t = t + BLOCK_T
                    f_x, f_delta = _fetch_write(p_x, p_delta, o_x, o_delta, x_strides[1], delta_strides[1], n_t, stop,
                                                o_token, m_row)  # fmt: skip
                    n_Bs = _load_states(p_B + n_t.to(tl.int64) * B_strides[1], None, B_strides, B_strides, o_w, m_w, n_t,
                                        stop, BLOCK_T, False)  # fmt: skip
                    if p_starts is not None:
                        starts = _starts_of(p_starts, i_first, t, stop, o_token, BLOCK_R, dtype)
                    b_now, b_wrote = tl.split(b_pair)
                    deltas = columns(b_now)
                    writes = columns(b_wrote)
                    for j in tl.static_range(BLOCK_T // 4):
                        Bs = _tokens4(_widened(b_Bs[2 * j], B_dtype, dtype))
                        for u in tl.static_range(4):
                            b_log = _log_of(
                                p_log_decay, i_first, t + 4 * j + u, stop, o_head, o_v, m_state, H, N, dtype
                            )
                            b_start = None
                            if p_starts is not None:
                                b_start = starts[4 * j + u]
                            b_decay, b_log2 = _decay_of(b_A, deltas[4 * j + u], b_log, b_start, NARROW)
                            b_h0 = b_decay * b_h0 + _written(b_A, deltas[4 * j + u], writes[4 * j + u], Bs[u], ZOH)
                    b_pair = _written_of(f_x, f_delta, b_bias, n_t, stop, o_token, m_row, dtype, SOFTPLUS, MIN, MAX)
                    b_Bs = n_Bs
                tl.debug_barrier()
        else:
            b_h0 = b_g  # unused

        for i_block in tl.range(0, n_block, num_stages=STAGES):
            t = first + (n_block - 1 - i_block) * BLOCK_T
            i_t = t.to(tl.int64)
            m_now = m_row[:, None] & (t + o_token < stop)[None, :]
            n_t = t - BLOCK_T
            n_x, n_delta, n_z, n_out, n_y = _fetch(
                None if LOCAL else p_x, p_delta, p_z, g_out, g_y, p_token_slot, o_x, o_delta, o_z, o_up,
                b_slot * P + o_row % P, x_strides[1], delta_strides[1], z_strides[1], out_strides[1], i_kept, n_t, start,
                stop, o_token, m_row, m_kept, KEPT_HEAD * P)  # fmt: skip
            n_first = tl.maximum(n_t, 0).to(tl.int64)  # before the first block nothing is needed, but it must exist
            n_BCs = _load_states(p_B + n_first * B_strides[1], p_C + n_first * C_strides[1], B_strides, C_strides, o_w,
                                 m_w, tl.maximum(n_t, 0), stop, BLOCK_T, False)  # fmt: skip
            if p_starts is not None:
                starts = _starts_of(p_starts, i_first, t, stop, o_token, BLOCK_R, dtype)
            deltas = columns(b_delta)
            dys = columns(b_dy)
            if not LOCAL:
                i_part = (tl.program_id(0).to(tl.int64) * n_batch + i_batch) * n_token + t
                writes = columns(b_write)
                b_h = b_h0
                if N_BLOCK > 1:
                    o_before = tl.maximum(n_block - 2 - i_block, 0) * (BLOCK_R * HIGH * LOW)
                    b_h0 = tl.load(p_scratch + o_before + o_scratch)  # for the next round
                hs = (b_h,)
                for j in tl.static_range(BLOCK_T // 4):
                    Bs = _tokens4(_widened(b_BCs[2 * j], B_dtype, dtype))
                    for u in tl.static_range(4):
                        b_log = _log_of(p_log_decay, i_first, t + 4 * j + u, stop, o_head, o_v, m_state, H, N, dtype)
                        b_start = None
                        if p_starts is not None:
                            b_start = starts[4 * j + u]
                        b_decay, b_log2 = _decay_of(b_A, deltas[4 * j + u], b_log, b_start, NARROW)
                        b_h = b_decay * b_h + _written(b_A, deltas[4 * j + u], writes[4 * j + u], Bs[u], ZOH)
                        hs = hs + (b_h,)
            ys = ()
            us = ()
            vs = ()  # of delta x's other factor, with ZOH
            qs = ()
            for j in tl.static_range(BLOCK_T // 4 - 1, -1, -1):
                both = ()
                BCs = _tokens4(
                    tl.join(_widened(b_BCs[2 * j], B_dtype, dtype), _widened(b_BCs[2 * j + 1], C_dtype, dtype))
                )
                for u in tl.static_range(3, -1, -1):
                    b_B, b_C = tl.split(BCs[u])
                    b_dy_t = dys[4 * j + u][None, :, None]
                    b_delta_t = deltas[4 * j + u][None, :, None]
                    m_up = m_kept & (o_local * 0 + (t + 4 * j + u) < stop)
                    i_up = (i_kept + t + 4 * j + u) * KEPT_HEAD
                    if p_token_slot is not None:
                        i_slot = tl.load(p_token_slot + tl.minimum(t + 4 * j + u, n_token - 1))
                        m_up = m_up & (o_local * 0 + i_slot >= 0)
                        i_up = (i_kept + i_slot) * KEPT_HEAD
                    m_one = (m_up & (o_row % P == 0))[None, :, None] & m_v
                    b_g += b_dy_t * b_C
                    if g_h is not None:
                        o_h = ((i_up + b_slot) * P + o_row % P)[None, :, None] * N + o_v
                        b_g += _load(g_h, o_h, m_up[None, :, None] & m_v, dtype)
                    b_log = _log_of(p_log_decay, i_first, t + 4 * j + u, stop, o_head, o_v, m_state, H, N, dtype)
                    b_start = None
                    if p_starts is not None:
                        b_start = starts[4 * j + u]
                    b_decay, b_log2 = _decay_of(b_A, deltas[4 * j + u], b_log, b_start, NARROW)
                    if LOCAL:
                        if WHOLE:
                            b_whole += b_log2
                        b_g *= b_decay
                    else:
                        if GATED:
                            ys = (tl.sum(hs[4 * j + u + 1] * b_C, axis=2),) + ys
                        b_dC = _few_rows(b_dy_t * hs[4 * j + u + 1], WARPS)
                        b_gB = b_g * b_B
                        b_gw = b_g * writes[4 * j + u][None, :, None]
                        if ZOH:
                            b_zoh = b_delta_t * b_A * LN2
                            b_exp = tl.exp2(b_zoh * LOG2E)
                            b_phi = phi1(b_zoh, b_exp)
                            b_phi_slope = _phi1_slope(b_zoh, b_exp, b_phi) * b_delta_t
                            b_dA += b_gB * writes[4 * j + u][None, :, None] * b_phi_slope
                            us = (tl.sum(b_gB * b_phi, axis=2),) + us
                            vs = (tl.sum(b_gB * b_exp, axis=2),) + vs
                            b_gw *= b_phi
                        else:
                            us = (tl.sum(b_gB, axis=2),) + us
                        b_g *= b_decay
                        b_q = b_g * hs[4 * j + u]
                        if g_A_bar is not None:
                            b_q += b_decay * _load(g_A_bar, (i_up + b_slot)[None, :, None] * N + o_v, m_one, dtype)
                        b_qA = b_q * b_A
                        if p_log_decay is None:
                            b_dA += b_q * b_delta_t
                        else:
                            o_log = ((i_first + t + 4 * j + u) * (H * P) + o_row)[None, :, None] * N + o_v
                            tl.store(
                                d_log + o_log, b_q, mask=m_state & (o_local * 0 + (t + 4 * j + u) < stop)[None, :, None]
                            )
                            b_qA *= 0.0
                        if g_B_bar is not None:
                            b_up = _load(g_B_bar, (i_up + b_slot)[None, :, None] * N + o_v, m_one, dtype)
                            b_upB = b_up * b_B
                            b_up *= b_delta_t
                            if ZOH:
                                b_dA += b_upB * b_phi_slope * b_delta_t
                                b_upB *= b_exp
                                b_up *= b_phi
                            b_gw += b_up
                            b_qA += b_upB * LOG2E
                        qs = (tl.sum(b_qA, axis=2),) + qs
                        both = (tl.join(_few_rows(b_gw, WARPS), b_dC),) + both
                if not LOCAL:
                    b_both = _folded(both[0], both[1], both[2], both[3])
                    o_both = tl.arange(0, HIGH)[:, None, None, None] * LOW + tl.arange(0, LOW)[None, :, None, None]
                    o_four = 4 * j + tl.arange(0, 4)[None, None, None, :]
                    m_both = (t + o_four < stop) & (o_both < N) & (tl.arange(0, 2)[None, None, :, None] >= 0)
                    o_part = ((i_part + o_four) * G + i_group) * N + o_both
                    o_part += tl.arange(0, 2)[None, None, :, None] * (
                        tl.num_programs(0).to(tl.int64) * n_batch * n_token * G * N
                    )
                    tl.store(d_B + o_part, b_both, mask=m_both)
            if not LOCAL:
                b_u = _summed(us)
                b_v = b_u
                if ZOH:
                    b_v = _summed(vs)
                b_ddelta = b_x * b_v + _summed(qs) * LN2
                b_dx = b_delta * b_u
                if p_D is not None:
                    b_dx += b_dy * b_D
                    b_dD += b_dy * b_x
                i_out = (i_first + t) * (H * P)
                tl.store(d_x + i_out + o_out, b_dx.to(d_x.dtype.element_ty), mask=m_now)
                if GATED:
                    if g_out is not None:
                        b_y = _summed(ys)
                        if p_D is not None:
                            b_y += b_x * b_D
                        b_dz *= b_y
                    tl.store(d_z + i_out + o_out, b_dz.to(d_z.dtype.element_ty), mask=m_now)
                if g_delta is not None:
                    o_kept = (t + o_token).to(tl.int64)[None, :] * KEPT_HEAD
                    m_pair = m_now & m_kept[:, None]
                    if p_token_slot is not None:
                        b_token = tl.load(p_token_slot + t + o_token, mask=t + o_token < stop, other=-1)
                        m_pair = m_pair & (b_token >= 0)[None, :]
                        o_kept = b_token.to(tl.int64)[None, :] * KEPT_HEAD
                    o_pair = i_kept * KEPT_HEAD + o_kept + b_slot[:, None]
                    b_ddelta += _load(g_delta, o_pair, m_pair & (o_row % P == 0)[:, None], dtype)
                b_ddelta *= b_slope
                b_dbias += b_ddelta
                tl.store(d_delta + i_out + o_out, b_ddelta.to(d_delta.dtype.element_ty), mask=m_now)
            else:
                if not WHOLE:
                    b_elapsed += b_delta
            b_x, b_delta, b_write, b_dy, b_slope, b_dz = _ready(
                n_x, n_delta, n_z, n_out, n_y, p_z, g_out, g_y, b_bias, n_t, start, stop, o_token, m_row, dtype, SOFTPLUS,
                MIN, MAX)  # fmt: skip
            b_BCs = n_BCs

    if LOCAL:
        if not WHOLE:
            b_whole = tl.sum(b_elapsed, axis=1)[None, :, None] * b_A
        o_whole = ((i_batch * (n_chunk - 1) + i_chunk - 1) * (H * P) + o_row)[None, :, None] * N + o_v
        tl.store(p_decay + o_whole, b_whole, mask=m_state)
        tl.store(p_local + o_whole, b_g, mask=m_state)
    else:
        i_part = i_batch * n_chunk + i_chunk
        tl.store(d_A + (i_part * (H * P) + o_row)[None, :, None] * N + o_v, b_dA, mask=m_state)
        if d_D is not None:
            tl.store(d_D + i_part * (H * P) + o_row, tl.sum(b_dD, axis=1), mask=m_row)
        if d_bias is not None:
            tl.store(d_bias + i_part * (H * P) + o_row, tl.sum(b_dbias, axis=1), mask=m_row)
        if d_initial is not None:
            if i_chunk == 0:
                tl.store(d_initial + o_state, b_g, mask=m_state)
