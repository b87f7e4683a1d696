"""What the kernels do to one number at a time: float32 by the hardware's exp2, float64 by the exact functions."""

# Triton gives its constexpr, ranges and tensors no types that a checker could follow.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = [
    "LN2",
    "LOG2E",
    "bounded",
    "clamp",
    "decay",
    "phi1",
    "phi1_slope",
    "silu",
    "silu_and_slope",
    "step_size",
    "step_slope",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E_REST = tl.constexpr(1.3349758157512938e-8)
"""(log2(e) - LOG2E in float32) ln 2: what float32 leaves off of LOG2E."""


@triton.jit
def clamp(value, low, high):
    """NaN stays NaN, as in torch; Triton's default would hide it."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounded(value):
    """Within the range of its type: 0 times it is 0. NaN stays NaN."""
    LIMIT: tl.constexpr = 1.7976931348623157e308 if value.dtype == tl.float64 else 3.4028234663852886e38
    limit = tl.full(value.shape, LIMIT, value.dtype)
    return clamp(value, -limit, limit)


@triton.jit
def _exp(x):
    """exp(x) for x <= 0: 2^z of the rounded z = x log2(e), and what the rounding left off to first order."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)  # exp is 0 there; of -inf the rest would be NaN
    z = x * LOG2E
    rest = tl.fma(x, LOG2E, -z) * LN2 + x * LOG2E_REST
    e = tl.exp2(z)
    return tl.fma(e, rest, e)


@triton.jit
def decay(z, NARROW: tl.constexpr = False):
    """2^z. The hardware's errs alike from token to token, which a long memory adds up.

    Near 0, where memory is long, its series therefore (relative error 2e-9 before rounding), but for 16-bit inputs.
    """
    if NARROW or z.dtype == tl.float64:
        return tl.exp2(z)
    p = 9.618129e-3 * z + 5.550411e-2
    p = p * z + 0.24022651
    p = p * z + 0.69314718
    return tl.where(tl.abs(z) < 0.0625, 1.0 + z * p, tl.exp2(z))


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1, also relative to a small u, which log alone would lose."""
    if u.dtype == tl.float64:
        w = 1.0 + u
        return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    p = 5.23268791e-3 * u - 2.950521332e-2  # log1p(u) / u, the best of degree 8: relative error 3e-8
    p = p * u + 7.822591042e-2
    p = p * u - 1.366324228e-1
    p = p * u + 1.910600511e-1
    p = p * u - 2.484298179e-1
    p = p * u + 3.331909675e-1
    p = p * u - 4.999949314e-1
    p = p * u + 9.999999699e-1
    return p * u


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """softplus (the identity above 20) where asked for, then the limits."""
    if SOFTPLUS:
        soft = tl.maximum(raw, 0.0) + _log1p(_exp(-tl.abs(raw)))
        raw = tl.where(raw > 20.0, raw, soft)
    if not SOFTPLUS or LOW > 0.0 or HIGH != float("inf"):
        raw = clamp(raw, tl.full((1, 1), LOW, raw.dtype), tl.full((1, 1), HIGH, raw.dtype))
    return raw


@triton.jit
def step_slope(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """d step_size / d raw; at a limit itself 1, as torch's."""
    slope = tl.full(raw.shape, 1.0, raw.dtype)
    value = raw
    if SOFTPLUS:
        e = _exp(-tl.abs(raw))
        slope = tl.where(raw > 20.0, 1.0, tl.where(raw < 0.0, e, 1.0) / (1.0 + e))
        if LOW > 0.0 or HIGH != float("inf"):
            value = step_size(raw, SOFTPLUS, 0.0, float("inf"))
    if not SOFTPLUS or LOW > 0.0 or HIGH != float("inf"):
        within = (value >= tl.full((1, 1), LOW, raw.dtype)) & (value <= tl.full((1, 1), HIGH, raw.dtype))
        slope = tl.where(within, slope, 0.0)
    return slope


@triton.jit
def silu(z, NARROW: tl.constexpr = False):
    """z / (1 + exp(-z)); what is rounded to 16 bits afterwards takes the fast way, wrong by 1e-6."""
    if NARROW:
        root = tl.rsqrt(1.0 + tl.exp2(-z * LOG2E))
        return z * (root * root)
    e = _exp(-tl.abs(z))
    return z * tl.where(z < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def silu_and_slope(z):
    """silu(z) and its derivative."""
    e = _exp(-tl.abs(z))
    scale = 1.0 / (1.0 + e)
    one = tl.where(z < 0.0, e, 1.0) * scale
    other = tl.where(z < 0.0, 1.0, e) * scale
    return z * one, one * (1.0 + z * other)


@triton.jit
def phi1(z, exp_z):
    """(exp(z) - 1) / z, by its series near 0."""
    near = tl.abs(z) < 0.5
    s = tl.where(near, z, 0.0)
    series = 1.0 + s * 0.0
    for k in tl.static_range(16, 1, -1):
        series = 1.0 + s * (1.0 / k) * series
    return tl.where(near, series, (exp_z - 1.0) / tl.where(near, 1.0, z))


@triton.jit
def phi1_slope(z, exp_z, phi):
    """phi1'(z) = (exp(z) - phi1(z)) / z, by its series near 0."""
    near = tl.abs(z) < 0.5
    s = tl.where(near, z, 0.0)
    series = 1.0 + s * 0.0
    for k in tl.static_range(15, 0, -1):
        series = 1.0 + s * ((k + 1.0) / (k * (k + 2.0))) * series
    return tl.where(near, 0.5 * series, (exp_z - phi) / tl.where(near, 1.0, z))
