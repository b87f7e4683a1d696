"""Sums over the rows or the states of tiles (high, row, low): of what a thread has, then by halves between threads.

Of a tile's 4 tokens, or of 2 times 4, the sums go together: each exchange between threads halves what is left of all of
them, where one sum after another would exchange all of it every time.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import triton
import triton.language as tl

__all__ = ["few_rows", "over_rows", "over_states", "tokens4"]


@triton.jit
def few_rows(tile, WARPS: tl.constexpr):
    """Sum over rows of one thread: (high, as many rows as there are threads for, low)."""
    LANES: tl.constexpr = 32 * WARPS // tile.shape[0] if tile.shape[0] < 32 * WARPS else 1
    if tile.shape[1] > LANES:
        tile = tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // LANES, LANES, tile.shape[2])), axis=1)
    return tile


@triton.jit
def over_rows(t):
    """Of 4 tokens, each (high, rows, low, 2), the sums over rows: (high, low, 2, 4). Halves move, not copies."""
    both = tl.join(tl.join(t[0], t[2]), tl.join(t[1], t[3]))  # (high, rows, low, 2, 2, 2)
    HIGH: tl.constexpr = t[0].shape[0]
    ROWS: tl.constexpr = t[0].shape[1]
    LOW: tl.constexpr = t[0].shape[2]
    both = tl.reshape(tl.permute(both, (0, 2, 3, 4, 5, 1)), (HIGH, LOW, 2, 4, ROWS))
    for i in tl.static_range(6):  # noqa: B007
        if both.shape[4] > 1:
            first, second = tl.split(tl.reshape(both, (HIGH, LOW, 2, 4, both.shape[4] // 2, 2)))
            both = first + second
    return tl.reshape(both, (HIGH, LOW, 2, 4))


@triton.jit
def _over_states4(t0, t1, t2, t3):
    """Of 4 tokens, each (high, row), the sums over states: (row, 4)."""
    HIGH: tl.constexpr = t0.shape[0]
    ROWS: tl.constexpr = t0.shape[1]
    both = tl.join(tl.join(t0, t2), tl.join(t1, t3))
    both = tl.reshape(tl.permute(both, (1, 2, 3, 0)), (ROWS, 4, HIGH))
    for i in tl.static_range(6):  # noqa: B007
        if both.shape[2] > 1:
            first, second = tl.split(tl.reshape(both, (ROWS, 4, both.shape[2] // 2, 2)))
            both = first + second
    return tl.reshape(both, (ROWS, 4))


@triton.jit
def over_states(t):
    """Tokens, 4 or 8 or 16, each (high, row), summed over states: (row, token)."""
    if len(t) == 4:
        return _over_states4(t[0], t[1], t[2], t[3])
    else:
        n: tl.constexpr = len(t) // 2
        both = tl.join(over_states(t[:n]), over_states(t[n:]))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (both.shape[0], 2 * n))


@triton.jit
def tokens4(tile):
    """(4, high, low, ...) -> the 4 tokens, each (high, 1, low, ...)."""
    if len(tile.shape) == 3:
        tile = tl.reshape(tl.permute(tile, (1, 2, 0)), tile.shape[1:] + (2, 2))  # noqa: RUF005
    else:
        tile = tl.reshape(tl.permute(tile, (1, 2, 3, 0)), tile.shape[1:] + (2, 2))  # noqa: RUF005
    even, odd = tl.split(tile)
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0[:, None], t1[:, None], t2[:, None], t3[:, None]
