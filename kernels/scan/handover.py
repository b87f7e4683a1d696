"""How the programs of one launch hand a sequence's state on, from span to span.

Program i_span * n_sequence + i_sequence has one span of one sequence. It waits only for programs of lower number, which
have handed over or go on to do so without it. Programs are numbered as they start, not by their place in the grid: that
those of lower number run already is then certain. The first of the flags counts them; all are zero before the launch.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["hand_over", "numbered", "received"]


@triton.jit
def numbered(p_flag):
    """This program's number, by the order in which programs start; its place in the grid where nothing is handed on."""
    i_program = tl.program_id(0)
    if p_flag is not None:
        i_program = tl.atomic_add(p_flag, 1, sem="relaxed")
    return i_program


@triton.jit
def _places(b_h):
    return tl.arange(0, b_h.shape[0]).to(tl.int64)[:, None] * b_h.shape[1] + tl.arange(0, b_h.shape[1])[None, :]


@triton.jit
def _decays(p_handed, n_sequence, SIZE: tl.constexpr):
    """Behind the states of all spans but the last, their decays."""
    return p_handed + (tl.num_programs(0) - n_sequence).to(tl.int64) * SIZE


@triton.jit
def hand_over(p_handed, p_flag, i_program, n_sequence, b_h, b_whole):
    """Leave a state, and the decay that takes what came before it along."""
    SIZE: tl.constexpr = b_h.shape[0] * b_h.shape[1]
    i_wide = tl.cast(i_program, tl.int64)
    tl.store(p_handed + i_wide * SIZE + _places(b_h), b_h)
    tl.store(_decays(p_handed, n_sequence, SIZE) + i_wide, b_whole)
    tl.debug_barrier()  # all of the program's stores come before the flag
    tl.atomic_xchg(p_flag + 1 + i_wide, 1, sem="release")


@triton.jit
def received(p_handed, p_flag, i_program, n_sequence, b_h, LOCAL: tl.constexpr):
    """The state before this program's span: what the one before it left. Where LOCAL, each span left what it makes of
    nothing, and b_h is the state before the first; otherwise b_h is returned where there is none before."""
    SIZE: tl.constexpr = b_h.shape[0] * b_h.shape[1]
    i_span = i_program // n_sequence
    i_sequence = i_program % n_sequence
    for i in range(0 if LOCAL else tl.maximum(i_span - 1, 0), i_span):
        i_left = tl.cast(i * n_sequence + i_sequence, tl.int64)
        while tl.atomic_add(p_flag + 1 + i_left, 0, sem="acquire") == 0:
            pass
        b_handed = tl.load(p_handed + i_left * SIZE + _places(b_h))
        if LOCAL:
            b_handed += b_h * tl.load(_decays(p_handed, n_sequence, SIZE) + i_left)
        b_h = b_handed
    return b_h
