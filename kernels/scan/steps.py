"""What one token does to the state of one head, for A (head,): step size, decay and scale of the write.

`steps_kernel` finds them for all tokens and heads at once, ahead of the matrix products, which only read them:

| row of p_steps (batch, head, 4, token) | |
|---|---|
| high | log2 of the decay from the chunk's first token through this one |
| rest | exp2 of what high has lost to rounding |
| write | the scale of the write, B_bar / B, over rest: exp2(high[t] - high[s]) rest[t] write[s] takes s to t |
| end | the scale of the write, times the decay of the tokens that follow in the chunk |

Past the last token they are such that nothing changes. Decays are summed in float64, and a decay over a whole chunk,
which a long memory takes to a high power, is rounded once: fade (batch, head, chunk), behind those rows.

| row of p_tokens (batch, head, 3, token), for what is emitted of every token | |
|---|---|
| decay | A_bar |
| scale | B_bar / B |
| delta | |
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.elementwise import LOG2E, phi1, step_size

__all__ = ["discretize", "steps_kernel"]

LOWEST = tl.constexpr(-2048.0)
"""log2 of a decay that is nothing, whatever growth follows."""


@triton.jit
def discretize(raw, b_bias, b_A, p_log, o_log, p_starts, o_token, mask,
               SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr):  # fmt: skip
    """Of tiles [token, head]: delta, and in float64 log2 of the decay and the scale of the write; 0 outside `mask`."""
    delta = tl.where(mask, step_size(raw + b_bias, SOFTPLUS, MIN, MAX), 0.0)
    wide = delta.to(tl.float64)
    z = wide * b_A
    scale = wide
    if ZOH:
        scale *= phi1(z, tl.exp2(z * LOG2E))
    log2 = z * LOG2E
    if p_log is not None:
        log2 = tl.load(p_log + o_log, mask=mask, other=0.0).to(tl.float64) * LOG2E
    if p_starts is not None:
        log2 = tl.where(tl.load(p_starts + o_token, mask=mask, other=0) != 0, -float("inf"), log2)
    return delta, log2, scale


@triton.jit
def steps_kernel(
    p_delta, p_A, p_bias, p_starts, p_log, p_steps, p_tokens, p_flag, p_token_slot, p_head_slot, e_delta, e_A_bar,
    delta_strides, log_strides, n_token, n_chunk, n_kept_token, n_kept_head,
    H: tl.constexpr, FLAGS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """Grid: chunks of BLOCK_T tokens, blocks of BLOCK_H heads, batch. Sets FLAGS flags of p_flag to zero."""
    dtype: tl.constexpr = p_A.dtype.element_ty
    i_chunk = tl.program_id(0)
    i_batch = tl.program_id(2).to(tl.int64)
    o_t = (i_chunk * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    m_h = o_h < H
    mask = (o_t < n_token) & m_h
    o_wide = o_t.to(tl.int64)
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0).to(tl.float64)
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_h, mask=m_h, other=0.0)
    o_delta = i_batch * delta_strides[0] + o_wide * delta_strides[1] + o_h * delta_strides[2]
    raw = tl.load(p_delta + o_delta, mask=mask, other=0.0).to(dtype)
    o_log = i_batch * log_strides[0] + o_wide * log_strides[1] + o_h * log_strides[2]
    b_delta, b_log2, b_scale = discretize(raw, b_bias, b_A, p_log, o_log, p_starts, i_batch * n_token + o_t, mask,
                                          SOFTPLUS, MIN, MAX, ZOH)  # fmt: skip
    b_bounded = tl.where(b_log2 < LOWEST, LOWEST, b_log2)
    b_sum = tl.cumsum(b_bounded, 0)
    b_total = tl.sum(b_bounded, 0)[None, :]
    b_high = b_sum.to(dtype)
    n_padded = n_chunk * BLOCK_T
    o_head = i_batch * H + o_h
    p_step = p_steps + o_head * (4 * n_padded) + o_t
    tl.store(p_step, b_high, mask=m_h)
    b_low = ((b_sum - b_high.to(tl.float64)) * (1.0 / LOG2E)).to(dtype)  # small, and exp is its series
    tl.store(p_step + n_padded, 1.0 + (b_low + 0.5 * b_low * b_low), mask=m_h)
    tl.store(p_step + 2 * n_padded, b_scale.to(dtype) * (1.0 - (b_low - 0.5 * b_low * b_low)), mask=m_h)
    tl.store(p_step + 3 * n_padded, (tl.exp2((b_total - b_sum).to(dtype)) * b_scale).to(dtype), mask=m_h)
    p_fade = p_steps + tl.num_programs(2).to(tl.int64) * H * (4 * n_padded)
    tl.store(p_fade + o_head * n_chunk + i_chunk, tl.exp2(b_total).to(dtype), mask=m_h)
    if p_tokens is not None:
        p_row = p_tokens + o_head * (3 * n_padded) + o_t
        tl.store(p_row, tl.exp2(b_log2).to(dtype), mask=m_h)
        tl.store(p_row + n_padded, b_scale.to(dtype), mask=m_h)
        tl.store(p_row + 2 * n_padded, b_delta, mask=m_h)
    if p_flag is not None:
        m_first = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        o_flag = tl.arange(0, FLAGS)
        tl.store(p_flag + o_flag, 0, mask=tl.where(m_first, o_flag < FLAGS, False))
    t_slot = o_t if p_token_slot is None else tl.load(p_token_slot + o_t, mask=o_t < n_token, other=-1)
    h_slot = o_h if p_head_slot is None else tl.load(p_head_slot + o_h, mask=m_h, other=-1)
    m_kept = mask & (t_slot >= 0) & (h_slot >= 0)
    o_kept = (i_batch * n_kept_token + t_slot) * n_kept_head + h_slot
    if e_delta is not None:
        tl.store(e_delta + o_kept, b_delta, mask=m_kept)
    if e_A_bar is not None:
        tl.store(e_A_bar + o_kept, tl.exp2(b_log2).to(e_A_bar.dtype.element_ty), mask=m_kept)
