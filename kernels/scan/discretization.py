"""A_bar and B_bar of a token in all states of a tile, and what they are made of: shared by the scan and its backward.

A tile of states is (row, high, low), or with AXIS 0 (high, row, low).
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from mamba_probe.kernels.scan.elementwise import LN2, LOG2E, decay, phi1
from mamba_probe.kernels.scan.places import load
from mamba_probe.kernels.scan.rows import columns

__all__ = ["Given", "decay_at", "load_starts", "spread", "write_at"]


class Given(NamedTuple):
    """Pointers to what is given or is None: where tokens begin a sequence, and the logarithm of the decay."""

    starts: tl.tensor
    log_decay: tl.tensor


@triton.jit
def spread(b, AXIS: tl.constexpr):
    """(row,) with the axes of a tile of states."""
    return b[None, :, None] if AXIS == 0 else b[:, None, None]


@triton.jit
def load_starts(given, at, n_token, t, stop, BLOCK_T: tl.constexpr, dtype: tl.constexpr):
    """Whether they begin a sequence: the tokens of a block, each (row,); nothing where it is not given."""
    if given.starts is None:
        return ()
    else:
        o_token = tl.arange(0, BLOCK_T)
        p_start = given.starts + at.batch * n_token + t + o_token
        b_starts = tl.load(p_start, mask=t + o_token < stop, other=0).to(dtype)
        return columns(tl.broadcast_to(b_starts[None, :], (at.row.shape[0], BLOCK_T)))


@triton.jit
def decay_at(b_A, b_delta, starts, u: tl.constexpr, given, at, o_v, m_state, n_token, t, stop,
             form: tl.constexpr):  # fmt: skip
    """A_bar of token t + u, its block's u-th, and its log2; b_A is A log2(e), and b_delta (row,)."""
    if given.log_decay is None:
        b_log2 = spread(b_delta, form.AXIS) * b_A
    else:
        o_log = spread((at.batch * n_token + t + u) * form.H + at.head, form.AXIS) * form.N + o_v
        m_log = m_state & spread(at.row * 0 + (t + u) < stop, form.AXIS)  # a tile: the interpreter needs one
        b_log2 = load(given.log_decay, o_log, m_log, b_A.dtype) * LOG2E
    b_decay = decay(b_log2, form.NARROW)
    if given.starts is not None:
        b_begins = spread(starts[u] > 0.5, form.AXIS)
        b_decay = tl.where(b_begins, 0.0, b_decay)
        b_log2 = tl.where(b_begins, -float("inf"), b_log2)
    return b_decay, b_log2


@triton.jit
def write_at(b_A, b_delta, b_write, b_B, form: tl.constexpr):
    """B_bar x of a token, and with ZOH the factor phi1 of B_bar (else anything); b_write, (row,), is delta x."""
    b_in = spread(b_write, form.AXIS) * b_B
    b_phi = b_in
    if form.ZOH:
        b_z = spread(b_delta, form.AXIS) * b_A * LN2
        b_phi = phi1(b_z, tl.exp2(b_z * LOG2E))
        b_in *= b_phi
    return b_in, b_phi
