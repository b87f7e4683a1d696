"""The kernels of `chunked_backward`: gradients of A (head,)'s scan, as matrix products within chunks of tokens.

Of one head and chunk, with h the state before it and e the gradient of that after it, D[t, s] the decay from s to t, w
the scale of the write and dy = dout silu(z), plus the gradient of an emitted y (ours):

    W[t, s]  = (C_t B_s) (dy_t x_s) D[t, s] w_s                  how much the pair s -> t carries
    u_s      = sum_{t >= s} (C_t B_s) D[t, s] dy_t + D[end, s] B_s e       dx_s = w_s u_s + D dy_s;   dw_s = u_s x_s
    dB_s     = sum_{t >= s} (dy_t x_s) D[t, s] w_s C_t + D[end, s] w_s e x_s          summed over the heads of a group
    dC_t     = sum_{s <= t} (dy_t x_s) D[t, s] w_s B_s + D[t, begin] h dy_t
    q_t      = d log a_t = sum_{s < t <= r} W[r, s] + sum_{r >= t} dy_r D[r, begin] C_r h
                           + sum_{s < t} D[end, s] w_s x_s B_s e + D[end, begin] <e, h>
    e before = D[end, begin] e + sum_t D[t, begin] C_t dy_t

q is the sum of what crosses token t, each path once, and nothing is subtracted: at a reset (delta = 1e4) it must be 0,
since dA multiplies it by delta, and sums of dy y - w dw from the end on would leave their rounding there. The sum over
the rectangle is a product with ones above the diagonal. Decays are those of `steps`.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.chunked import _segment_decays, _tile
from mamba_probe.kernels.scan.elementwise import LOG2E, phi1, phi1_slope, silu_and_slope, step_size, step_slope
from mamba_probe.kernels.scan.products import dot, narrowed, terms

__all__ = ["boundary_kernel", "inputs_kernel", "projections_kernel", "steps_backward_kernel"]


@triton.jit
def _gates(z, NARROW: tl.constexpr):
    """silu(z) and its derivative; where NARROW as `silu`."""
    if NARROW:
        root = tl.rsqrt(1.0 + tl.exp2(-z * LOG2E))
        one = root * root
        return z * one, one * (1.0 + z * (1.0 - one))
    else:
        return silu_and_slope(z)


@triton.jit
def _upstream(p_z, g_out, g_y, z_strides, out_strides, y_stride, t, o_t, o_p, mask, dtype: tl.constexpr,
              NARROW: tl.constexpr):  # fmt: skip
    """dy, and what times y is dz; either is 0 without g_out."""
    b_dy = tl.zeros(mask.shape, dtype)
    b_dz = b_dy
    if g_out is not None:
        b_dy = _tile(g_out, t, out_strides[1], out_strides[3], o_t, o_p, mask).to(dtype)
        if p_z is not None:
            b_z = _tile(p_z, t, z_strides[1], z_strides[3], o_t, o_p, mask).to(dtype)
            b_gate, b_slope = _gates(b_z, NARROW)
            b_dz = b_dy * b_slope
            b_dy *= b_gate
    if g_y is not None:
        b_dy += _tile(g_y, t, y_stride, 1, o_t, o_p, mask).to(dtype)
    return b_dy, b_dz


@triton.jit
def _added(acc, a, b, N_A: tl.constexpr, N_B: tl.constexpr, EXACT: tl.constexpr, TRANS_A: tl.constexpr = False,
           TRANS_B: tl.constexpr = False):  # fmt: skip
    """acc + a b; where EXACT, added outside of the tensor cores, whose own sums are cut off."""
    if EXACT:
        return acc + dot(a, b, tl.zeros(acc.shape, acc.dtype), N_A, N_B, TRANS_A, TRANS_B)
    else:
        return dot(a, b, acc, N_A, N_B, TRANS_A, TRANS_B)


@triton.jit
def _advanced(b_state, b_left, b_right, b_scale, b_fade, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """fade state + left^T (scale right)."""
    dtype: tl.constexpr = b_state.dtype
    left = terms(b_left, dtype, SPLIT)
    right = narrowed(b_scale[:, None] * b_right, dtype, SPLIT, EXACT)
    return b_fade * b_state + dot(left, right, tl.zeros(b_state.shape, dtype), len(left), len(right), TRANS_A=True)


@triton.jit
def boundary_kernel(
    p_x, p_B, p_C, p_z, p_steps, p_initial, g_out, g_last, g_y, p_h, p_e, p_dy, d_initial,
    x_strides, B_strides, C_strides, z_strides, out_strides, n_token, n_chunk,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """e after every chunk, by the programs that are first on axis 0, and h before it: (batch, head, chunk, state,
    head_channel); p_dy: dy, where it is not g_out. Grid: these two, heads x blocks of BLOCK_P channels, batch."""
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_steps.dtype.element_ty
    i_batch = tl.program_id(2).to(tl.int64)
    i_head = (tl.program_id(1) // N_P).to(tl.int64)
    i_group = i_head // (H // G)
    i_row = i_batch * H + i_head
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_p = tl.program_id(1) % N_P * BLOCK_P + tl.arange(0, BLOCK_P)
    m_n = o_n < N
    m_p = o_p < P
    m_state = m_n[:, None] & m_p[None, :]
    o_state = o_n[:, None] * P + o_p[None, :]
    o_given = i_row * (P * N) + o_p.to(tl.int64)[None, :] * N + o_n[:, None]
    n_padded = n_chunk * BLOCK_T
    p_high = p_steps + i_row * (4 * n_padded)
    p_fade = p_steps + tl.num_programs(2).to(tl.int64) * H * (4 * n_padded) + i_row * n_chunk
    b_state = tl.zeros((BLOCK_N, BLOCK_P), dtype)
    if tl.program_id(0) == 0:
        p_C += i_batch * C_strides[0] + i_group * C_strides[2]
        if p_z is not None:
            p_z += i_batch * z_strides[0] + i_head * z_strides[2]
        if g_out is not None:
            g_out += i_batch * out_strides[0] + i_head * out_strides[2]
        if g_y is not None:
            g_y += (i_batch * n_token * H + i_head) * P
        p_e += i_row * n_chunk * (P * N)
        if g_last is not None:
            b_state = tl.load(g_last + o_given, mask=m_state, other=0.0)
        for i in range(n_chunk):
            c = n_chunk - 1 - i
            t = c * BLOCK_T
            m_t = (t + o_t < n_token)[:, None]
            b_C = _tile(p_C, t, C_strides[1], C_strides[3], o_t, o_n, m_t & m_n[None, :])
            b_dy, _ = _upstream(p_z, g_out, g_y, z_strides, out_strides, H * P, t, o_t, o_p, m_t & m_p[None, :], dtype,
                                SPLIT and not EXACT)  # fmt: skip
            if p_dy is not None:
                o_dy = ((i_batch * n_token + t + o_t) * H + i_head)[:, None] * P + o_p[None, :]
                tl.store(p_dy + o_dy, b_dy.to(p_dy.dtype.element_ty), mask=m_t & m_p[None, :])
            tl.store(p_e + tl.cast(c, tl.int64) * (P * N) + o_state, b_state.to(p_e.dtype.element_ty), mask=m_state)
            b_scale = tl.exp2(tl.load(p_high + t + o_t)) * tl.load(p_high + n_padded + t + o_t)
            b_state = _advanced(b_state, b_C, b_dy, b_scale, tl.load(p_fade + c), SPLIT, EXACT or d_initial is not None)
        if d_initial is not None:
            tl.store(d_initial + o_given, b_state, mask=m_state)
    else:
        p_x += i_batch * x_strides[0] + i_head * x_strides[2]
        p_B += i_batch * B_strides[0] + i_group * B_strides[2]
        p_h += i_row * n_chunk * (P * N)
        if p_initial is not None:
            b_state = tl.load(p_initial + o_given, mask=m_state, other=0.0)
        for c in range(n_chunk):
            t = c * BLOCK_T
            m_t = (t + o_t < n_token)[:, None]
            b_B = _tile(p_B, t, B_strides[1], B_strides[3], o_t, o_n, m_t & m_n[None, :])
            b_x = _tile(p_x, t, x_strides[1], x_strides[3], o_t, o_p, m_t & m_p[None, :]).to(dtype)
            tl.store(p_h + tl.cast(c, tl.int64) * (P * N) + o_state, b_state.to(p_h.dtype.element_ty), mask=m_state)
            b_state = _advanced(b_state, b_B, b_x, tl.load(p_high + 3 * n_padded + t + o_t), tl.load(p_fade + c), SPLIT,
                                EXACT)  # fmt: skip


@triton.jit
def _inputs_of(b_x, e_terms, S_terms, dy_terms, B_terms, p_high, n_padded, o_t, EXACT: tl.constexpr,
               BLOCK_T: tl.constexpr):  # fmt: skip
    """w u, dw, and of q what token s writes that leaves the chunk."""
    b_high = tl.load(p_high + o_t)
    b_to_end = tl.exp2(tl.load(p_high + BLOCK_T - 1) - b_high) * tl.load(p_high + n_padded + BLOCK_T - 1)
    b_write = tl.load(p_high + 2 * n_padded + o_t)
    b_u = dot(B_terms, e_terms, tl.zeros(b_x.shape, b_x.dtype), len(B_terms), len(e_terms)) * b_to_end[:, None]
    b_leaves = tl.sum(b_u * b_x, 1) * b_write
    b_u = _added(b_u, S_terms, dy_terms, len(S_terms), len(dy_terms), EXACT, TRANS_A=True)
    return b_u * b_write[:, None], tl.sum(b_u * b_x, 1) / tl.load(p_high + n_padded + o_t), b_leaves


@triton.jit
def _crossing(b_W, b_enters, b_leaves, o_t, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """q but for what crosses the whole chunk: sums over what crosses a token."""
    dtype: tl.constexpr = b_W.dtype
    before = (o_t[:, None] < o_t[None, :]).to(tl.bfloat16 if SPLIT else dtype)
    W_terms = narrowed(b_W, dtype, SPLIT, EXACT)
    b_from = dot(W_terms, (before,), tl.zeros(b_W.shape, dtype), len(W_terms), 1)  # [r, t]: sum of W[r, s] over s < t
    b_q = tl.where(o_t[:, None] >= o_t[None, :], b_from + b_enters[:, None], b_leaves[:, None])
    return tl.sum(b_q, 0)


@triton.jit
def _since(p_high, n_padded, o_t):
    """Decay from the chunk's beginning through each token."""
    return tl.exp2(tl.load(p_high + o_t)) * tl.load(p_high + n_padded + o_t)


@triton.jit
def inputs_kernel(
    p_x, p_B, p_C, p_D, p_z, p_steps, p_h, p_e, p_dy, g_out, g_y, d_x, d_z, d_D, d_steps,
    x_strides, B_strides, C_strides, D_strides, z_strides, out_strides, dy_strides, n_token, n_chunk,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dx, dz, the parts of dD, and d_steps (batch, head, 2, token): dw, and q but for what crosses the whole chunk.
    Grid: heads, chunks, batch."""
    dtype: tl.constexpr = p_steps.dtype.element_ty
    i_chunk = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_head = tl.program_id(0).to(tl.int64)
    i_group = i_head // (H // G)
    i_row = i_batch * H + i_head
    t = i_chunk * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < P
    m_x = (t + o_t < n_token)[:, None] & m_p[None, :]
    m_B = (t + o_t < n_token)[:, None] & (o_n < N)[None, :]
    m_state = (o_n < N)[:, None] & m_p[None, :]
    n_padded = n_chunk * BLOCK_T
    p_B += i_batch * B_strides[0] + i_group * B_strides[2]
    p_C += i_batch * C_strides[0] + i_group * C_strides[2]
    b_B = _tile(p_B, t, B_strides[1], B_strides[3], o_t, o_n, m_B)
    b_C = _tile(p_C, t, C_strides[1], C_strides[3], o_t, o_n, m_B)
    p_x += i_batch * x_strides[0] + i_head * x_strides[2]
    b_x = _tile(p_x, t, x_strides[1], x_strides[3], o_t, o_p, m_x)
    p_dy += i_batch * dy_strides[0] + i_head * dy_strides[2]
    b_dy = _tile(p_dy, t, dy_strides[1], dy_strides[3], o_t, o_p, m_x)
    B_terms = terms(b_B, dtype, SPLIT)
    C_terms = terms(b_C, dtype, SPLIT)
    p_high = p_steps + i_row * (4 * n_padded) + t
    o_state = (i_row * n_chunk + i_chunk) * (P * N) + o_n[:, None] * P + o_p[None, :]
    b_e = tl.load(p_e + o_state, mask=m_state, other=0.0)
    b_none = tl.zeros((BLOCK_T, BLOCK_T), dtype)
    b_S = dot(C_terms, B_terms, b_none, len(C_terms), len(B_terms), TRANS_B=True)
    b_S *= _segment_decays(p_high, o_t) * tl.load(p_high + n_padded + o_t)[:, None]
    S_terms = narrowed(b_S, dtype, SPLIT, EXACT)
    b_S *= tl.load(p_high + 2 * n_padded + o_t)[None, :]
    x_terms = terms(b_x, dtype, SPLIT)
    dy_terms = terms(b_dy, dtype, SPLIT)
    b_x = b_x.to(dtype)
    b_dy = b_dy.to(dtype)
    b_W = b_S * dot(dy_terms, x_terms, b_none, len(dy_terms), len(x_terms), TRANS_B=True)

    b_h = tl.load(p_h + o_state, mask=m_state, other=0.0)
    e_terms = narrowed(b_e, dtype, SPLIT, EXACT)
    b_dx, b_dw, b_leaves = _inputs_of(b_x, e_terms, S_terms, dy_terms, B_terms, p_high, n_padded, o_t, EXACT, BLOCK_T)
    o_x = ((i_batch * n_token + t + o_t) * H + i_head)[:, None] * P + o_p[None, :]
    if p_D is not None:
        b_D = tl.load(p_D + i_head * D_strides[0] + o_p * D_strides[1], mask=m_p, other=0.0)[None, :]
        b_dx += b_D * b_dy
    tl.store(d_x + o_x, b_dx.to(d_x.dtype.element_ty), mask=m_x)
    h_terms = narrowed(b_h, dtype, SPLIT, EXACT)
    b_y = dot(C_terms, h_terms, tl.zeros(b_x.shape, dtype), len(C_terms), len(h_terms))
    b_y *= _since(p_high, n_padded, o_t)[:, None]
    b_enters = tl.sum(b_y * b_dy, 1)
    p_step = d_steps + i_row * (2 * n_padded) + t + o_t
    tl.store(p_step, _crossing(b_W, b_enters, b_leaves, o_t, SPLIT, EXACT))
    tl.store(p_step + n_padded, b_dw)

    weights = narrowed(b_S, dtype, SPLIT, EXACT)
    b_y = _added(b_y, weights, x_terms, len(weights), len(x_terms), EXACT)
    b_dy, b_dz = _upstream(
        None if p_z is None else p_z + i_batch * z_strides[0] + i_head * z_strides[2],
        None if g_out is None else g_out + i_batch * out_strides[0] + i_head * out_strides[2],
        None if g_y is None else g_y + (i_batch * n_token * H + i_head) * P,
        z_strides, out_strides, H * P, t, o_t, o_p, m_x, dtype, SPLIT and not EXACT)  # fmt: skip
    if p_D is not None:
        b_y += b_D * b_x
        tl.store(d_D + ((i_batch * n_chunk + i_chunk) * H + i_head) * P + o_p, tl.sum(b_dy * b_x, 0), mask=m_p)
    if d_z is not None:
        tl.store(d_z + o_x, (b_dz * b_y).to(d_z.dtype.element_ty), mask=m_x)


@triton.jit
def projections_kernel(
    p_x, p_B, p_C, p_steps, p_h, p_e, p_dy, d_B, d_C, d_both,
    x_strides, B_strides, C_strides, dy_strides, n_token, n_chunk,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dB and dC, summed over a program's heads: (block of heads, batch, token, group, state); <e, h> in d_both (batch,
    head, chunk, block of states). Grid: blocks of HEADS of a group's heads x of BLOCK_N states, chunks, batch x group.
    """
    N_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    dtype: tl.constexpr = p_steps.dtype.element_ty
    i_block = tl.program_id(0) // N_N
    i_chunk = tl.program_id(1)
    i_batch = (tl.program_id(2) // G).to(tl.int64)
    i_group = tl.program_id(2) % G
    t = i_chunk * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.program_id(0) % N_N * BLOCK_N + tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    m_x = (t + o_t < n_token)[:, None] & (o_p < P)[None, :]
    m_B = (t + o_t < n_token)[:, None] & (o_n < N)[None, :]
    m_state = (o_n < N)[:, None] & (o_p < P)[None, :]
    n_padded = n_chunk * BLOCK_T
    p_B += i_batch * B_strides[0] + i_group * B_strides[2]
    p_C += i_batch * C_strides[0] + i_group * C_strides[2]
    B_terms = terms(_tile(p_B, t, B_strides[1], B_strides[3], o_t, o_n, m_B), dtype, SPLIT)
    C_terms = terms(_tile(p_C, t, C_strides[1], C_strides[3], o_t, o_n, m_B), dtype, SPLIT)
    b_none = tl.zeros((BLOCK_T, BLOCK_T), dtype)
    b_dB = tl.zeros((BLOCK_T, BLOCK_N), dtype)
    b_dC = tl.zeros((BLOCK_T, BLOCK_N), dtype)
    first = i_group * (H // G) + i_block * HEADS
    for i in range(first, tl.minimum(first + HEADS, (i_group + 1) * (H // G))):
        i_head = tl.cast(i, tl.int64)
        i_row = i_batch * H + i_head
        p_high = p_steps + i_row * (4 * n_padded) + t
        b_x = _tile(p_x + i_batch * x_strides[0] + i_head * x_strides[2], t, x_strides[1], x_strides[3], o_t, o_p, m_x)
        p_head = p_dy + i_batch * dy_strides[0] + i_head * dy_strides[2]
        b_dy = _tile(p_head, t, dy_strides[1], dy_strides[3], o_t, o_p, m_x)
        x_terms = terms(b_x, dtype, SPLIT)
        dy_terms = terms(b_dy, dtype, SPLIT)
        b_pair = dot(dy_terms, x_terms, b_none, len(dy_terms), len(x_terms), TRANS_B=True)
        b_pair *= _segment_decays(p_high, o_t) * tl.load(p_high + n_padded + o_t)[:, None]
        pairs = narrowed(b_pair * tl.load(p_high + 2 * n_padded + o_t)[None, :], dtype, SPLIT, EXACT)
        b_dB = _added(b_dB, pairs, C_terms, len(pairs), len(C_terms), EXACT, TRANS_A=True)
        b_dC = _added(b_dC, pairs, B_terms, len(pairs), len(B_terms), EXACT)
        o_state = (i_row * n_chunk + i_chunk) * (P * N) + o_n[:, None] * P + o_p[None, :]
        b_e = tl.load(p_e + o_state, mask=m_state, other=0.0)
        e_terms = narrowed(b_e, dtype, SPLIT, EXACT)
        ends = narrowed(b_x.to(dtype) * tl.load(p_high + 3 * n_padded + o_t)[:, None], dtype, SPLIT, EXACT)
        b_dB = _added(b_dB, ends, e_terms, len(ends), len(e_terms), EXACT, TRANS_B=True)
        b_h = tl.load(p_h + o_state, mask=m_state, other=0.0)
        h_terms = narrowed(b_h, dtype, SPLIT, EXACT)
        begins = narrowed(b_dy.to(dtype) * _since(p_high, n_padded, o_t)[:, None], dtype, SPLIT, EXACT)
        b_dC = _added(b_dC, begins, h_terms, len(begins), len(h_terms), EXACT, TRANS_B=True)
        i_both = (i_row * n_chunk + i_chunk) * N_N + tl.program_id(0) % N_N
        tl.store(d_both + i_both, tl.sum(tl.sum(b_h.to(dtype) * b_e.to(dtype), 1), 0))
    i_part = i_block.to(tl.int64) * (tl.num_programs(2) // G) + i_batch
    o_B = ((i_part * n_token + t + o_t) * G + i_group)[:, None] * N + o_n[None, :]
    tl.store(d_B + o_B, b_dB, mask=m_B)
    tl.store(d_C + o_B, b_dC, mask=m_B)


@triton.jit
def steps_backward_kernel(
    p_delta, p_A, p_bias, p_fade, d_steps, d_both, g_delta, g_log, g_write, d_delta, d_A, d_bias, d_log,
    delta_strides, n_token, n_padded,
    H: tl.constexpr, N_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """From q and dw those of delta and log_decay, and the parts of dA and d delta_bias. g_*: more gradients, of delta,
    log of the decay and the scale of the write, (batch, token, head). Grid: blocks of tokens, of heads, batch."""
    dtype: tl.constexpr = d_steps.dtype.element_ty
    i_batch = tl.program_id(2).to(tl.int64)
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    m_h = o_h < H
    mask = (o_t < n_token) & m_h
    o_delta = i_batch * delta_strides[0] + o_t.to(tl.int64) * delta_strides[1] + o_h * delta_strides[2]
    b_raw = tl.load(p_delta + o_delta, mask=mask, other=0.0).to(dtype)
    b_raw += 0.0 if p_bias is None else tl.load(p_bias + o_h, mask=m_h, other=0.0)
    b_delta = step_size(b_raw, SOFTPLUS, MIN, MAX)
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0)
    p_q = d_steps + (i_batch * H + o_h) * (2 * n_padded) + o_t
    b_q = tl.load(p_q, mask=mask, other=0.0)
    b_dw = tl.load(p_q + n_padded, mask=mask, other=0.0)
    o_dense = (i_batch * n_token + o_t) * H + o_h
    i_chunk = (i_batch * H + o_h) * (n_padded // CHUNK) + o_t // CHUNK
    b_both = tl.zeros(mask.shape, dtype)
    for i in tl.static_range(N_N):
        b_both += tl.load(d_both + i_chunk * N_N + i, mask=mask, other=0.0)
    b_q += b_both * tl.load(p_fade + i_chunk, mask=mask, other=0.0)
    if g_log is not None:
        b_q += tl.load(g_log + o_dense, mask=mask, other=0.0)
    if g_write is not None:
        b_dw += tl.load(g_write + o_dense, mask=mask, other=0.0)
    b_dA = tl.zeros(mask.shape, dtype)
    b_found = b_dw
    if ZOH:
        z = b_delta.to(tl.float64) * b_A
        b_exp = tl.exp2(z * LOG2E)
        b_dA = (b_dw * (b_delta.to(tl.float64) * b_delta) * phi1_slope(z, b_exp, phi1(z, b_exp))).to(dtype)
        b_found = (b_dw * b_exp).to(dtype)
    if d_log is None:
        b_found += b_A * b_q
        b_dA += b_delta * b_q
    else:
        tl.store(d_log + o_dense, b_q.to(d_log.dtype.element_ty), mask=mask)
    if g_delta is not None:
        b_found += tl.load(g_delta + o_dense, mask=mask, other=0.0)
    b_found = tl.where(mask, b_found * step_slope(b_raw, SOFTPLUS, MIN, MAX), 0.0)
    tl.store(d_delta + o_dense, b_found.to(d_delta.dtype.element_ty), mask=mask)
    o_part = (i_batch * tl.num_programs(0) + tl.program_id(0)) * H + o_h
    tl.store(d_A + o_part, tl.sum(tl.where(mask, b_dA, 0.0), 0)[None, :], mask=m_h)
    if d_bias is not None:
        tl.store(d_bias + o_part, tl.sum(b_found, 0)[None, :], mask=m_h)
