"""Decay as a window of one token: every channel forgets all but its own token, and all coefficients are read out."""

import numpy as np

from mamba_probe.constructions.haar_layout import ONE, SHIFT, Layout, Plan
from mamba_probe.constructions.keep import ramp_bound

__all__ = ["decay"]

CLAIM = """Token n has one channel with delta = softplus(beta (n + 1/2 - t)) and A = -1: exp(A delta) is 0 up to token
n, which erases, and 1 after it, which holds. x = C = 1 and B = silu(u) - silu(-u) = u: its state is beta / 2 times u_n,
and out_proj turns the {windows} values into {outputs} at its last token."""


def decay(layout: Layout, beta: float) -> Plan:
    """Return the weights: u, -u, the position, the constant, the tokens."""
    one, token = 3, 4 + np.arange(layout.length)
    block = layout.block(4 + layout.length, rank=1)
    block.in_proj_x[0, 0], block.in_proj_x[1, 0] = 1, -1
    block.in_proj_x[2, 1], block.conv_bias[2] = layout.length, SHIFT
    block.conv_bias[one] = block.conv_bias[token] = ONE
    block.in_proj_z[token, 2] = ONE
    block.x_proj_dt[0, 2] = 1
    block.x_proj_B[0, 0], block.x_proj_B[0, 1] = 1, -1
    block.x_proj_C[0, one] = 1
    block.dt_proj[token, 0], block.dt_bias[token] = -beta, beta * (np.arange(layout.length) + 0.5 + SHIFT)
    block.out_proj[: layout.kernels, token] = layout.rows * 2 / beta
    labels = ["u", "-u", "position", "one"] + [f"token {n}" for n in range(layout.length)]
    bound = float(np.abs(layout.rows).sum(1).max()) * ramp_bound(beta)
    return Plan(block, labels, "beta / 2 times u at the channel's token", bound, CLAIM)
