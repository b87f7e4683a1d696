"""Where a program works: its rows, their states, the tokens of a block, and where those lie in memory.

A row is one head_channel of one head; a program has BLOCK_R of one group and one batch item. Tensors that belong
together travel as a NamedTuple, for Triton a tuple with names: None may be in one that is passed, not in one returned.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["Kept", "Rows", "first", "kept_rows", "load", "masked", "pairs_at", "program_rows", "states_at"]


class Rows(NamedTuple):
    """The rows of a program: of which batch item and group; the others are (row,)."""

    batch: tl.tensor
    group: tl.tensor
    row: tl.tensor
    head: tl.tensor
    mask: tl.tensor


class Kept(NamedTuple):
    """Where a program's rows are emitted, (row,): the slot of their head, which are asked for, and which of those begin
    their head."""

    slot: tl.tensor
    rows: tl.tensor
    heads: tl.tensor


@triton.jit
def load(p, o, mask, dtype: tl.constexpr):
    """In the compute dtype; 0 behind the mask."""
    return tl.load(p + o, mask=mask, other=0.0).to(dtype)


@triton.jit
def program_rows(H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of a grid: blocks of rows x any x (batch x group)."""
    ROWS: tl.constexpr = H // G * P
    i_batch = (tl.program_id(2) // G).to(tl.int64)
    i_group = tl.program_id(2) % G
    o_local = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row = i_group * ROWS + o_local
    o_head = o_row // P
    m_row = o_local < ROWS if ROWS % BLOCK_R else tl.full((BLOCK_R,), True, tl.int1)
    return Rows(i_batch, i_group, o_row, o_head, m_row)


@triton.jit
def kept_rows(p_head_slot, at, P: tl.constexpr):
    """The rows `at` as they are emitted; each where it is without p_head_slot."""
    b_slot = at.head
    m_kept = at.mask
    if p_head_slot is not None:
        b_slot = tl.load(p_head_slot + at.head, mask=at.mask, other=-1)
        m_kept = at.mask & (b_slot >= 0)
    return Kept(b_slot, m_kept, m_kept & (at.row % P == 0))


@triton.jit
def states_at(HIGH: tl.constexpr, LOW: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr = 1):
    """A state is (high, low), low contiguous in memory: its number, and whether there is one, as a tile with one more
    axis: (1, high, low), or with AXIS 0 (high, 1, low)."""
    SHAPE: tl.constexpr = (HIGH, 1, LOW) if AXIS == 0 else (1, HIGH, LOW)
    o_high = tl.arange(0, HIGH)
    o_v = (o_high[:, None, None] if AXIS == 0 else o_high[None, :, None]) * LOW + tl.arange(0, LOW)[None, None, :]
    m_v = o_v < N if N < HIGH * LOW else tl.full(SHAPE, True, tl.int1)
    return o_v, m_v


@triton.jit
def first(p, strides, at, t, GROUPED: tl.constexpr = False):
    """Where a tensor (batch, token, ...) has token t of the batch item, and GROUPED of the group, its third axis."""
    o_first = at.batch * strides[0] + t * strides[1]
    if GROUPED:
        o_first += at.group * strides[2]
    return p + o_first


@triton.jit
def pairs_at(at, o_token, strides, P: tl.constexpr):
    """Where (row, token) pairs lie in a tensor (batch, token, head) or (batch, token, head, head_channel), from a token
    of the batch item on."""
    o_row = at.head.to(tl.int64) * strides[2]
    if len(strides) == 4:
        o_row += at.row % P * strides[3]
    return o_row[:, None] + o_token[None, :] * strides[1]


@triton.jit
def masked(at, t, stop, BLOCK_T: tl.constexpr):
    """Which (row, token) pairs of the block from t on there are."""
    return at.mask[:, None] & (t + tl.arange(0, BLOCK_T) < stop)[None, :]
