"""What is emitted of every token, for A (head,): token after token, since writing it takes longer than finding it."""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.rows import columns

__all__ = ["STAGES", "states_kernel", "tokens_kernel"]

STAGES = 3
"""Of the copies that bring x and B, four tokens each, through shared memory: no register waits for a load."""


@triton.jit
def _scalars(p_row, t, n_token, n_padded):
    """Decay and scale of 4 tokens, one after another."""
    group = ()
    for k in tl.static_range(4):
        i_token = tl.minimum(t + k, n_token - 1)
        group = group + (tl.load(p_row + i_token), tl.load(p_row + n_padded + i_token))
    return group


@triton.jit
def _tokens(p, t, stop, t_stride, stride, o, mask, dtype: tl.constexpr):
    """x or B of 4 tokens, each (channel or state,)."""
    o_t = tl.arange(0, 4)
    mask = (t + o_t < stop)[:, None, None] & mask[None, None, :]
    p += tl.cast(t, tl.int64) * t_stride
    tile = tl.load(p + o_t[:, None, None] * t_stride + o[None, None, :] * stride, mask=mask, other=0.0)
    return columns(tl.trans(tl.reshape(tile.to(dtype), (4, tile.shape[2]))))


@triton.jit
def states_kernel(
    p_x, p_B, p_tokens, p_boundary, p_token_slot, p_head_slot, e_h, e_energy, x_strides, B_strides,
    n_token, n_padded, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDARY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h after every token and the sum of its square. Grid: heads x blocks of BLOCK_P channels, boundaries, batch."""
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_tokens.dtype.element_ty
    i_head = (tl.program_id(0) // N_P).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = i_batch * H + i_head
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    i_kept = (i_batch * n_kept_token * n_kept_head + i_slot) * P
    o_p = tl.program_id(0) % N_P * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o_state = o_p[:, None] * N + o_n[None, :]
    m_p = o_p < P if P % BLOCK_P else tl.full((BLOCK_P,), True, tl.int1)
    m_n = o_n < N if N < BLOCK_N else tl.full((BLOCK_N,), True, tl.int1)
    m_state = m_p[:, None] & m_n[None, :]
    p_row = p_tokens + i_row * 3 * n_padded
    p_x += i_batch * x_strides[0] + i_head * x_strides[2]
    p_B += i_batch * B_strides[0] + i_head // (H // G) * B_strides[2]
    begin = tl.program_id(1) * BOUNDARY
    stop = tl.minimum(begin + BOUNDARY, n_token) if i_slot >= 0 else begin
    p_begin = p_boundary + (i_row * tl.num_programs(1) + tl.program_id(1)) * (P * N)
    b_h = tl.load(p_begin + o_state, mask=m_state, other=0.0)
    scalars = _scalars(p_row, begin, n_token, n_padded)
    for t in tl.range(begin, stop, 4, num_stages=STAGES):
        xs = _tokens(p_x, t, stop, x_strides[1], x_strides[3], o_p, m_p, dtype)
        Bs = _tokens(p_B, t, stop, B_strides[1], B_strides[3], o_n, m_n, dtype)
        ahead = _scalars(p_row, t + 4, n_token, n_padded)
        for k in tl.static_range(4):
            b_write = scalars[2 * k + 1] * xs[k]
            b_h = tl.fma(scalars[2 * k], b_h, b_write[:, None] * Bs[k][None, :])
            i_token = t + k
            if p_token_slot is not None:
                i_token = tl.load(p_token_slot + i_token, mask=i_token < stop, other=-1)
            o_kept = i_kept + tl.cast(i_token, tl.int64) * (n_kept_head * P)
            is_kept = (t + k < stop) & (i_token >= 0)
            if e_energy is not None:
                tl.store(e_energy + o_kept + o_p, tl.sum(b_h * b_h, axis=1), mask=tl.where(is_kept, m_p, False))
            if e_h is not None:
                b_kept = b_h.to(e_h.dtype.element_ty)
                tl.store(e_h + o_kept * N + o_state, b_kept, mask=tl.where(is_kept, m_state, False))
        scalars = ahead


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
