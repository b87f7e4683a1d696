"""Ramps of delta, affine in t: two of them make a step that multiplies u (Mamba-1 and -2), or one carries u itself."""

import math

import numpy as np

from mamba_probe.constructions.haar_layout import FLAT, HELD, LOG_DECAY, ONE, SHIFT, Layout, Plan
from mamba_probe.constructions.tables import Mamba2Table, MambaTable

__all__ = ["AMPLITUDE", "delta", "ramps", "ramps_mamba2"]

STATE_RAMPS = "sum of delta times u"
STATE_DELTA = "sum of delta, eps u among it"
SMALL = 2.0**-8  # silu(a u) - silu(-a u) = a u; the part they share, which the states pile up, is a u / 2 of that
AMPLITUDE = 8.0  # "delta" wants |u| under it; delta then falls to 0 within half a token of a knot

CLAIM_RAMPS = """Knot a has two channels with delta = softplus(beta (t - a + 3/4)) and softplus(beta (t - a + 1/4)), no
decay, x = C = 1 and B = silu(u) - silu(-u) = u: the difference of their states is beta / 2 times the sum of u
from a on, and out_proj turns the {windows} sums into {outputs} at its last token. The states grow as beta T^2 / 2:
about T^2 of relative precision is lost, so float64, or T <= 256 in float32."""

CLAIM_RAMPS_MAMBA2 = """Knot a has two heads with delta = softplus(beta (t - a + 3/4)) and softplus(beta (t - a +
1/4)), no decay, B = C = 1 and two channels, x = silu(u / 256) and x = silu(-u / 256), which differ by u / 256: from
the heads' states together the sum of u from a on is read, and out_proj turns the {windows} sums into {outputs} at its
last token. There is no norm before it, which would divide the outputs by their own size. The states grow as beta T^2:
about T^2 of relative precision is lost, so float64, or T <= 256 in float32."""

CLAIM_DELTA = """Knot a has one channel with delta = softplus(beta (t - a + 1/2) + eps u), eps = beta / 16, no decay and
x = B = C = 1: its state is eps times the sum of u from a on, plus beta (T - a)^2 / 2, which D takes away, and
out_proj turns the {windows} sums into {outputs} at its last token. One channel an output, the fewest there can be; for
|u| < 8 and float64 only, as about T^2 of relative precision is lost."""


def ramps(layout: Layout, beta: float) -> Plan:
    """Return the weights: u, -u, the position, the sum of all, the two ramps of each knot."""
    knot, everything = layout.knots, 3
    early, late = everything + 1 + np.arange(len(knot)), everything + 1 + len(knot) + np.arange(len(knot))
    block, sums = layout.block(everything + 1 + 2 * len(knot), rank=1), np.r_[everything, early, late]
    _features(block, layout)
    block.conv_bias[sums] = block.in_proj_z[sums, 2] = ONE
    block.x_proj_B[0, 0], block.x_proj_B[0, 1] = 1, -1
    block.x_proj_C[0, everything] = 1
    block.dt_bias[everything] = FLAT
    block.dt_proj[early, 0], block.dt_bias[early] = beta, beta * (0.75 - knot - SHIFT)
    block.dt_proj[late, 0], block.dt_bias[late] = beta, beta * (0.25 - knot - SHIFT)
    rows = layout.suffix_rows
    block.out_proj[: layout.kernels, everything] = rows[:, 0] / HELD
    block.out_proj[: layout.kernels, early] = rows[:, 1:] * 2 / beta
    block.out_proj[: layout.kernels, late] = -rows[:, 1:] * 2 / beta
    labels = ["u", "-u", "position", f"sum [0, {layout.length})"]
    labels += [f"early ramp {a}" for a in knot] + [f"late ramp {a}" for a in knot]
    return Plan(block, labels, STATE_RAMPS, _ramps_bound(layout, beta), CLAIM_RAMPS)


def ramps_mamba2(layout: Layout, beta: float) -> Plan:
    """Return the weights of a head for the sum of all and two for each knot: in each head u, then -u."""
    knot = layout.knots
    heads = 1 + 2 * len(knot)
    early, late = 1 + np.arange(len(knot)), 1 + len(knot) + np.arange(len(knot))
    block = Mamba2Table.zeros(layout.model, 2 * heads, state=1, head=heads)
    block.conv_x[:, 0] = 1
    block.in_proj_x[0::2, 0], block.in_proj_x[1::2, 0] = SMALL, -SMALL
    block.in_proj_z[:, 2] = block.conv_B_bias[:] = block.conv_C_bias[:] = ONE
    block.in_proj_dt[early, 1] = block.in_proj_dt[late, 1] = beta * layout.length
    block.dt_bias[0], block.dt_bias[early], block.dt_bias[late] = (
        FLAT, beta * (0.75 - knot), beta * (0.25 - knot)
    )  # fmt: skip
    block.A_log[:] = LOG_DECAY
    rows = layout.suffix_rows
    read_out = np.concatenate([rows[:, :1] / HELD, rows[:, 1:] * 2 / beta, -rows[:, 1:] * 2 / beta], axis=1)
    block.out_proj[: layout.kernels] = np.kron(read_out, [1 / SMALL, -1 / SMALL])
    names = [f"sum [0, {layout.length})"] + [f"{kind} ramp {a}" for kind in ("early", "late") for a in knot]
    labels = [f"{sign} in {name}" for name in names for sign in ("u", "-u")]
    return Plan(block, labels, STATE_RAMPS, _ramps_bound(layout, beta), CLAIM_RAMPS_MAMBA2, read_out)


def delta(layout: Layout, beta: float) -> Plan:
    """Return the weights: u, -u, the position, one ramp for each window's first token."""
    first = np.r_[0, layout.knots]
    sums, gain = 3 + np.arange(layout.windows), _gain(beta)
    block = layout.block(3 + layout.windows, rank=2)
    _features(block, layout)
    block.conv_bias[sums] = block.in_proj_z[sums, 2] = ONE
    block.x_proj_dt[1, 0], block.x_proj_dt[1, 1] = 1, -1
    block.x_proj_B[0, sums[0]] = block.x_proj_C[0, sums[0]] = 1
    block.dt_proj[sums, 0], block.dt_proj[sums, 1] = beta, gain
    block.dt_bias[sums] = beta * (0.5 - first - SHIFT)
    block.D[sums] = -beta * (layout.length - first) ** 2 / 2
    block.out_proj[: layout.kernels, sums] = layout.suffix_rows / gain
    labels = ["u", "-u", "position"] + [f"ramp {a}" for a in first]
    return Plan(block, labels, STATE_DELTA, _delta_bound(layout, beta), CLAIM_DELTA, limit=AMPLITUDE)


def _features(block: MambaTable, layout: Layout) -> None:
    """Write u, -u and t + SHIFT into the first three channels, the position also into delta."""
    block.in_proj_x[0, 0], block.in_proj_x[1, 0] = 1, -1
    block.in_proj_x[2, 1], block.conv_bias[2] = layout.length, SHIFT
    block.x_proj_dt[0, 2] = 1
    block.A_log[:] = LOG_DECAY


def _gain(beta: float) -> float:
    """Return eps: beta / 2 > eps |u| holds for |u| < AMPLITUDE."""
    return beta / (2 * AMPLITUDE)


def _ramps_bound(layout: Layout, beta: float) -> float:
    """Return the error for |u| <= 1: each sum's leak at its knot and its decay, times its weight; S_0 has no knot."""
    decay = math.exp(LOG_DECAY)
    errors = np.full(layout.windows, 4 / beta * math.exp(-beta / 4) / -math.expm1(-beta))
    errors += decay * beta * layout.length**4 / 2
    errors[0] = decay * layout.length**2 / 2
    return float((np.abs(layout.suffix_rows) @ errors).max())


def _delta_bound(layout: Layout, beta: float) -> float:
    """Return the error for |u| <= 1: softplus against relu on both sides of a knot, and the decay."""
    gain = _gain(beta)
    leak = 2 / gain * math.exp(gain - beta / 2) / -math.expm1(-beta)
    written = beta * layout.length**2 / 2 + gain * layout.length
    decay = math.exp(LOG_DECAY) * written**2 / (2 * gain)
    return float(np.abs(layout.suffix_rows).sum(1).max()) * (leak + decay)
