"""Flat windows: delta is 1 in a window and 0 outside; u enters through x or through B."""

import math

import numpy as np

from mamba_probe.constructions.haar_layout import FLAT, HELD, LOG_DECAY, ONE, Layout, Plan
from mamba_probe.constructions.tables import SILU_ONE, MambaTable

__all__ = ["flat_b", "flat_x"]

STATE = "sum over the channel's window"

CLAIM_X = """Window k = [k L, (k+1) L) has two channels, x = silu(u) and x = silu(-u), with delta = 1 inside the window
and 0 outside, no decay, B = C = 1: their states hold the sum of u over the window, and out_proj turns the {windows}
sums into {outputs} at its last token."""

CLAIM_B = """Window k = [k L, (k+1) L) has one channel with delta = 1 inside the window and 0 outside, no decay, x = C
= 1 and B = silu(u) - silu(-u) = u: its state holds the sum of u over the window, and out_proj turns the {windows} sums
into {outputs} at its last token. Frozen, its kernel is u in the window."""


def flat_x(layout: Layout, beta: float) -> Plan:
    """Return the weights with u through x: ramps, windows of u, windows of -u, the constant."""
    ramps, windows = 2 * (layout.windows - 1), layout.windows
    plus, minus, one = ramps + np.arange(windows), ramps + windows + np.arange(windows), ramps + 2 * windows
    block = layout.block(one + 1, rank=windows)
    labels = _ramps(block, layout, beta)
    block.in_proj_x[plus, 0], block.in_proj_x[minus, 0] = 1, -1
    block.conv_bias[one] = 1
    block.in_proj_z[np.r_[plus, minus], 2] = 1
    block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    block.dt_proj[plus, np.arange(windows)] = block.dt_proj[minus, np.arange(windows)] = -1
    rows = layout.rows / (SILU_ONE * HELD)
    block.out_proj[: layout.kernels, plus], block.out_proj[: layout.kernels, minus] = rows, -rows
    labels += [f"window of {sign} {span}" for sign in ("u", "-u") for span in layout.spans()] + ["one"]
    odd = block.in_proj_x[:, 0] / 2  # silu(u) = u/2 + even part, silu(-u) = -u/2 + the same even part
    return Plan(block, labels, STATE, _bound(layout, beta), CLAIM_X, block.out_proj[: layout.kernels] * SILU_ONE * odd)


def flat_b(layout: Layout, beta: float) -> Plan:
    """Return the weights with u through B: ramps, u, -u, windows. The least error in either precision."""
    plus = 2 * (layout.windows - 1)
    minus, window = plus + 1, plus + 2 + np.arange(layout.windows)
    block = layout.block(plus + 2 + layout.windows, rank=layout.windows)
    labels = _ramps(block, layout, beta)
    block.in_proj_x[plus, 0], block.in_proj_x[minus, 0] = 1, -1
    block.conv_bias[window] = block.in_proj_z[window, 2] = ONE
    block.x_proj_B[0, plus], block.x_proj_B[0, minus] = 1, -1
    block.x_proj_C[0, window[0]] = 1
    block.dt_proj[window, np.arange(layout.windows)] = -1
    block.out_proj[: layout.kernels, window] = layout.rows / HELD
    labels += ["u", "-u"] + [f"window {span}" for span in layout.spans()]
    return Plan(block, labels, STATE, _bound(layout, beta), CLAIM_B)


def _ramps(block: MambaTable, layout: Layout, beta: float) -> list[str]:
    """Write the ramps that open and close the windows into the first channels, with their way into delta."""
    knot, knots = layout.knots, layout.windows - 1
    down, up = np.arange(knots), knots + np.arange(knots)
    block.in_proj_x[down, 1], block.conv_bias[down] = -beta * layout.length, beta * (knot - 0.5)
    block.in_proj_x[up, 1], block.conv_bias[up] = beta * layout.length, beta * (0.5 - knot)
    block.x_proj_dt[np.arange(1, layout.windows), down] = 1  # window k opens at knot k ...
    block.x_proj_dt[np.arange(knots), up] = 1  # ... and closes at knot k + 1
    block.dt_bias[:] = FLAT
    block.A_log[:] = LOG_DECAY
    return [f"ramp down {a}" for a in knot] + [f"ramp up {a}" for a in knot]


def _bound(layout: Layout, beta: float) -> float:
    """Return the error of an output for |u| <= 1: a window's leak (inside, outside, decay) times the widest row."""
    ratio = math.exp(-beta)
    leak = math.exp(-1) if beta < 2 else beta / 2 * math.exp(-beta / 2)  # |silu - relu| at half a token
    slope = 1 / (1 + math.exp(-FLAT - 2 * leak))
    inside = slope * beta * (1 + ratio) / (1 - ratio) ** 2
    outside = 2 * math.expm1(1.0) * math.exp(2 * leak) / (1 - ratio)
    decay = math.exp(LOG_DECAY) * layout.span**2 / 2
    return float(np.abs(layout.rows).sum(1).max()) * (math.exp(-beta / 2) * (inside + outside) + decay)
