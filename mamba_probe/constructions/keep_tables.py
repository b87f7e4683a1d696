"""The weight tables of the blocks that keep one token, by mixer and profile."""

import math

import numpy as np

from mamba_probe.constructions.recall_language import EPSILON
from mamba_probe.constructions.tables import SILU_ONE, Mamba2Table, MambaTable

__all__ = ["TABLES"]

SHIFT = 40.0  # silu(t + SHIFT) = t + SHIFT in float64
ONE = 1.278464542761074  # silu(ONE) = 1


def _ramp_mamba1(n_tokens: int, length: int, n: int, beta: float) -> MambaTable:
    block, tokens, position = _values(n_tokens)
    block.in_proj_x[position, position], block.conv_bias[position] = length, SHIFT
    block.x_proj_dt[0, position] = 1
    block.dt_proj[:, 0], block.dt_bias[:] = -beta, beta * (n + 0.5 + SHIFT)
    block.out_proj[tokens, tokens] = 2 / (beta * SILU_ONE**2)
    return block


def _event_mamba1(n_tokens: int, length: int, n: int, beta: float) -> MambaTable:
    block, tokens, marker = _values(n_tokens)
    block.in_proj_x[marker, marker] = 1
    block.x_proj_dt[0, marker] = 1 / SILU_ONE
    block.dt_proj[:, 0], block.dt_bias[:] = 2 * beta, -beta
    block.out_proj[tokens, tokens] = 1 / (beta * SILU_ONE**2)
    return block


def _values(n_tokens: int) -> tuple[MambaTable, np.ndarray, int]:
    """Return a block whose first channels hold the one-hot token, with B = C = 1, the last one 1; then the free one."""
    size, tokens, one = n_tokens + 2, np.arange(n_tokens), n_tokens + 1
    block = MambaTable.zeros(size, size, state=1, rank=1)
    block.conv[:, 0] = 1
    block.in_proj_x[tokens, tokens] = block.in_proj_x[one, one] = 1
    block.in_proj_z[tokens, one] = 1
    block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    return block, tokens, n_tokens


def _ramp_mamba2(n_tokens: int, length: int, n: int, beta: float) -> Mamba2Table:
    return _head(n_tokens, slope=-beta * length, start=beta * (n + 0.5), read=beta / 2)


def _event_mamba2(n_tokens: int, length: int, n: int, beta: float) -> Mamba2Table:
    return _head(n_tokens, slope=2 * beta, start=-beta, read=beta)


def _head(n_tokens: int, slope: float, start: float, read: float) -> Mamba2Table:
    """Return one head of x = the one-hot token, B = C = 1, with delta = softplus(start + slope feature).

    `read` is what the last token's state holds of the kept one: its root mean square undoes the gated norm there.
    """
    size, tokens, feature, one = n_tokens + 2, np.arange(n_tokens), n_tokens, n_tokens + 1
    block = Mamba2Table.zeros(size, size, state=1, head=1)
    block.conv_x[tokens, 0] = 1
    block.in_proj_x[tokens, tokens] = block.in_proj_z[tokens, one] = ONE
    block.conv_B_bias[:] = block.conv_C_bias[:] = ONE
    block.in_proj_dt[0, feature], block.dt_bias[:] = slope, start
    block.out_proj[tokens, tokens] = math.sqrt(read**2 / size + EPSILON) / read
    return block


TABLES = {
    ("mamba1", "ramp"): _ramp_mamba1,
    ("mamba1", "event"): _event_mamba1,
    ("mamba2", "ramp"): _ramp_mamba2,
    ("mamba2", "event"): _event_mamba2,
}
"""Weights by (mixer, profile), of (n_tokens, length, n, beta)."""
