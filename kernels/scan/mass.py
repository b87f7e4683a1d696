"""mass and mass_distance: a recurrence over tokens of its own, which needs neither x nor h. Real A.

A program keeps m and d of BLOCK_R heads, of one group and one batch item, in registers and walks over the tokens of one
chunk, BLOCK_T at a time:

    m_t = A_bar_t m_{t-1} + |B_bar_t|                  mass_t          = sum_n |C_t| m_t
    d_t = A_bar_t (d_{t-1} + m_{t-1})                  mass_distance_t = sum_n |C_t| d_t / mass_t

With several chunks the kernel runs twice: with LOCAL for every chunk but the last, from nothing, which leaves its m
and d and the log2 of its whole decay; then for every chunk, from what the chunks before it left, in order: beside what
it adds itself, a chunk of L tokens and decay a takes (m, d) to (a m, a (d + L m)).

All terms are positive, and what decays err alike from token to token adds up: they are exact near 1 whatever came in.
Nothing is computed after the last token asked for, nor of a block of heads of which none is asked for.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Iterable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.discretization import Given
from mamba_probe.kernels.scan.elementwise import LOG2E, bounded, decay, phi1, step_size
from mamba_probe.kernels.scan.fused import REGISTERS, SHORTEST, WARPS, multiprocessors
from mamba_probe.kernels.scan.launcher import Plan, Plans, blocks, fusible, padded, planned, start
from mamba_probe.kernels.scan.places import program_rows, states_at
from mamba_probe.kernels.scan.rows import columns, from_columns, slices

__all__ = ["Tile", "choose_tile", "launch", "mass_kernel"]


class Form(NamedTuple):
    """What the kernel is compiled for, beside its tile and the step sizes."""

    H: tl.constexpr
    N: tl.constexpr
    DECAYS: tl.constexpr
    KEPT_HEAD: tl.constexpr
    FAR: tl.constexpr
    ZOH: tl.constexpr
    LOCAL: tl.constexpr


@triton.jit
def _load_tokens(p, strides, o_v, m_v, t, stop, BLOCK_T: tl.constexpr):
    """B or C of BLOCK_T tokens from t on, as they came: tiles (4, high, low)."""
    tiles = ()
    for j in tl.static_range(BLOCK_T // 4):
        o_four = (t + 4 * j + tl.arange(0, 4)).to(tl.int64)[:, None, None]
        tiles = tiles + (tl.load(p + o_four * strides[1] + o_v * strides[3], mask=(o_four < stop) & m_v, other=0.0),)
    return tiles


@triton.jit
def _step(b_m, b_d, b_delta, b_A, b_B, b_log, i_start, FAR: tl.constexpr, ZOH: tl.constexpr):
    """One token: the new m and d, and log2 of the decay; b_A is A log2(e)."""
    b_log2 = b_delta * b_A
    b_write = tl.abs(b_delta) * b_B
    if ZOH:
        b_write *= phi1(b_log2 * (1.0 / LOG2E), tl.exp2(b_log2))
    if b_log is not None:
        b_log2 = b_log * LOG2E
    if i_start is not None:
        b_log2 = tl.where(i_start != 0, -float("inf"), b_log2)
    b_a = decay(b_log2)
    b_kept = b_a * b_m
    if FAR:
        b_d = b_a * b_d + b_kept
    return b_kept + b_write, b_d, b_log2


@triton.jit
def _entering(p_decay, p_m, p_d, o_state, m_state, o_decay, m_decay, i_batch, i_chunk, n_chunk, chunk,
              dtype: tl.constexpr, form: tl.constexpr):  # fmt: skip
    """m and d before a chunk: what the chunks before it left, in order; else nothing."""
    b_m = tl.zeros(o_state.shape, dtype)
    b_d = tl.zeros(o_state.shape, dtype)
    if not form.LOCAL and p_m is not None:
        for i_earlier in tl.range(0, i_chunk, loop_unroll_factor=4):
            i_left = i_batch * (n_chunk - 1) + i_earlier
            b_a = decay(tl.load(p_decay + i_left * (form.H * form.DECAYS) + o_decay, mask=m_decay, other=0.0))
            o_left = i_left * (form.H * form.N) + o_state
            if form.FAR:
                b_d = b_a * (b_d + b_m * chunk) + tl.load(p_d + o_left, mask=m_state, other=0.0)
            b_m = b_a * b_m + tl.load(p_m + o_left, mask=m_state, other=0.0)
    return b_m, b_d


@triton.jit
def _walk(b_m, b_d, b_whole, b_delta, b_Bs, b_Cs, b_A, given, log_strides, o_log, m_decay, i_batch, n_token, t, stop,
          form: tl.constexpr):  # fmt: skip
    """A block of tokens, one after another: m, d and (LOCAL) the log2 of the decay after them; and of each token, by
    head, the sums over states of C m and C d."""
    dtype: tl.constexpr = b_m.dtype
    deltas = columns(b_delta)
    masses = ()
    fars = ()
    for j in tl.static_range(b_delta.shape[1] // 4):
        b_four = tl.abs(b_Bs[j].to(dtype))
        if not form.LOCAL:
            b_four = tl.join(b_four, tl.abs(b_Cs[j].to(dtype)))  # one way through shared memory for both
        BCs = slices(b_four)
        for u in tl.static_range(4):
            i_token = tl.minimum(t + 4 * j + u, stop - 1).to(tl.int64)
            b_log = None
            if given.log_decay is not None:
                p_log = given.log_decay + i_token * log_strides[1] + o_log
                b_log = tl.load(p_log, mask=m_decay, other=0.0).to(dtype)
            i_start = None
            if given.starts is not None:
                i_start = tl.load(given.starts + i_batch * n_token + i_token)
            if form.LOCAL:
                b_B = BCs[u]
            else:
                b_B, b_C = tl.split(BCs[u])
            b_delta_t = deltas[4 * j + u][:, None, None]
            b_m, b_d, b_log2 = _step(b_m, b_d, b_delta_t, b_A, b_B, b_log, i_start, form.FAR, form.ZOH)
            if form.LOCAL:
                b_whole += b_log2
            else:
                masses = masses + (tl.sum(tl.sum(b_m * b_C, axis=2), axis=1),)
                if form.FAR:
                    fars = fars + (tl.sum(tl.sum(b_d * b_C, axis=2), axis=1),)
    return b_m, b_d, b_whole, masses, fars


@triton.jit
def _answer(e_mass, e_distance, p_token_slot, masses, fars, b_slot, m_now, i_batch, n_kept_token, t, stop,
            form: tl.constexpr):  # fmt: skip
    """Store mass and mass_distance of a block's tokens, where they are asked for."""
    o_token = tl.arange(0, m_now.shape[1])
    b_token = t + o_token
    m_kept = m_now
    if p_token_slot is not None:
        b_token = tl.load(p_token_slot + t + o_token, mask=t + o_token < stop, other=-1)
        m_kept = m_now & (b_token >= 0)[None, :]
    o_kept = (i_batch * n_kept_token + b_token.to(tl.int64))[None, :] * form.KEPT_HEAD + b_slot[:, None]
    b_mass = from_columns(masses)
    if e_mass is not None:
        tl.store(e_mass + o_kept, b_mass, mask=m_kept)
    if form.FAR:
        tl.store(e_distance + o_kept, from_columns(fars) / b_mass, mask=m_kept)


@triton.jit
def mass_kernel(
    p_delta, p_A, p_B, p_C, p_bias, p_starts, p_log, p_decay, p_m, p_d, p_token_slot, p_head_slot, e_mass, e_distance,
    delta_strides, B_strides, C_strides, log_strides, n_token, n_seen, n_chunk, chunk, n_kept_token,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, DECAYS: tl.constexpr, KEPT_HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    FAR: tl.constexpr, SOFTPLUS: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of heads x chunks x (batch x group). A state is (high, low), low contiguous in memory. A head has
    DECAYS decays, N or one for all its states."""
    LOCAL: tl.constexpr = p_C is None
    form: tl.constexpr = Form(H, N, DECAYS, KEPT_HEAD, FAR, ZOH, LOCAL)
    dtype: tl.constexpr = p_A.dtype.element_ty
    i_chunk = tl.program_id(1)
    at = program_rows(H, 1, G, BLOCK_R)
    o_head = at.head.to(tl.int64)
    o_token = tl.arange(0, BLOCK_T)
    o_v, m_v = states_at(HIGH, LOW, N)
    b_slot = o_head
    m_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R) < H // G  # asked, even where all are
    if p_head_slot is not None:
        b_slot = tl.load(p_head_slot + o_head, mask=m_row, other=-1).to(tl.int64)
        m_row = m_row & (b_slot >= 0)
    m_state = m_row[:, None, None] & m_v
    start = i_chunk * chunk
    stop = tl.where(tl.sum(m_row.to(tl.int32), 0) > 0, tl.minimum(start + chunk, n_seen), start)
    o_state = o_head[:, None, None] * N + o_v
    o_decay = o_head[:, None, None]
    m_decay = m_row[:, None, None]
    if DECAYS > 1:
        o_decay = o_state
        m_decay = m_state
    b_A = bounded(tl.load(p_A + o_decay, mask=m_decay, other=0.0) * LOG2E)
    b_bias = 0.0 if p_bias is None else tl.load(p_bias + o_head, mask=m_row, other=0.0)[:, None]
    p_B += at.batch * B_strides[0] + at.group * B_strides[2]
    if not LOCAL:
        p_C += at.batch * C_strides[0] + at.group * C_strides[2]
    p_delta += at.batch * delta_strides[0]
    o_delta = o_head[:, None] * delta_strides[2]
    o_log = o_head[:, None, None] * log_strides[2]
    if p_log is not None:
        p_log += at.batch * log_strides[0]
        if DECAYS > 1:
            o_log += o_v * log_strides[3]
    given = Given(p_starts, p_log)
    b_m, b_d = _entering(p_decay, p_m, p_d, o_state, m_state, o_decay, m_decay, at.batch, i_chunk, n_chunk, chunk,
                         dtype, form)  # fmt: skip
    b_whole = tl.zeros(b_A.shape, dtype)

    # the first block; what is loaded in the loop belongs to the next
    o_next = (start + o_token).to(tl.int64)[None, :]
    m_next = m_row[:, None] & (o_next < stop)
    n_raw = tl.load(p_delta + o_delta + o_next * delta_strides[1], mask=m_next, other=0.0)
    n_B = _load_tokens(p_B, B_strides, o_v, m_v, start, stop, BLOCK_T)
    n_C = n_B if LOCAL else _load_tokens(p_C, C_strides, o_v, m_v, start, stop, BLOCK_T)
    for t in range(start, stop, BLOCK_T):
        m_now = m_next
        b_delta = tl.where(m_now, step_size(n_raw.to(dtype) + b_bias, SOFTPLUS, MIN, MAX), 0.0)
        b_Bs = n_B
        b_Cs = n_C
        o_next += BLOCK_T
        m_next = m_row[:, None] & (o_next < stop)
        n_raw = tl.load(p_delta + o_delta + o_next * delta_strides[1], mask=m_next, other=0.0)
        n_B = _load_tokens(p_B, B_strides, o_v, m_v, t + BLOCK_T, stop, BLOCK_T)
        n_C = n_B if LOCAL else _load_tokens(p_C, C_strides, o_v, m_v, t + BLOCK_T, stop, BLOCK_T)
        b_m, b_d, b_whole, masses, fars = _walk(
            b_m, b_d, b_whole, b_delta, b_Bs, b_Cs, b_A, given, log_strides, o_log, m_decay, at.batch, n_token, t, stop,
            form)  # fmt: skip
        if not LOCAL:
            _answer(e_mass, e_distance, p_token_slot, masses, fars, b_slot, m_now, at.batch, n_kept_token, t, stop,
                    form)  # fmt: skip

    if LOCAL:
        i_left = at.batch * (n_chunk - 1) + i_chunk
        o_left = i_left * (H * N) + o_state
        tl.store(p_decay + i_left * (H * DECAYS) + o_decay, b_whole, mask=m_decay)
        tl.store(p_m + o_left, b_m, mask=m_state)
        if FAR:
            tl.store(p_d + o_left, b_d, mask=m_state)


class Tile(NamedTuple):
    """What one program does: heads and tokens of a block, chunks of a sequence."""

    heads: int
    tokens: int
    chunks: int


def choose_tile(a: Arguments) -> Tile:
    """A program is a warp whose threads have 8 states, or 4 where that fills the card; else chunks of tokens fill it.

    Blocks are shorter where B and C of 8 tokens, loaded ahead, would not fit the registers.
    """
    n_state = padded(a.B.shape[3])
    n_head, sms = a.x.shape[0] * a.x.shape[2], multiprocessors(a.x.device)
    tokens = 8 if n_state * a.B.dtype.itemsize <= 256 else 4
    wide, narrow = (max(1, min(32, states * 32 // n_state)) for states in (8, 4))
    for heads in (wide, narrow):
        if n_head >= 9 * sms * heads:
            return Tile(heads, tokens, 1)
    return Tile(wide, tokens, max(1, min(WARPS * sms * wide // n_head, a.n_token // SHORTEST)))


def launch(
    a: Arguments,
    emitted: dict[str, Tensor],
    token_slot: Tensor | None,
    head_slot: Tensor | None,
    tile: Tile | None = None,
    plans: Plans | None = None,
) -> None:
    """Fill mass and mass_distance, whichever is in `emitted`; nothing where neither is."""
    if "mass" not in emitted and "mass_distance" not in emitted:
        return
    plan = planned(plans, (choose_tile, tile), lambda: _plan(a, emitted, tile or choose_tile(a)))
    given = {
        "delta": a.delta, "A": a.A, "B": a.B, "C": a.C, "bias": a.delta_bias,
        "starts": None if a.starts is None else a.starts.contiguous(), "log": a.log_decay,
        "token_slot": token_slot, "head_slot": head_slot,
    }  # fmt: skip
    start(plan, given | {f"e_{name}": value for name, value in emitted.items()})


def _plan(a: Arguments, emitted: Iterable[str], tile: Tile) -> Plan:
    """The launches."""
    asked = [f"e_{name}" if name in emitted else None for name in ("mass", "mass_distance")]
    n_batch, n_token, n_head, _ = a.x.shape
    n_group, n_state = a.B.shape[2:]
    n_seen = a.emit.tokens[-1] + 1 if a.emit.tokens else n_token
    chunk = blocks(blocks(n_token, tile.chunks), tile.tokens) * tile.tokens
    n_chunk = blocks(n_seen, chunk)
    kept_token, kept_head = a.kept
    n_block, state = blocks(n_head // n_group, tile.heads), padded(n_state)
    plan = Plan(a.x.device)
    decay = m = d = None
    if n_chunk > 1:
        m, d = (plan.empty(name, (n_batch, n_chunk - 1, n_head, n_state), a.dtype) for name in "md")
        decay = plan.empty("decay", (n_batch, n_chunk - 1, *a.A.shape), a.dtype)
    for is_local in (True, False) if n_chunk > 1 else (False,):
        plan.add(
            mass_kernel, (n_block, n_chunk - is_local, n_batch * n_group),
            "delta", "A", "B", None if is_local else "C", "bias", "starts", "log", decay, m, d,
            "token_slot", "head_slot", *((None, None) if is_local else asked),
            a.delta.stride(), a.B.stride(), a.C.stride(), (a.B if a.log_decay is None else a.log_decay).stride(),
            n_token, n_seen, n_chunk, chunk, kept_token, n_head, n_group, n_state, a.A.shape[1], kept_head,
            tile.heads, tile.tokens, state // min(4, state), min(4, state), asked[1] is not None,
            a.delta_softplus, *a.delta_limits, a.discretization == "zoh",
            num_warps=1, num_stages=1, maxnreg=REGISTERS, enable_fp_fusion=fusible(n_state),
        )  # fmt: skip
    return plan
