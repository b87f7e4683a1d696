"""The selective scan as one Triton kernel for any real A: Mamba-1 (head_channel 1) and Mamba-2 (A one scalar a head).

A program keeps the state of some rows (a row is one head_channel of one head) of one group and one batch item in
registers and walks over the tokens. All arithmetic is in the compute dtype, float32 or float64. Forward only.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan.arguments import Arguments

__all__ = ["check_device", "scan"]

TILE = 1024
"""State elements of one program, at least one row."""


@triton.jit
def _clamp(value, low, high):
    """NaN stays NaN, as in torch; Triton's default would hide it."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    if SOFTPLUS:
        # max(x, 0) + log1p(u), u = exp(-|x|); log(1 + u) alone loses small delta, its ratio to (1 + u) - 1 does not
        u = tl.exp(-tl.abs(raw))
        w = 1.0 + u
        log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
        raw = tl.where(raw > 20.0, raw, tl.maximum(raw, 0.0) + log1p)
    return _clamp(raw, tl.full((1,), LOW, raw.dtype), tl.full((1,), HIGH, raw.dtype))


@triton.jit
def _exp(z):
    """exp for the decay: what tl.exp of float32 errs is alike from token to token, and a long memory adds it up.

    2^n (1 + r + r^2 p(r)) with n = round(z / ln 2), |r| <= ln 2 / 2; coefficients: Cephes, `expf`.
    """
    if z.dtype == tl.float64:
        return tl.exp(z)
    z = _clamp(z, -104.0, 89.0)
    n = tl.floor(z * 1.4426950408889634 + 0.5)
    r = z - n * 0.693359375 + n * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    return (1.0 + (r + r * r * p)) * tl.exp2(n)


@triton.jit
def _emit(o_kept, o_p, o_n, m_row, m_tile, delta, cumsum, A_bar, B_bar, h, y,
          e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y,
          P: tl.constexpr, N: tl.constexpr, SCALAR_A: tl.constexpr):  # fmt: skip
    m_head = m_row & (o_p == 0)
    if e_delta is not None:
        tl.store(e_delta + o_kept, delta, mask=m_head)
    if e_cumsum is not None:
        tl.store(e_cumsum + o_kept, cumsum, mask=m_head)
    if e_A_bar is not None:
        if SCALAR_A:
            tl.store(e_A_bar + o_kept[:, None], A_bar, mask=m_head[:, None])
        else:
            tl.store(e_A_bar + o_kept[:, None] * N + o_n[None, :], A_bar, mask=m_tile & m_head[:, None])
    if e_B_bar is not None:
        tl.store(e_B_bar + o_kept[:, None] * N + o_n[None, :], B_bar, mask=m_tile & m_head[:, None])
    if e_h is not None:
        tl.store(e_h + (o_kept * P + o_p)[:, None] * N + o_n[None, :], h, mask=m_tile)
    if e_y is not None:
        tl.store(e_y + o_kept * P + o_p, y, mask=m_row)


@triton.jit
def scan_kernel(
    p_x, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_h, p_token_slot, p_head_slot,
    p_out, p_last, e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y,
    n_token, n_kept_token, n_kept_head,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALAR_A: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Grid: batch x group x blocks of BLOCK_R rows. Tensors are contiguous, shapes as in `selective_scan`."""
    ROWS: tl.constexpr = H // G * P
    N_BLOCK: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    i_program = tl.program_id(0)
    i_group = i_program // N_BLOCK % G
    i_batch = (i_program // (N_BLOCK * G)).to(tl.int64)
    o_local = i_program % N_BLOCK * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    m_row = o_local < ROWS
    m_n = o_n < N
    m_tile = m_row[:, None] & m_n[None, :]
    o_row = i_group * ROWS + o_local
    o_head = o_row // P
    o_state = (i_batch * (H * P) + o_row)[:, None] * N + o_n[None, :]
    dtype = p_A.dtype.element_ty
    if SCALAR_A:
        b_A = tl.load(p_A + o_head, mask=m_row, other=0.0)[:, None]
    else:
        b_A = tl.load(p_A + o_head[:, None] * N + o_n[None, :], mask=m_tile, other=0.0)
    b_h = tl.load(p_h + o_state, mask=m_tile, other=0.0)
    if p_head_slot is not None:
        b_slot = tl.load(p_head_slot + o_head, mask=m_row, other=-1)
        b_cumsum = tl.zeros((BLOCK_R,), dtype=tl.float64)
    for t in range(n_token):
        i_token = i_batch * n_token + t
        b_x = tl.load(p_x + i_token * (H * P) + o_row, mask=m_row, other=0.0).to(dtype)
        b_delta = tl.load(p_delta + i_token * H + o_head, mask=m_row, other=0.0).to(dtype)
        b_B = tl.load(p_B + (i_token * G + i_group) * N + o_n, mask=m_n, other=0.0).to(dtype)
        b_C = tl.load(p_C + (i_token * G + i_group) * N + o_n, mask=m_n, other=0.0).to(dtype)
        if p_bias is not None:
            b_delta += tl.load(p_bias + o_head, mask=m_row, other=0.0)
        b_delta = _step_size(b_delta, SOFTPLUS, LOW, HIGH)
        b_A_bar = _exp(b_delta[:, None] * b_A)
        b_B_bar = b_delta[:, None] * b_B[None, :]
        b_h = b_A_bar * b_h + b_B_bar * b_x[:, None]
        b_y = tl.sum(b_h * b_C[None, :], axis=1)
        if p_D is not None:
            b_y += tl.load(p_D + o_row, mask=m_row, other=0.0) * b_x
        b_out = b_y
        if p_z is not None:
            b_z = tl.load(p_z + i_token * (H * P) + o_row, mask=m_row, other=0.0).to(dtype)
            b_out = b_y * b_z / (1.0 + tl.exp(-b_z))
        tl.store(p_out + i_token * (H * P) + o_row, b_out.to(p_out.dtype.element_ty), mask=m_row)
        if p_head_slot is not None:
            b_cumsum += b_delta.to(tl.float64)
            i_slot = tl.load(p_token_slot + t)
            if i_slot >= 0:
                o_kept = (i_batch * n_kept_token + i_slot) * n_kept_head + b_slot
                m_kept = m_row & (b_slot >= 0)
                _emit(o_kept, o_row % P, o_n, m_kept, m_tile & m_kept[:, None], b_delta, b_cumsum, b_A_bar, b_B_bar,
                      b_h, b_y, e_delta, e_cumsum, e_A_bar, e_B_bar, e_h, e_y, P, N, SCALAR_A)  # fmt: skip
    tl.store(p_last + o_state, b_h, mask=m_tile)


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    _check_arguments(a)
    batch, n_token, head, head_channel = a.x.shape
    group, state = a.B.shape[2:]
    block_n = triton.next_power_of_2(state)
    rows = head // group * head_channel
    block_r = min(triton.next_power_of_2(rows), max(1, TILE // block_n))
    out = torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device)
    last = torch.empty(a.initial_state.shape, dtype=a.dtype, device=a.x.device)
    emitted = _buffers(a)
    dense = [None if tensor is None else tensor.contiguous() for tensor in _in_order(a)]
    launch = cast(Any, scan_kernel)[(batch * group * triton.cdiv(rows, block_r),)]
    with torch.cuda.device_of(a.x):
        launch(
            *dense,
            _slots(a.emit.tokens, n_token, a) if emitted else None,
            _slots(a.emit.channels, head, a) if emitted else None,
            out,
            last,
            *[emitted.get(name) for name in ("delta", "delta_cumsum", "A_bar", "B_bar", "h", "y")],
            n_token,
            n_kept_token=_size(a.emit.tokens, n_token),
            n_kept_head=_size(a.emit.channels, head),
            H=head,
            P=head_channel,
            G=group,
            N=state,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            SCALAR_A=a.scalar_A,
            SOFTPLUS=a.delta_softplus,
            LOW=a.delta_limits[0],
            HIGH=a.delta_limits[1],
            num_warps=1 if block_r * block_n <= TILE else 4,
        )
    inputs = {name: a.emit.tokens_of(vars(a)[name]).clone() for name in "BC" if name in a.emit.variables}
    return out, last, Emission(**emitted, **inputs)


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernel cannot run."""
    compiled = isinstance(scan_kernel, triton.JITFunction)
    if compiled and device.type != "cuda":
        raise ValueError(
            f'backend "triton" needs CUDA tensors; `x` is on {device}: use backend="cpu", or set '
            "TRITON_INTERPRET=1 before the first import of triton to interpret the kernel (slow, for tests)"
        )


def _check_arguments(a: Arguments) -> None:
    asked = {
        "complex A": a.A.is_complex(),
        **{f"constant {name}": name in a.constant for name in "BC"},
        'discretization "zoh"': a.discretization == "zoh",
        "seq_idx": a.starts is not None,
        "log_decay": a.log_decay is not None,
    }
    if lacking := [name for name, value in asked.items() if value]:
        raise ValueError(f'backend "triton" does not support {", ".join(lacking)} yet: use backend="cpu"')
    check_device(a.x.device)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in a.tensors()):
        raise ValueError(
            'backend "triton" is forward only for now, and an input requires grad: '
            'use backend="cpu", or call under torch.no_grad()'
        )


def _buffers(a: Arguments) -> dict[str, Tensor]:
    """Uninitialised outputs of what was asked for; B and C are inputs and need none."""
    _, n_token, head, head_channel = a.x.shape
    kept = a.x.shape[0], _size(a.emit.tokens, n_token), _size(a.emit.channels, head)
    state = a.B.shape[3]
    tails = {
        "delta": (),
        "delta_cumsum": (),
        "A_bar": () if a.scalar_A else (state,),
        "B_bar": (state,),
        "h": (head_channel, state),
        "y": (head_channel,),
    }
    dtypes = dict.fromkeys(tails, a.dtype) | {"delta_cumsum": torch.float64}
    return {
        name: torch.empty((*kept, *tail), dtype=dtypes[name], device=a.x.device)
        for name, tail in tails.items()
        if name in a.emit.variables
    }


def _slots(indices: Sequence[int] | None, size: int, a: Arguments) -> Tensor:
    """Where each token or head goes in the emission, -1 where nowhere."""
    slots = torch.arange(size, dtype=torch.int32, device=a.x.device)
    if indices is not None:
        slots.fill_(-1)[list(indices)] = torch.arange(len(indices), dtype=torch.int32, device=a.x.device)
    return slots


def _size(indices: Sequence[int] | None, size: int) -> int:
    return size if indices is None else len(indices)


def _in_order(a: Arguments) -> list[Tensor | None]:
    return [a.x, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, a.initial_state]
