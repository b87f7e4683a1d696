"""Matrix products on the tensor cores that lose nothing: a float32 operand as the sum of several bfloat16.

A float32 number is the sum of three of those, cut, not rounded, so that all have its sign; a float16 one of two. Of
three terms by three, those products are left out that are below 2^-21 of the largest, 2^-24 on average.
"""

# Triton's types know neither constexpr arguments nor loops over static_range.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["dot", "narrowed", "terms"]


@triton.jit
def _cut(v):
    """float32 without the bits that bfloat16 has not."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def terms(v, dtype: tl.constexpr, SPLIT: tl.constexpr):
    """Terms that the tensor cores multiply, and whose sum is v; v itself in `dtype` where nothing is split."""
    if not SPLIT:
        return (v.to(dtype),)
    elif v.dtype == tl.bfloat16:
        return (v,)
    elif v.dtype == tl.float16:
        high = v.to(tl.bfloat16)
        return (high, (v.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16))
    else:
        high = _cut(v)
        middle = _cut(v - high)
        low = (v - high) - middle
        return (high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16))


@triton.jit
def narrowed(v, dtype: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """As `terms`, but one term where EXACT is not asked for."""
    if SPLIT and not EXACT:
        return (v.to(tl.bfloat16),)
    else:
        return terms(v, dtype, SPLIT)


@triton.jit
def dot(a, b, acc, N_A: tl.constexpr, N_B: tl.constexpr, TRANS_A: tl.constexpr = False, TRANS_B: tl.constexpr = False):
    """acc + a b for N_A terms of a and N_B of b, the small products first: tensor cores cut off what acc cannot hold.

    Triton 3.6 tells functions apart by the tensors they are given, not by the tuples these come in: hence N_A, N_B.
    """
    for order in tl.static_range(2, -1, -1):
        for i in tl.static_range(N_A):
            for j in tl.static_range(N_B):
                if i + j == order:
                    left = tl.trans(a[i]) if TRANS_A else a[i]
                    right = tl.trans(b[j]) if TRANS_B else b[j]
                    acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc
