"""The backward of `fused`: gradients of everything a scan took, from those of everything it answered. A (head, state).

The forward saves its inputs and the state before every SEGMENT-th token; the rest is computed again, a segment at a
time, while g = dL/dh goes back from the last token. With several chunks the kernel runs twice, as forward: first LOCAL,
for every chunk but the first, from nothing; then for every chunk, from what the later ones left.

Deterministic: what is a sum over rows (dB, dC), chunks or batch items (dA, dD, d delta_bias) is written in parts, one a
program, and summed in one order by a launch more (`sums`).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.backward_kernel import backward_kernel
from mamba_probe.kernels.scan.fused import SEGMENT, dense, multiprocessors
from mamba_probe.kernels.scan.launcher import Plan, Plans, blocks, fusible, padded, planned, slots, start
from mamba_probe.kernels.scan.sums import ANSWERS, add_sums, gradients

__all__ = ["Tile", "Upstream", "backward", "backward_kernel", "choose_tile"]

WARPS = 8
"""That an SM holds at REGISTERS registers a thread: two on each of its four schedulers."""

REGISTERS = 255

LOCAL_COST = 0.25
"""Of a chunk's pass from nothing, beside its main pass."""

FILLED = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "log_decay")
"""Gradients, or their parts, in the order of the kernel's arguments."""

REFUSED = ("energy", "mass", "mass_distance")
"""Emitted, and without a gradient here."""


class Upstream(NamedTuple):
    """Gradients of what a scan answered, of that shape; None where nothing depends on it."""

    out: Tensor | None = None
    last_state: Tensor | None = None
    delta: Tensor | None = None
    A_bar: Tensor | None = None
    B_bar: Tensor | None = None
    h: Tensor | None = None
    y: Tensor | None = None
    delta_cumsum: Tensor | None = None
    energy: Tensor | None = None
    mass: Tensor | None = None
    mass_distance: Tensor | None = None


class Tile(NamedTuple):
    """What one program does: rows and tokens of a block, chunks of a sequence, tokens between two saved states, warps,
    registers a thread, states side by side in a thread."""

    rows: int
    tokens: int = 4
    chunks: int = 1
    segment: int = SEGMENT
    warps: int = 2
    registers: int = REGISTERS
    low: int = 4


def choose_tile(a: Arguments) -> Tile:
    """8 states a thread, and as many chunks of tokens as take the least rounds: a chunk more costs a LOCAL pass."""
    group_rows = a.heads_per_group * a.x.shape[3]
    warps = 2
    rows = max(4, min(64, 256 * warps // padded(a.B.shape[3])))
    if rows > padded(group_rows):
        rows, warps = rows // 2, 1
    programs = blocks(group_rows, rows) * a.x.shape[0] * a.B.shape[2]
    slots = WARPS // warps * multiprocessors(a.x.device)
    return Tile(rows, chunks=_choose_chunks(programs, slots, a.n_token), warps=warps)


@cache
def _choose_chunks(programs: int, slots: int, n_token: int) -> int:
    """Of whole segments, where `slots` programs run at once."""

    def cost(chunks: int) -> float:
        used = blocks(n_token, blocks(blocks(n_token, chunks), SEGMENT) * SEGMENT)
        rounds = blocks(programs * used, slots) * slots / (programs * used)
        return rounds * (1 + LOCAL_COST * (used - 1) / used)

    return min(range(1, max(1, n_token // SEGMENT) + 1), key=cost)


def backward(
    a: Arguments, states: Tensor | None, given: Upstream, tile: Tile | None = None, plans: Plans | None = None
) -> dict[str, Tensor]:
    """Gradients by the name of the argument, for each that was given; of its dtype, and of its shape but for a D
    (head,) that several channels share: that is (head, head_channel).

    states (batch, ceil(token / segment) - 1, head, head_channel, state), before tokens segment, 2 segment, ...: the
    forward's `states`, which may be None where there are none.

    Raises ValueError for gradients of an emitted energy, mass or mass_distance.
    """
    for name in REFUSED:
        if getattr(given, name) is not None:
            raise ValueError(f'backend "triton" has no gradient of the emitted `{name}`: use backend="cpu"')
    above = _given(a, given)
    kinds = tuple([None if value is None else value.dtype for value in above.values()])
    key = choose_tile, tile, states is None, kinds, None if given.out is None else given.out.stride()
    plan = planned(plans, key, lambda: _plan(a, above, tile or choose_tile(a)))
    n_token, n_head = a.x.shape[1:3]
    inputs = {
        "x": a.x, "delta": a.delta, "A": a.A, "B": a.B, "C": a.C, "D": dense(a.D), "z": a.z, "bias": a.delta_bias,
        "starts": dense(a.starts), "log": dense(a.log_decay), "initial": a.given_state, "states": states,
        "token_slot": slots(a.emit.tokens, n_token, a.x.device),
        "head_slot": slots(a.emit.channels, n_head, a.x.device),
    }  # fmt: skip
    return gradients(a, start(plan, inputs | above))


def _plan(a: Arguments, above: dict[str, Tensor | None], tile: Tile) -> Plan:
    """The launches, which read of the gradients what `above` names."""
    n_batch, n_token, n_head, head_channel = a.x.shape
    n_group, n_state = a.B.shape[2:]
    chunk = blocks(blocks(n_token, tile.chunks), tile.segment) * tile.segment
    n_chunk = blocks(n_token, chunk)
    n_block = blocks(a.heads_per_group * head_channel, tile.rows)
    low = min(tile.low, padded(n_state))
    plan = Plan(a.x.device)
    inputs = "x", "delta", "A", "B", "C", "D", "z", "bias", "starts", "log", "initial", "states"
    inputs += (_scratch(plan, a, tile, n_batch * n_group * n_chunk * n_block),)
    tensors = *inputs, *above, "token_slot", "head_slot", *_between(plan, a, n_chunk - 1)
    kept_token, kept_head = a.kept
    given_out = above["d_out"]
    sizes = (
        *(t.stride() for t in (a.x, a.delta, a.B, a.C, a.x if a.z is None else a.z)),
        (a.x if given_out is None else given_out).stride(),
        n_token, n_chunk, chunk, kept_token, n_batch, n_head, head_channel, n_group, n_state, kept_head,
        tile.rows, tile.tokens, tile.segment, padded(n_state) // low, low,
        a.delta_softplus, *a.delta_limits, a.discretization == "zoh", 1, tile.warps,
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": 1, "maxnreg": tile.registers}
    options["enable_fp_fusion"] = fusible(n_state)
    if n_chunk > 1:
        nothing = (None,) * len(FILLED)
        plan.add(backward_kernel, (n_block, n_chunk - 1, n_batch * n_group), *tensors, *nothing, *sizes, **options)
    out, parts = _outputs(plan, a, n_chunk, n_block)
    plan.add(backward_kernel, (n_block, n_chunk, n_batch * n_group), *tensors, *out, *sizes, **options)
    add_sums(plan, a, parts, (n_block, n_batch * n_chunk, n_batch * n_chunk))
    return plan


def _given(a: Arguments, given: Upstream) -> dict[str, Tensor | None]:
    """Those of `given` that the kernel reads, in the order of its arguments."""
    return {
        "d_out": given.out,
        "d_last": dense(given.last_state),
        "d_delta": dense(_of_delta(a, given)),
        "d_A_bar": dense(given.A_bar),
        "d_B_bar": dense(given.B_bar),
        "d_h": dense(given.h),
        "d_y": dense(given.y),
    }


def _of_delta(a: Arguments, given: Upstream) -> Tensor | None:
    """The gradient of the emitted delta, and that of delta_cumsum: of a token, the sum over those from it on."""
    if given.delta_cumsum is None:
        return given.delta
    if a.emit.tokens is not None:
        raise ValueError("a gradient of `delta_cumsum` needs every token to be emitted: leave `emit.tokens` None")
    summed = given.delta_cumsum.flip(1).cumsum(1).flip(1).to(a.dtype)
    return summed if given.delta is None else given.delta + summed


def _scratch(plan: Plan, a: Arguments, tile: Tile, n_program: int) -> str | None:
    """Where each program keeps the states of one segment, one a block; None where those saved are as many."""
    if tile.segment == tile.tokens:
        return None
    shape = n_program, tile.segment // tile.tokens, tile.rows, padded(a.B.shape[3])
    return plan.empty("scratch", shape, a.dtype)


def _between(plan: Plan, a: Arguments, n_chunk: int) -> tuple[str | None, str | None]:
    """What chunks leave for the earlier ones: log2 of their decay, and g before them from nothing."""
    if not n_chunk:
        return None, None
    n_batch, *rest = a.state_shape
    decay, local = (plan.empty(name, (n_batch, n_chunk, *rest), a.dtype) for name in ("decay", "local"))
    return decay, local


def _outputs(plan: Plan, a: Arguments, n_chunk: int, n_block: int) -> tuple[list[str | None], dict[str, str | None]]:
    """What the kernel fills, in the order of its arguments: gradients, and parts of those that are sums; and these."""
    n_batch, n_token, *rows = a.x.shape
    n_state = a.A.shape[1]
    of_BC = n_block, n_batch, n_token, *a.B.shape[2:]

    def make(name: str, given: Tensor | None, shape: Sequence[int]) -> str | None:
        return None if given is None else plan.make(ANSWERS[name], tuple(shape), given.dtype)

    def part(name: str, given: Tensor | None, *shape: int) -> str | None:
        return None if given is None else plan.empty(f"parts_{name}", shape, a.dtype)

    parts = {
        "A": part("A", a.A, n_batch, n_chunk, *rows, n_state),
        "B": part("B", a.B, 2, *of_BC),
        "C": plan.part("parts_C", "parts_B", math.prod(of_BC)),
        "D": part("D", a.D, n_batch, n_chunk, *rows),
        "delta_bias": part("delta_bias", a.delta_bias, n_batch, n_chunk, *rows),
    }
    if rows[1] > 1:
        parts["delta"] = part("delta", a.delta, *a.x.shape)
        parts["log_decay"] = part("log_decay", a.log_decay, *a.x.shape, n_state)
    filled = {
        "x": make("x", a.x, a.x.shape),
        "delta": make("delta", a.delta, a.delta.shape) if rows[1] == 1 else None,
        "z": make("z", a.z, a.x.shape),
        "initial_state": make("initial_state", a.given_state, a.state_shape),
        "log_decay": make("log_decay", a.log_decay, (*a.delta.shape, n_state)) if rows[1] == 1 else None,
    }
    return [parts.get(name) or filled.get(name) for name in FILLED], parts
