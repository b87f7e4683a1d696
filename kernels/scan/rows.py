"""A tile of 4, 8 or 16 tokens <-> its tokens one by one, each kept in registers (`tl.split` and `tl.join`).

What belongs to a (row, token) pair is computed on a tile, each pair by one thread; the recurrence then needs one token
at a time, in every thread that holds states of that row.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["columns", "from_columns", "slices"]


@triton.jit
def _columns4(tile):
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def _columns8(tile):
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 4, 2)))
    e, o = _columns4(even), _columns4(odd)
    return e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3]


@triton.jit
def columns(tile):
    """(row, token) -> the tokens, each (row,)."""
    n: tl.constexpr = tile.shape[1]
    tl.static_assert(n == 4 or n == 8 or n == 16)
    if n == 4:
        return _columns4(tile)
    elif n == 8:
        return _columns8(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 8, 2)))
        e, o = _columns8(even), _columns8(odd)
        return (e[0], o[0], e[1], o[1], e[2], o[2], e[3], o[3], e[4], o[4], e[5], o[5], e[6], o[6], e[7], o[7])


@triton.jit
def _from4(t0, t1, t2, t3):
    both = tl.join(tl.join(t0, t2), tl.join(t1, t3))
    return tl.reshape(both, (t0.shape[0], 4))


@triton.jit
def _from8(t0, t1, t2, t3, t4, t5, t6, t7):
    both = tl.join(_from4(t0, t2, t4, t6), _from4(t1, t3, t5, t7))
    return tl.reshape(both, (t0.shape[0], 8))


@triton.jit
def from_columns(t):
    """4, 8 or 16 tokens, each (row,) -> (row, token)."""
    n: tl.constexpr = len(t)
    if n == 4:
        return _from4(t[0], t[1], t[2], t[3])
    elif n == 8:
        return _from8(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7])
    else:
        even = _from8(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])
        odd = _from8(t[1], t[3], t[5], t[7], t[9], t[11], t[13], t[15])
        return tl.reshape(tl.join(even, odd), (t[0].shape[0], 16))


@triton.jit
def slices(tile):
    """(4, high, low, ...) -> the 4 tokens, each (1, high, low, ...)."""
    if len(tile.shape) == 3:
        return _slices(tl.permute(tile, (1, 2, 0)), tile.shape[1:])
    else:
        return _slices(tl.permute(tile, (1, 2, 3, 0)), tile.shape[1:])


@triton.jit
def _slices(tile, shape: tl.constexpr):
    even, odd = tl.split(tl.reshape(tile, shape + (2, 2)))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0[None], t1[None], t2[None], t3[None]
