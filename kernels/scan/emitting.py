"""What the kernel of `fused` emits: of one token, in (row, high, low), and of a block's (row, token) pairs."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from mamba_probe.kernels.scan.places import kept_rows

__all__ = ["Emitted", "emit_block", "emit_token", "slots"]


class Emitted(NamedTuple):
    """Pointers, each None where it is not asked for; and the slots of the tokens, None where every token has one."""

    delta: tl.tensor
    cumsum: tl.tensor
    A_bar: tl.tensor
    B_bar: tl.tensor
    h: tl.tensor
    y: tl.tensor
    energy: tl.tensor
    token_slot: tl.tensor


class Slots(NamedTuple):
    """Where a program's rows are emitted: `Kept`, and in a token's (head, state) and (head, head_channel, state)."""

    slot: tl.tensor
    rows: tl.tensor
    heads: tl.tensor
    of_head: tl.tensor
    of_row: tl.tensor
    m_v: tl.tensor


@triton.jit
def slots(p_head_slot, at, o_v, m_v, P: tl.constexpr, N: tl.constexpr):
    """The slots of the rows `at`, of states (row, high, low)."""
    kept = kept_rows(p_head_slot, at, P)
    o_slot = kept.slot[:, None, None] * N + o_v
    o_h = (kept.slot * P + at.row % P)[:, None, None] * N + o_v
    return Slots(kept.slot, kept.rows, kept.heads, o_slot, o_h, m_v)


@triton.jit
def emit_token(e, kept, b_cumsum, b_decay, b_delta, b_B, b_phi, b_h, i_kept, t, u, stop,
               ZOH: tl.constexpr, KEPT_HEAD: tl.constexpr, P: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """What is asked for of token t + u, the block's u-th."""
    b_B_bar = b_delta[:, None, None] * b_B
    if ZOH:
        b_B_bar *= b_phi
    m_token = kept.slot * 0 + (t + u) < stop  # a tile: the interpreter needs one
    i_head = i_kept * KEPT_HEAD + u * KEPT_HEAD
    if e.token_slot is not None:
        i_slot = tl.load(e.token_slot + tl.minimum(t + u, stop - 1))
        m_token = m_token & (kept.slot * 0 + i_slot >= 0)
        i_head = (i_kept + i_slot) * KEPT_HEAD
    m_slot = (kept.heads & m_token)[:, None, None] & kept.m_v
    if e.cumsum is not None:
        tl.store(e.cumsum + i_head + kept.slot, b_cumsum, mask=kept.heads & m_token)
    if e.A_bar is not None:
        tl.store(e.A_bar + i_head * N + kept.of_head, b_decay.to(e.A_bar.dtype.element_ty), mask=m_slot)
    if e.B_bar is not None:
        tl.store(e.B_bar + i_head * N + kept.of_head, b_B_bar.to(e.B_bar.dtype.element_ty), mask=m_slot)
    if e.h is not None:
        m_h = (kept.rows & m_token)[:, None, None] & kept.m_v
        tl.store(e.h + i_head * (P * N) + kept.of_row, b_h.to(e.h.dtype.element_ty), mask=m_h)


@triton.jit
def emit_block(e, kept, at, b_delta, b_y, b_energy, i_kept, t, stop, mask,
               KEPT_HEAD: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """What is asked for of a block's (row, token) pairs."""
    i_head = i_kept * KEPT_HEAD
    o_token = tl.arange(0, b_y.shape[1])
    o_kept = o_token[None, :] * KEPT_HEAD
    mask = mask & kept.rows[:, None]
    if e.token_slot is not None:
        b_token = tl.load(e.token_slot + t + o_token, mask=t + o_token < stop, other=-1)
        mask = mask & (b_token >= 0)[None, :]
        o_kept = b_token.to(tl.int64)[None, :] * KEPT_HEAD
    o_pair = o_kept + kept.slot[:, None]
    o_channel = o_pair * P + (at.row % P)[:, None]
    if e.delta is not None:
        tl.store(e.delta + i_head + o_pair, b_delta, mask=mask & (at.row % P == 0)[:, None])
    if e.y is not None:
        tl.store(e.y + i_head * P + o_channel, b_y, mask=mask)
    if e.energy is not None:
        tl.store(e.energy + i_head * P + o_channel, b_energy, mask=mask)
