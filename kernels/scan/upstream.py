"""What the backward of `fused` reads: the inputs by (row, token), and the gradients of what the scan answered."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

from mamba_probe.kernels.scan.elementwise import silu_and_slope, step_size, step_slope
from mamba_probe.kernels.scan.places import pairs_at

__all__ = ["Block", "Pairs", "Upstream", "batch_item", "fetch", "ready"]


class Pairs(NamedTuple):
    """Of what is read by (row, token): pointers to the batch item, offsets, or strides. What is not given repeats
    another one, and is not read."""

    x: tl.tensor
    delta: tl.tensor
    z: tl.tensor
    out: tl.tensor


class Block(NamedTuple):
    """A block by (row, token): x, delta, delta x, dy, delta's slope, and what times y is dz."""

    x: tl.tensor
    delta: tl.tensor
    write: tl.tensor
    dy: tl.tensor
    slope: tl.tensor
    dz: tl.tensor


class Upstream(NamedTuple):
    """Pointers to gradients, each None where nothing depends on it; and the slots of the tokens that are emitted, None
    where every token is."""

    out: tl.tensor
    last: tl.tensor
    delta: tl.tensor
    A_bar: tl.tensor
    B_bar: tl.tensor
    h: tl.tensor
    y: tl.tensor
    token_slot: tl.tensor


@triton.jit
def batch_item(p, strides, at, BLOCK_T: tl.constexpr, P: tl.constexpr):
    """Pointers to the batch item, and where the pairs of its first tokens lie from there."""
    o_token = tl.arange(0, BLOCK_T)
    here = Pairs(
        p.x + at.batch * strides.x[0], p.delta + at.batch * strides.delta[0], p.z + at.batch * strides.z[0],
        p.out + at.batch * strides.out[0])  # fmt: skip
    o = Pairs(
        pairs_at(at, o_token, strides.x, P), pairs_at(at, o_token, strides.delta, P),
        pairs_at(at, o_token, strides.z, P), pairs_at(at, o_token, strides.out, P))  # fmt: skip
    return here, o


@triton.jit
def fetch(p, o, strides, g, at, kept, i_kept, t, start, stop, BLOCK_T: tl.constexpr, form: tl.constexpr):
    """Of the block of tokens from t on, as they came: x, delta, z, and the gradients of the output and of y."""
    o_token = tl.arange(0, BLOCK_T)
    m_token = (t + o_token < stop) & (t + o_token >= start)
    m = at.mask[:, None] & m_token[None, :]
    i_t = t.to(tl.int64)
    n_delta = tl.load(p.delta + i_t * strides.delta[1] + o.delta, mask=m, other=0.0)
    n_x = n_delta
    n_z = n_delta
    n_out = n_delta
    n_y = n_delta
    if not form.LOCAL:
        n_x = tl.load(p.x + i_t * strides.x[1] + o.x, mask=m, other=0.0)
    if form.GATED:
        n_z = tl.load(p.z + i_t * strides.z[1] + o.z, mask=m, other=0.0)
    if g.out is not None:
        n_out = tl.load(p.out + i_t * strides.out[1] + o.out, mask=m, other=0.0)
    if g.y is not None:
        b_token = t + o_token
        m = m & kept.rows[:, None]
        if g.token_slot is not None:
            b_token = tl.load(g.token_slot + t + o_token, mask=m_token, other=-1)
            m = m & (b_token >= 0)[None, :]
        p_y = g.y + (i_kept + b_token)[None, :] * (form.KEPT_HEAD * form.P)
        n_y = tl.load(p_y + (kept.slot * form.P + at.row % form.P)[:, None], mask=m, other=0.0)
    return n_x, n_delta, n_z, n_out, n_y


@triton.jit
def ready(n, g, b_bias, at, t, start, stop, form: tl.constexpr):
    """The `Block` of what `fetch` found, in the compute dtype."""
    n_x, n_delta, n_z, n_out, n_y = n
    o_token = tl.arange(0, n_x.shape[1])
    m = at.mask[:, None] & ((t + o_token < stop) & (t + o_token >= start))[None, :]
    b_raw = n_delta.to(form.dtype) + b_bias
    b_x = n_x.to(form.dtype)
    b_delta = tl.where(m, step_size(b_raw, form.SOFTPLUS, form.MIN, form.MAX), 0.0)
    b_slope = tl.where(m, step_slope(b_raw, form.SOFTPLUS, form.MIN, form.MAX), 0.0)
    b_dy = tl.zeros(b_x.shape, form.dtype)
    b_dz = b_dy
    if g.out is not None:
        b_dy = n_out.to(form.dtype)
        if form.GATED:
            b_gate, b_gate_slope = silu_and_slope(n_z.to(form.dtype))
            b_dz = b_dy * b_gate_slope
            b_dy *= b_gate
    if g.y is not None:
        b_dy += n_y.to(form.dtype)
    return Block(b_x, b_delta, b_delta * b_x, b_dy, b_slope, b_dz)
