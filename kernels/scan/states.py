"""The state after every token, for A (head,): token after token, since writing it takes longer than finding it."""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.steps import discretize

__all__ = ["entering", "states_kernel"]


@triton.jit
def _load_delta(p_delta, i_stride, o_token, stop, dtype: tl.constexpr):
    return tl.load(p_delta + o_token.to(tl.int64) * i_stride, mask=o_token < stop, other=0.0).to(dtype)


@triton.jit
def entering(p_initial, p_whole, p_local, i_batch, i_span, n_span, i_head, o_state, m_state, H: tl.constexpr,
             SIZE: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The state before a span and the sum of delta there, from what the spans before it left."""
    b_h = tl.zeros(o_state.shape, dtype)
    b_elapsed = tl.full((), 0.0, tl.float64)
    if p_initial is not None:
        b_h = tl.load(p_initial + (i_batch * H + i_head) * SIZE + o_state, mask=m_state, other=0.0)
    if p_local is not None:
        for j in range(i_span):
            i_whole = (i_batch * (n_span - 1) + j) * H + i_head
            b_h *= tl.load(p_whole + 2 * i_whole).to(dtype)
            b_h += tl.load(p_local + i_whole * SIZE + o_state, mask=m_state, other=0.0)
            b_elapsed += tl.load(p_whole + 2 * i_whole + 1)
    return b_h, b_elapsed


@triton.jit
def states_kernel(
    p_x, p_delta, p_A, p_B, p_bias, p_starts, p_log, p_initial, p_whole, p_local, p_token_slot, p_head_slot,
    e_h, e_energy, x_strides, delta_strides, B_strides, log_strides, n_token, n_span, span, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """h after every token and the sum of its square, by the recurrence: writing takes longer. Grid as `scan_kernel`."""
    N_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    dtype: tl.constexpr = p_A.dtype.element_ty
    i_head = (tl.program_id(0) // N_P).to(tl.int64)
    i_span = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    i_slot = i_head if p_head_slot is None else tl.load(p_head_slot + i_head)
    o_p = (tl.program_id(0) % N_P * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_state = (o_p < P) & (o_n < N)
    if i_slot >= 0:
        b_A = tl.load(p_A + i_head).to(tl.float64)
        b_bias = 0.0 if p_bias is None else tl.load(p_bias + i_head)
        p_delta += i_batch * delta_strides[0] + i_head * delta_strides[2]
        p_x += i_batch * x_strides[0] + i_head * x_strides[2]
        p_B += i_batch * B_strides[0] + i_head // (H // G) * B_strides[2]
        if p_starts is not None:
            p_starts += i_batch * n_token
        if p_log is not None:
            p_log += i_batch * log_strides[0] + i_head * log_strides[2]
        if e_h is not None:
            e_h += (i_batch * n_kept_token * n_kept_head + i_slot) * (P * N)
        if e_energy is not None:
            e_energy += (i_batch * n_kept_token * n_kept_head + i_slot) * P
        o_state = o_p * N + o_n
        b_h, _b_elapsed = entering(
            p_initial, p_whole, p_local, i_batch, i_span, n_span, i_head, o_state, m_state, H, P * N, dtype
        )
        stop = tl.minimum((i_span + 1) * span, n_token)
        o_one = tl.arange(0, 1)[:, None]
        b_raw = _load_delta(p_delta, delta_strides[1], i_span * span + o_one, stop, dtype)
        for t in range(i_span * span, stop):
            t_wide = tl.cast(t, tl.int64)
            b_x = tl.load(p_x + t_wide * x_strides[1] + o_p * x_strides[3], mask=o_p < P, other=0.0).to(dtype)
            p_tile = p_B + t_wide * B_strides[1] + o_p * 0 + o_n * B_strides[3]  # a whole tile, in the layout of b_h
            b_B = tl.load(p_tile, mask=m_state, other=0.0).to(dtype)
            n_raw = _load_delta(p_delta, delta_strides[1], t + 1 + o_one, stop, dtype)
            o_t = t_wide + o_one
            _b_delta, b_log2, b_scale = discretize(b_raw, b_bias, b_A, p_log, o_t * log_strides[1], p_starts, o_t,
                                                   o_t < stop, SOFTPLUS, MIN, MAX, ZOH)  # fmt: skip
            b_raw = n_raw
            b_h = tl.exp2(b_log2).to(dtype) * b_h + b_scale.to(dtype) * b_x * b_B
            i_token = t_wide if p_token_slot is None else tl.load(p_token_slot + t).to(tl.int64)
            i_token *= n_kept_head * P
            if e_energy is not None:
                b_energy = tl.sum(b_h * b_h, axis=1)[:, None]
                tl.store(e_energy + i_token + o_p, b_energy, mask=tl.where(i_token >= 0, o_p < P, False))
            if e_h is not None:
                m_kept = tl.where(i_token >= 0, m_state, False)
                tl.store(e_h + i_token * N + o_state, b_h.to(e_h.dtype.element_ty), mask=m_kept)
