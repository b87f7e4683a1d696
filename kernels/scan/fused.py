"""The selective scan with a decay for each state: A (head, state), real. Mamba-1 is head_channel 1.

With several chunks the kernel runs twice: without C for every chunk but the last, from nothing, which leaves its last
state and its decay; then for every chunk, from what the chunks before it left, in order.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.fused_kernel import scan_kernel
from mamba_probe.kernels.scan.launcher import Plan, Plans, blocks, fusible, padded, planned, start

__all__ = ["SEGMENT", "Tile", "choose_tile", "dense", "launch", "multiprocessors", "saved_shape", "scan_kernel"]

NARROW = torch.bfloat16, torch.float16

WARPS = 12
"""Programs that an SM holds at REGISTERS registers a thread."""

REGISTERS = 168

EMITTED = ("delta", "delta_cumsum", "A_bar", "B_bar", "h", "y", "energy")
"""What the kernel emits, in the order of its arguments."""

SHORTEST = 64
"""Tokens of a chunk, at least."""

SEGMENT = 64
"""Tokens from one state that is saved for the backward to the next."""

EARLY = isinstance(scan_kernel, triton.JITFunction)
"""The second pass is launched while the first still runs, and waits where it needs it."""


class Tile(NamedTuple):
    """What one program does: rows and tokens of a block, chunks of a sequence, states side by side in a thread; in how
    many stages its loads come: 1 in registers, more through shared memory; and its warps."""

    rows: int
    tokens: int
    chunks: int
    low: int = 4
    stages: int = 1
    warps: int = 1


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; interpreted, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def choose_tile(a: Arguments) -> Tile:
    """A program is a warp, and an SM holds WARPS of them; few rows are cut into chunks of tokens until that is full.

    With rows enough a thread has 8 states, or 4 where that fills the card better; an even share for the four schedulers
    of an SM is worth twice the chunks. Loads come through shared memory where 16-bit rows are many; and where what is
    emitted of every state keeps the memory busy: there two warps side by side fill its lines.
    `benchmarks/scan_gpu.py --sweep` sets the rule beside other tiles.
    """
    sms = multiprocessors(a.x.device)
    per_row = padded(a.B.shape[3])
    n_row = a.x.shape[0] * a.x.shape[2] * a.x.shape[3]
    wide, narrow = (max(4, min(32, states * 32 // per_row)) for states in (8, 4))
    if n_row >= 9 * sms * wide:
        if {"A_bar", "B_bar", "h"} & set(a.emit.variables):
            return Tile(2 * wide, 8, 1, 8, 3, 2)
        return Tile(wide, 8, 1, stages=3 if a.x.dtype in NARROW else 1)
    if n_row >= 9 * sms * narrow:
        return Tile(narrow, 16, 1)
    programs = blocks(n_row, wide)
    chunks = max(1, min(WARPS * sms // programs, a.n_token // SHORTEST))
    share = programs * chunks / (4 * sms)
    uneven = math.ceil(share) > 1.15 * share and 2 * chunks * SHORTEST <= a.n_token
    return Tile(wide, 8, 2 * chunks if uneven else chunks, 8 if a.emit.dtype in NARROW else 4)


def launch(
    a: Arguments,
    out: Tensor,
    last: Tensor,
    emitted: dict[str, Tensor],
    token_slot: Tensor | None,
    head_slot: Tensor | None,
    tile: Tile | None = None,
    states: Tensor | None = None,
    segment: int = SEGMENT,
    plans: Plans | None = None,
) -> None:
    """Fill `out`, `last`, what is `emitted`, and `states` with those before tokens segment, 2 segment, ..."""
    key = choose_tile, tile, segment, states is None
    plan = planned(plans, key, lambda: _plan(a, emitted, tile or choose_tile(a), segment, states is not None))
    given = {
        "x": a.x, "delta": a.delta, "A": a.A, "B": a.B, "C": a.C, "D": dense(a.D), "z": a.z, "bias": a.delta_bias,
        "starts": dense(a.starts), "log": dense(a.log_decay), "initial": a.given_state,
        "out": out, "last": last, "token_slot": token_slot, "head_slot": head_slot, "states": states,
    }  # fmt: skip
    for name, value in emitted.items():
        given[f"e_{name}"] = value
    start(plan, given)


def saved_shape(a: Arguments) -> tuple[int, ...]:
    """Of the states before every SEGMENT-th token but the first."""
    n_batch, *rest = a.state_shape
    return n_batch, blocks(a.n_token, SEGMENT) - 1, *rest


def _plan(a: Arguments, emitted: Iterable[str], tile: Tile, segment: int, saves: bool) -> Plan:
    """The launches; it saves states, or not, before every `segment`-th token."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    n_group, n_state = a.B.shape[2:]
    if saves and segment % tile.tokens:
        raise ValueError(f"`segment` must be a multiple of the tile's {tile.tokens} tokens; got {segment}")
    chunk = blocks(blocks(n_token, tile.chunks), tile.tokens) * tile.tokens
    n_chunk = blocks(n_token, chunk)
    n_block = blocks(n_head // n_group * head_channel, tile.rows)
    state = padded(n_state)
    low = min(tile.low, state)
    kept_token, kept_head = a.kept
    plan = Plan(a.x.device)
    inputs = "x", "delta", "A", "B"
    more = "D", "z", "bias", "starts", "log", "initial"
    outputs = *_between(plan, a, n_chunk - 1, "delta_cumsum" in emitted), "out", "last", "token_slot", "head_slot"
    sizes = (
        a.x.stride(), a.delta.stride(), a.B.stride(), a.C.stride(), (a.x if a.z is None else a.z).stride(),
        n_token, n_chunk, chunk, kept_token,
        n_head, head_channel, n_group, n_state, kept_head, tile.rows, tile.tokens, state // low, low,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh",
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": 1, "maxnreg": REGISTERS, "enable_fp_fusion": fusible(n_state)}
    if n_chunk > 1:
        nothing = (None,) * (len(EMITTED) + 1)
        grid = n_block, n_chunk - 1, n_batch * n_group
        plan.add(scan_kernel, grid, *inputs, None, *more, *outputs, *nothing, *sizes, 1, EARLY, segment, **options)
        options["launch_pdl"] = EARLY
    grid = n_block, n_chunk, n_batch * n_group
    asked = *(f"e_{name}" if name in emitted else None for name in EMITTED), "states" if saves else None
    plan.add(scan_kernel, grid, *inputs, "C", *more, *outputs, *asked, *sizes, tile.stages, EARLY, segment, **options)
    return plan


def _between(plan: Plan, a: Arguments, n_chunk: int, sums: bool) -> tuple[str | None, str | None, str | None]:
    """What chunks leave for the later ones: their decay (the sum of delta, or log2 of every state's), their last state,
    and the sum of delta in float64 where it is emitted."""
    if not n_chunk:
        return None, None, None
    n_batch, *rest = a.state_shape
    rows = n_batch, n_chunk, *rest
    whole = a.log_decay is not None or a.starts is not None
    decay = plan.empty("decay", rows if whole else rows[:-1], a.dtype)
    elapsed = plan.empty("elapsed", rows[:3], torch.float64) if sums else None
    return decay, plan.empty("local", rows, a.dtype), elapsed


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, where there is one."""
    return None if tensor is None else tensor.contiguous()
