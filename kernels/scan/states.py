"""What is emitted of every token, for A (head,): token after token, since writing it takes longer than finding it."""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["states_kernel", "tokens_kernel"]


GROUP = tl.constexpr(2)
"""Tokens that are loaded together, one group ahead."""


@triton.jit
def _load_group(p_x, p_B, p_row, t, n_token, n_padded, x_stride, B_stride, m_p, m_n):
    """decay, scale, x and B of each token, one after another."""
    group = ()
    for k in tl.static_range(GROUP):
        t_wide = tl.minimum(t + k, n_token - 1).to(tl.int64)
        b_x = tl.load(p_x + t_wide * x_stride, mask=m_p, other=0.0)
        b_B = tl.load(p_B + t_wide * B_stride, mask=m_n, other=0.0)
        group = group + (tl.load(p_row + t_wide), tl.load(p_row + n_padded + t_wide), b_x, b_B)
    return group


@triton.jit
def states_kernel(
    p_x, p_B, p_tokens, p_boundary, p_token_slot, p_head_slot, e_h, e_energy, x_strides, B_strides,
    n_token, n_padded, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDARY: tl.constexpr,
):  # fmt: skip
    """h after every token and the sum of its square. Grid: heads x blocks of HIGH x LOW channels, boundaries, batch.

    A tile of (LOW, N) has no more than 16 bytes in a thread, so that B is loaded in the layout of the state.
    """
    BLOCK_P: tl.constexpr = HIGH * LOW
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_tokens.dtype.element_ty
    i_head = (tl.program_id(0) // N_P).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = i_batch * H + i_head
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    i_kept = (i_batch * n_kept_token * n_kept_head + i_slot) * P
    o_low = tl.program_id(0) % N_P * BLOCK_P + tl.arange(0, LOW)[:, None, None]
    o_p = tl.arange(0, HIGH)[None, :, None] * LOW + o_low
    o_n = tl.arange(0, BLOCK_N)[None, None, :]
    o_state = o_p * N + o_n
    m_p = o_p < P if P % BLOCK_P else tl.full((LOW, HIGH, 1), True, tl.int1)
    m_n = o_n + 0 * o_low < N
    m_state = m_p & m_n
    p_row = p_tokens + i_row * 3 * n_padded
    p_x += i_batch * x_strides[0] + i_head * x_strides[2]
    p_B += i_batch * B_strides[0] + i_head // (H // G) * B_strides[2]
    q_x = p_x + o_p * x_strides[3]
    q_B = p_B + (o_low * 0 + o_n * B_strides[3])
    begin = tl.program_id(1) * BOUNDARY
    stop = tl.minimum(begin + BOUNDARY, n_token) if i_slot >= 0 else begin
    p_begin = p_boundary + (i_row * tl.num_programs(1) + tl.program_id(1)) * (P * N)
    b_h = tl.load(p_begin + o_state, mask=m_state, other=0.0)
    group = _load_group(q_x, q_B, p_row, begin, n_token, n_padded, x_strides[1], B_strides[1], m_p, m_n)
    for t in range(begin, stop, GROUP):
        ahead = _load_group(q_x, q_B, p_row, t + GROUP, n_token, n_padded, x_strides[1], B_strides[1], m_p, m_n)
        for k in tl.static_range(GROUP):
            b_write = group[4 * k + 1] * group[4 * k + 2].to(dtype)
            b_h = tl.fma(group[4 * k], b_h, b_write * group[4 * k + 3].to(dtype))
            i_token = t + k
            if p_token_slot is not None:
                i_token = tl.load(p_token_slot + i_token, mask=i_token < stop, other=-1)
            o_kept = i_kept + tl.cast(i_token, tl.int64) * (n_kept_head * P)
            is_kept = (t + k < stop) & (i_token >= 0)
            if e_energy is not None:
                b_energy = tl.sum(b_h * b_h, axis=2)[:, :, None]
                tl.store(e_energy + o_kept + o_p, b_energy, mask=tl.where(is_kept, m_p, False))
            if e_h is not None:
                b_kept = b_h.to(e_h.dtype.element_ty)
                tl.store(e_h + o_kept * N + o_state, b_kept, mask=tl.where(is_kept, m_state, False))
        group = ahead


@triton.jit
def tokens_kernel(
    p_B, p_tokens, p_token_slot, p_head_slot, e_B_bar, e_cumsum, B_strides,
    n_token, n_padded, n_kept_token, n_kept_head,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """B_bar, and delta summed in float64. Grid: heads, 1, batch."""
    i_head = tl.program_id(0).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    p_B += i_batch * B_strides[0] + i_head // (H // G) * B_strides[2]
    p_row = p_tokens + (i_batch * H + i_head) * 3 * n_padded
    o_n = tl.arange(0, BLOCK_N)[None, :]
    b_elapsed = tl.full((), 0.0, tl.float64)
    for t in range(0, n_token, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < n_token
        t_slot = o_t if p_token_slot is None else tl.load(p_token_slot + o_t, mask=m_t, other=-1)
        m_kept = m_t & (tl.minimum(t_slot, i_slot) >= 0)
        o_kept = (i_batch * n_kept_token + t_slot) * n_kept_head + i_slot
        if e_cumsum is not None:
            b_delta = tl.load(p_row + 2 * n_padded + o_t, mask=m_t, other=0.0).to(tl.float64)
            tl.store(e_cumsum + o_kept, b_elapsed + tl.cumsum(b_delta, 0), mask=m_kept)
            b_elapsed += tl.sum(b_delta, 0)
        if e_B_bar is not None:
            m_B = m_kept[:, None] & (o_n < N)
            b_B = tl.load(p_B + o_t.to(tl.int64)[:, None] * B_strides[1] + o_n * B_strides[3], mask=m_B, other=0.0)
            b_scale = tl.load(p_row + n_padded + o_t, mask=m_t, other=0.0)
            b_B_bar = b_scale[:, None] * b_B.to(b_scale.dtype)
            tl.store(e_B_bar + o_kept[:, None] * N + o_n, b_B_bar.to(e_B_bar.dtype.element_ty), mask=m_B)
