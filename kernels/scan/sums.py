"""The end of a backward: gradients that are sums over programs, from their parts, in one launch.

A backward leaves dB and dC by blocks of rows, dA, dD and d delta_bias by batch items and chunks of tokens, and, where a
head has several channels, d delta and d log_decay by channels. Each is summed in one order, in the parts' dtype, and
rounded to the dtype of its input: what torch does in two launches a gradient.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.launcher import Plan, blocks, padded

__all__ = ["ANSWERS", "NAMES", "add_sums", "gradients", "sums_kernel", "tile"]

NAMES = ("B", "C", "A", "D", "delta_bias", "delta", "log_decay")
"""What may be such a sum, in the order of the kernel's arguments."""

ANSWERS = {name: f"for_{name}" for name in ("x", *NAMES, "z", "initial_state")}
"""Gradients, by what plans call them."""

ELEMENTS = 2048
"""Of parts, that a program reads at a time: of `MOST` parts at most where sums are many, as they are of dB and dC."""

MOST = 16

FEW = 32, 64
"""Sums of a program and parts that it reads at a time, where sums are few and their parts may be many."""


@triton.jit
def _summed(i, p_part, p_sum, p_more, n, n_part, INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
            PARTS: tl.constexpr):  # fmt: skip
    """The i-th block of n sums of parts (n_part, n / WIDTH, INNER, WIDTH) over their first axis and INNER, where there
    are that many blocks; i less their number."""
    if p_sum is not None:
        i_first = i.to(tl.int64) * BLOCK
        if (i_first >= 0) & (i_first < n):
            o = i_first + tl.arange(0, BLOCK)
            o_part = o if INNER == 1 else (o // WIDTH) * (INNER * WIDTH) + o % WIDTH
            b_sum = tl.zeros((PARTS, BLOCK), p_part.dtype.element_ty)
            for k in range(0, n_part * INNER, PARTS):
                o_k = k + tl.arange(0, PARTS)
                i_k = (o_k // INNER).to(tl.int64) * n * INNER + (o_k % INNER) * WIDTH
                m_k = (o_k < n_part * INNER)[:, None] & (o < n)[None, :]
                b_sum += tl.load(p_part + i_k[:, None] + o_part[None, :], mask=m_k, other=0.0)
            b_all = tl.sum(b_sum, axis=0)
            if p_more is not None:
                b_all += tl.load(p_more + o, mask=o < n, other=0.0)
            tl.store(p_sum + o, b_all.to(p_sum.dtype.element_ty), mask=o < n)
        i -= tl.cdiv(n, BLOCK)
    return i


@triton.jit
def sums_kernel(
    p_B, p_C, p_A, p_D, p_bias, p_delta, p_log, p_more, d_B, d_C, d_A, d_D, d_bias, d_delta, d_log,
    n_projection, n_block, n_part, n_part_D, n_pair, n_log,
    H: tl.constexpr, P: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    PROJECTION: tl.constexpr, ROW: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of all sums, one gradient after another. p_more is added to dB. Tiles are (sums, parts)."""
    i = tl.program_id(0)
    i = _summed(i, p_B, d_B, p_more, n_projection, n_block, 1, 1, PROJECTION[0], PROJECTION[1])
    i = _summed(i, p_C, d_C, None, n_projection, n_block, 1, 1, PROJECTION[0], PROJECTION[1])
    i = _summed(i, p_A, d_A, None, H * WIDTH, n_part, INNER, WIDTH, ROW[0], ROW[1])
    i = _summed(i, p_D, d_D, None, H * P, n_part_D, 1, 1, ROW[0], ROW[1])
    i = _summed(i, p_bias, d_bias, None, H, n_part, INNER, 1, ROW[0], ROW[1])
    i = _summed(i, p_delta, d_delta, None, n_pair, 1, INNER, 1, PAIR[0], PAIR[1])
    i = _summed(i, p_log, d_log, None, n_log, 1, INNER, WIDTH, PAIR[0], PAIR[1])


def add_sums(
    plan: Plan, a: Arguments, parts: Mapping[str, str | None], counts: tuple[int, int, int], more: str | None = None
) -> None:
    """The launch, after those that fill the `parts` (by the name of the gradient): "B" and "C" (count, batch, token,
    group, state), "A" (count, row, state) and "delta_bias" (count, row), "D" (count, head, head_channel), "delta"
    (batch, token, row) and "log_decay" (batch, token, row, state). A row is a head or, where A is (head, state), a
    head's channel. The three counts may differ, and more, if any, is added to dB.
    """
    n_batch, n_token, n_head, head_channel = a.x.shape
    projection, inner, width = (*a.x.shape[:2], *a.B.shape[2:]), 1 if a.scalar_A else head_channel, a.A.shape[1]
    shapes = {
        "B": projection, "C": projection, "A": (n_head,) if a.scalar_A else (n_head, width),
        "D": (n_head,) if a.shared_D and head_channel == 1 else (n_head, head_channel), "delta_bias": (n_head,),
        "delta": (n_batch, n_token, n_head), "log_decay": (n_batch, n_token, n_head, width),
    }  # fmt: skip
    tiles = tile(counts[0]), FEW, tile(inner)
    found, n_program = [], 0
    for name in NAMES:
        part = parts.get(name)
        if part is not None:
            size = tiles[0 if name in "BC" else 2 if name in ("delta", "log_decay") else 1][0]
            n_program += blocks(math.prod(shapes[name]), size)
            plan.make(ANSWERS[name], shapes[name], a.dtype if name in a.constant else vars(a)[name].dtype)
        found.append(None if part is None else ANSWERS[name])
    plan.add(
        sums_kernel, (n_program, 1, 1), *map(parts.get, NAMES), more, *found,
        math.prod(projection), *counts, math.prod(shapes["delta"]), math.prod(shapes["log_decay"]),
        n_head, head_channel, inner, width, *tiles, num_warps=4,
    )  # fmt: skip


def tile(n_part: int) -> tuple[int, int]:
    """Sums of a program, and parts that it reads at a time, where sums are many.

    >>> tile(1), tile(160)
    ((2048, 1), (128, 16))
    """
    parts = min(MOST, padded(n_part))
    return ELEMENTS // parts, parts


def gradients(a: Arguments, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the name of the argument, from what a plan made."""
    found: dict[str, Any] = {name: made[answer] for name, answer in ANSWERS.items() if answer in made}
    for name in a.constant:
        found[name] = found[name].sum((0, 1)).to(vars(a)[name].dtype)
    return found
