"""A block of tokens backward: dL/dh through each of them, and what each of them leaves in all other gradients."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from mamba_probe.kernels.scan.discretization import decay_at
from mamba_probe.kernels.scan.elementwise import LN2, LOG2E, phi1, phi1_slope
from mamba_probe.kernels.scan.folds import few_rows, over_rows, tokens4
from mamba_probe.kernels.scan.loads import widened
from mamba_probe.kernels.scan.places import load

__all__ = ["back"]


@triton.jit
def back(b_g, b_sum, hs, b_A, deltas, writes, dys, b_BCs, starts, given, g, d, at, kept, o_v, m_v, m_state, i_kept, t,
         n_token, n_batch, stop, form: tl.constexpr):  # fmt: skip
    """A block of tokens, the last one first, with hs before and after each: g before them; dA so far, or LOCAL the log2
    of the decay; and of each token, (row,), the sums over states u, v, A q (see `_token`) and C h."""
    us = ()
    vs = ()
    qs = ()
    ys = ()
    for j in tl.static_range(len(deltas) // 4 - 1, -1, -1):
        both = ()
        b_B4 = widened(b_BCs[2 * j], form.B_dtype, form.dtype)
        BCs = tokens4(tl.join(b_B4, widened(b_BCs[2 * j + 1], form.C_dtype, form.dtype)))
        for u in tl.static_range(3, -1, -1):
            b_B, b_C = tl.split(BCs[u])
            b_dy_t = dys[4 * j + u][None, :, None]
            i_up, m_up = _upstream_place(g, kept, i_kept, t, 4 * j + u, stop, n_token, form)
            b_g += b_dy_t * b_C
            if g.h is not None:
                o_h = ((i_up + kept.slot) * form.P + at.row % form.P)[None, :, None] * form.N + o_v
                b_g += load(g.h, o_h, m_up[None, :, None] & m_v, form.dtype)
            b_decay, b_log2 = decay_at(b_A, deltas[4 * j + u], starts, 4 * j + u, given, at, o_v, m_state, n_token, t,
                                       stop, form)  # fmt: skip
            if form.LOCAL:
                if form.WHOLE:
                    b_sum += b_log2
                b_g *= b_decay
            else:
                if form.GATED:
                    ys = (tl.sum(hs[4 * j + u + 1] * b_C, axis=2),) + ys  # noqa: RUF005
                b_dC = few_rows(b_dy_t * hs[4 * j + u + 1], form.WARPS)
                b_g, b_sum, b_dB, b_u, b_v, b_q = _token(
                    b_g, b_sum, hs[4 * j + u], b_decay, b_A, deltas[4 * j + u][None, :, None],
                    writes[4 * j + u][None, :, None], b_B, g, d, at, kept, o_v, m_v, m_state, i_up, m_up, n_token,
                    t, 4 * j + u, stop, form)  # fmt: skip
                us = (b_u,) + us  # noqa: RUF005
                vs = (b_v,) + vs  # noqa: RUF005
                qs = (b_q,) + qs  # noqa: RUF005
                both = (tl.join(few_rows(b_dB, form.WARPS), b_dC),) + both  # noqa: RUF005
        if not form.LOCAL:
            _store_both(d, over_rows(both), at, t, 4 * j, n_token, n_batch, stop, form)
    return b_g, b_sum, us, vs, qs, ys


@triton.jit
def _token(b_g, b_dA, b_h, b_decay, b_A, b_delta, b_write, b_B, g, d, at, kept, o_v, m_v, m_state, i_up, m_up, n_token,
           t, u: tl.constexpr, stop, form: tl.constexpr):  # fmt: skip
    """Through token t + u, with b_h before it: g before it; dA so far; what is summed over rows to dB; and (row,),
    summed over states: u, what dx has of delta; v, what ddelta has of x (u, but for ZOH); and A q."""
    b_gB = b_g * b_B
    b_gw = b_g * b_write
    b_u = b_gB
    b_v = b_gB
    if form.ZOH:
        b_z = b_delta * b_A * LN2
        b_exp = tl.exp2(b_z * LOG2E)
        b_phi = phi1(b_z, b_exp)
        b_phi_slope = phi1_slope(b_z, b_exp, b_phi) * b_delta
        b_dA += b_gB * b_write * b_phi_slope
        b_u = b_gB * b_phi
        b_v = b_gB * b_exp
        b_gw *= b_phi
    b_u = tl.sum(b_u, axis=2)
    b_v = tl.sum(b_v, axis=2)
    b_g *= b_decay
    b_q = b_g * b_h
    o_one = (i_up + kept.slot)[None, :, None] * form.N + o_v
    m_one = (m_up & (at.row % form.P == 0))[None, :, None] & m_v
    if g.A_bar is not None:
        b_q += b_decay * load(g.A_bar, o_one, m_one, form.dtype)
    b_qA = b_q * b_A
    if d.log is None:
        b_dA += b_q * b_delta
    else:
        o_log = ((at.batch * n_token + t + u) * (form.H * form.P) + at.row)[None, :, None] * form.N + o_v
        tl.store(d.log + o_log, b_q, mask=m_state & (at.row * 0 + (t + u) < stop)[None, :, None])
        b_qA *= 0.0
    if g.B_bar is not None:
        b_up = load(g.B_bar, o_one, m_one, form.dtype)
        b_upB = b_up * b_B
        b_up *= b_delta
        if form.ZOH:
            b_dA += b_upB * b_phi_slope * b_delta
            b_upB *= b_exp
            b_up *= b_phi
        b_gw += b_up
        b_qA += b_upB * LOG2E
    return b_g, b_dA, b_gw, b_u, b_v, tl.sum(b_qA, axis=2)


@triton.jit
def _store_both(d, b_both, at, t, first: tl.constexpr, n_token, n_batch, stop, form: tl.constexpr):
    """The program's part of dB and dC, which lies behind dB, of a block's 4 tokens from its `first` on."""
    HIGH: tl.constexpr = b_both.shape[0]
    LOW: tl.constexpr = b_both.shape[1]
    i_part = (tl.program_id(0).to(tl.int64) * n_batch + at.batch) * n_token + t
    o_both = tl.arange(0, HIGH)[:, None, None, None] * LOW + tl.arange(0, LOW)[None, :, None, None]
    o_four = first + tl.arange(0, 4)[None, None, None, :]
    o_which = tl.arange(0, 2)[None, None, :, None]
    m_both = (t + o_four < stop) & (o_both < form.N) & (o_which >= 0)
    o_part = ((i_part + o_four) * form.G + at.group) * form.N + o_both
    o_part += o_which * (tl.num_programs(0).to(tl.int64) * n_batch * n_token * form.G * form.N)
    tl.store(d.B + o_part, b_both, mask=m_both)


@triton.jit
def _upstream_place(g, kept, i_kept, t, u: tl.constexpr, stop, n_token, form: tl.constexpr):
    """Of token t + u: where its first head is emitted, and which rows are."""
    m_up = kept.rows & (kept.slot * 0 + (t + u) < stop)  # a tile: the interpreter needs one
    i_up = (i_kept + t + u) * form.KEPT_HEAD
    if g.token_slot is not None:
        i_slot = tl.load(g.token_slot + tl.minimum(t + u, n_token - 1))
        m_up = m_up & (kept.slot * 0 + i_slot >= 0)
        i_up = (i_kept + i_slot) * form.KEPT_HEAD
    return i_up, m_up
