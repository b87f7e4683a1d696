"""The states of a segment again, from the one before it, which is saved: tile (high, row, low)."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.discretization import decay_at, load_starts, write_at
from mamba_probe.kernels.scan.elementwise import step_size
from mamba_probe.kernels.scan.folds import tokens4
from mamba_probe.kernels.scan.loads import load_block, widened
from mamba_probe.kernels.scan.places import load, masked
from mamba_probe.kernels.scan.rows import columns

__all__ = ["rewalk", "segment_state", "states_of"]


@triton.jit
def segment_state(p_initial, p_states, at, o_v, m_state, o_state, first, n_token, SEGMENT: tl.constexpr,
                   form: tl.constexpr):  # fmt: skip
    """The state before a segment, its first token being `first`: the initial one, or a saved one."""
    b_h = tl.zeros((o_v.shape[0], at.row.shape[0], o_v.shape[2]), form.dtype)
    if first == 0:  # noqa: SIM102
        if p_initial is not None:
            b_h = load(p_initial, o_state, m_state, form.dtype)
    if p_states is not None:  # noqa: SIM102
        if first > 0:
            i_state = at.batch * (tl.cdiv(n_token, SEGMENT) - 1) + first // SEGMENT - 1
            o_saved = (i_state * (form.H * form.P) + at.row)[None, :, None] * form.N + o_v
            b_h = load(p_states, o_saved, m_state, form.dtype)
    return b_h


@triton.jit
def rewalk(b_h, p_scratch, o_scratch, b_A, b_bias, p, o, strides, p_B, B_strides, given, at, o_v, o_w, m_w, m_state,
           n_token, first, n_block, stop, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, form: tl.constexpr):  # fmt: skip
    """Walk a segment forward, its state before every block but the last into scratch: the state before the last."""
    BLOCK: tl.constexpr = b_h.shape[0] * b_h.shape[1] * b_h.shape[2]
    m_first = masked(at, first, stop, BLOCK_T)
    n_x, n_delta = _fetch_write(p, o, strides, m_first, first)
    b_pair = _ready_write(n_x, n_delta, b_bias, m_first, form)
    b_Bs = load_block(p_B, p_B, B_strides, B_strides, o_w, m_w, first, stop, BLOCK_T, False)
    tl.debug_barrier()
    for i_block in tl.range(0, n_block - 1, num_stages=STAGES):
        tl.store(p_scratch + i_block * BLOCK + o_scratch, b_h)
        t = first + i_block * BLOCK_T
        n_t = t + BLOCK_T
        m_next = masked(at, n_t, stop, BLOCK_T)
        n_x, n_delta = _fetch_write(p, o, strides, m_next, n_t)
        n_Bs = load_block(p_B, p_B, B_strides, B_strides, o_w, m_w, n_t, stop, BLOCK_T, False)
        starts = load_starts(given, at, n_token, t, stop, BLOCK_T, form.dtype)
        b_delta, b_write = tl.split(b_pair)
        hs = states_of(b_h, b_A, columns(b_delta), columns(b_write), b_Bs, starts, given, at, o_v, m_state, n_token, t,
                     stop, form)  # fmt: skip
        b_h = hs[BLOCK_T]
        b_pair = _ready_write(n_x, n_delta, b_bias, m_next, form)
        b_Bs = n_Bs
    tl.debug_barrier()
    return b_h


@triton.jit
def states_of(b_h, b_A, deltas, writes, b_BCs, starts, given, at, o_v, m_state, n_token, t, stop, form: tl.constexpr):
    """The state before a block of tokens, and after each of them."""
    hs = (b_h,)
    for j in tl.static_range(len(deltas) // 4):
        Bs = tokens4(widened(b_BCs[2 * j], form.B_dtype, form.dtype))
        for u in tl.static_range(4):
            b_delta_t = deltas[4 * j + u]
            b_decay, _ = decay_at(b_A, b_delta_t, starts, 4 * j + u, given, at, o_v, m_state, n_token, t, stop, form)
            b_in, _ = write_at(b_A, b_delta_t, writes[4 * j + u], Bs[u], form)
            b_h = b_decay * b_h + b_in
            hs = hs + (b_h,)  # noqa: RUF005
    return hs


@triton.jit
def _fetch_write(p, o, strides, m, t):
    """x and delta of the block of tokens from t on."""
    i_t = t.to(tl.int64)
    n_x = tl.load(p.x + i_t * strides.x[1] + o.x, mask=m, other=0.0)
    return n_x, tl.load(p.delta + i_t * strides.delta[1] + o.delta, mask=m, other=0.0)


@triton.jit
def _ready_write(n_x, n_delta, b_bias, m, form: tl.constexpr):
    """delta beside delta x, by (row, token)."""
    b_delta = tl.where(m, step_size(n_delta.to(form.dtype) + b_bias, form.SOFTPLUS, form.MIN, form.MAX), 0.0)
    return tl.join(b_delta, b_delta * n_x.to(form.dtype))
