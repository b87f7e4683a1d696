"""B and C of a block of tokens, on their way from memory to the step that needs them.

They are loaded one block ahead, of every 4 tokens a tile (4, high, low), and wait in registers or in shared memory.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

__all__ = ["load_block", "load_states", "widened"]


@triton.jit
def load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t, stop, BLOCK_T: tl.constexpr,
                BOTH: tl.constexpr = True, HELD: tl.constexpr = False):  # fmt: skip
    """B and C of BLOCK_T tokens from t on, where the pointers point: of every 4, tiles (4, high, low), as `_held`. B
    twice unless BOTH."""
    tiles = ()
    for j in tl.static_range(BLOCK_T // 4):
        o_four = 4 * j + tl.arange(0, 4)
        mask = (t + o_four < stop)[:, None, None] & m_v
        b_B = tl.load(p_B + o_four[:, None, None] * B_strides[1] + o_v * B_strides[3], mask=mask, other=0.0)
        b_C = b_B
        if BOTH:
            b_C = tl.load(p_C + o_four[:, None, None] * C_strides[1] + o_v * C_strides[3], mask=mask, other=0.0)
        tiles = tiles + (_held(b_B, HELD), _held(b_C, HELD))  # noqa: RUF005
    return tiles


@triton.jit
def load_block(p_B, p_C, B_strides, C_strides, o_v, m_v, t, stop, BLOCK_T: tl.constexpr, BOTH: tl.constexpr = True):
    """The same, where the pointers point to the batch item's first token."""
    i_t = t.to(tl.int64)
    p_B += i_t * B_strides[1]
    p_C += i_t * C_strides[1]
    return load_states(p_B, p_C, B_strides, C_strides, o_v, m_v, t, stop, BLOCK_T, BOTH)


@triton.jit
def _held(tile, HELD: tl.constexpr):
    """A tile (4, high, low) as it waits for its turn. Of 16-bit numbers in registers, two are HELD in one: those that
    are widened take a register each, and the widening would wait for the load."""
    if tile.dtype.primitive_bitwidth != 16:
        return tile
    elif HELD and tile.shape[2] > 1:
        pairs = tl.reshape(tile.to(tl.uint16, bitcast=True), tile.shape[:2] + (tile.shape[2] // 2, 2))  # noqa: RUF005
        first, second = tl.split(pairs)
        return first.to(tl.uint32) | (second.to(tl.uint32) << 16)
    else:
        return tile.to(tl.float32)


@triton.jit
def widened(tile, element: tl.constexpr, dtype: tl.constexpr):
    """The tile (4, high, low) that is `_held`, in the compute dtype."""
    if tile.dtype == tl.uint32:
        first = (tile & 0xFFFF).to(tl.uint16).to(element, bitcast=True).to(dtype)
        second = (tile >> 16).to(tl.uint16).to(element, bitcast=True).to(dtype)
        return tl.reshape(tl.join(first, second), tile.shape[:2] + (2 * tile.shape[2],))  # noqa: RUF005
    else:
        return tile.to(dtype)
