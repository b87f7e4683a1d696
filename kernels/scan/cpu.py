"""The selective scan in blocks of tokens with plain torch: no compiler, differentiable, on any device of torch.

Real A (head,): matrix products within a chunk, decays from segment sums (Dao & Gu 2024, arXiv 2405.21060, section 6);
never from differences of cumulative sums, which lose 4.8e-4 .. 2.2e-3 after a large delta. Any other A: exp over a
whole block at once, then one multiply-add a token. In both, the log of A_bar is -inf where a sequence starts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.naive import decay_exponent, read_out, step_size, write_scale

__all__ = ["BLOCK_BYTES", "scan"]

BLOCK_BYTES = 16 * 2**20
"""Memory that the temporaries of one block may take; outputs, emission and autograd's saved tensors come on top."""
LONGEST_CHUNK = 64
"""Tokens of a chunk for A (head,): its work a token grows with this length."""

Step = tuple[Tensor, Tensor, Callable[[slice | list[int]], Tensor]]
"""Of one block: y (batch, token, head, head_channel) without D, the state after it, the states after chosen tokens."""


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    delta = step_size((a.delta[:, :1] if a.constant_delta else a.delta).to(a.dtype), a)
    chunks = a.scalar_A and not a.A.is_complex()
    step, length = (_chunked, _chunk_length(a)) if chunks else (_blocked, _block_length(a))
    h, outputs, kept = a.initial_state, [], {name: [] for name in ("h", "y") if name in a.emit.variables}
    for start in range(0, a.n_token, length):
        span = slice(start, start + length)
        x, B, C = (a.widened(tensor[:, span]) for tensor in (a.x, a.B, a.C))
        log_decay = None if a.log_decay is None else a.widened(a.log_decay[:, span])
        here = delta if a.constant_delta else delta[:, span]
        exponent = decay_exponent(here, a.A, log_decay, None if a.starts is None else a.starts[:, span])
        y, h, states = step(h, x, exponent, write_scale(here, a.A, a.discretization), B, C)
        y = y if a.D is None else y + a.D * x
        if "h" in kept:
            kept["h"].append(a.emit.heads_of(states(a.emit.positions(start, start + length)), 2))
        if "y" in kept:
            kept["y"].append(a.emit.heads_of(a.emit.tokens_of(y, start), 2))
        outputs.append((y if a.z is None else y * F.silu(a.z[:, span].to(a.dtype))).to(a.x.dtype))
    emission = _stateless(a, delta.expand(a.delta.shape)) | {
        name: torch.cat(blocks, dim=1) for name, blocks in kept.items()
    }
    return torch.cat(outputs, dim=1), h, Emission(**emission)


def _blocked(h: Tensor, x: Tensor, exponent: Tensor, scale: Tensor, B: Tensor, C: Tensor) -> Step:
    """One block with any A; exponent and scale hold one token where delta is constant."""
    B, C = (_per_head(tensor, x.shape[2])[:, :, :, None] for tensor in (B, C))
    A_bar = torch.exp(exponent)[:, :, :, None].expand(-1, x.shape[1], -1, -1, -1)
    write = scale[:, :, :, None] * x[..., None] * B
    states = []
    for decay, wrote in zip(A_bar.unbind(1), write.unbind(1), strict=True):
        h = torch.addcmul(wrote, decay, h)
        states.append(h)
    block = torch.stack(states, dim=1)
    return read_out((block * C).sum(-1)), h, lambda chosen: block[:, chosen]


def _chunked(h: Tensor, x: Tensor, exponent: Tensor, scale: Tensor, B: Tensor, C: Tensor) -> Step:
    """One chunk with real A (head,): heads as (g group, r head of the group), tokens l (to) and s (from)."""
    n_group, exponent = B.shape[2], exponent.expand(-1, x.shape[1], -1, -1)
    exponent, write = exponent[..., 0].unflatten(2, (n_group, -1)), (scale * x).unflatten(2, (n_group, -1))
    h = h.unflatten(1, (n_group, -1))
    since_start = torch.exp(exponent.cumsum(1))
    decay = torch.exp(_segment_sum(exponent.movedim(1, -1)))
    scores = torch.einsum("blgn,bsgn->bgls", C, B)[:, :, None] * decay
    y = torch.einsum("bgrls,bsgrp->blgrp", scores, write)
    y = y + torch.einsum("blgn,bgrpn->blgrp", C, h) * since_start[..., None]

    def states(chosen: slice | list[int]) -> Tensor:
        decayed = write.movedim(1, -1)[:, None] * decay[:, :, :, chosen].movedim(3, 1)[..., None, :]
        local = torch.einsum("blgrps,bsgn->blgrpn", decayed, B)
        return (local + since_start[:, chosen, :, :, None, None] * h[:, None]).flatten(2, 3)

    return y.flatten(2, 3), states([x.shape[1] - 1])[:, 0], states


def _segment_sum(log_decay: Tensor) -> Tensor:
    """S[..., l, s] = sum over s < r <= l of log_decay[..., r], -inf for s > l; each sum on its own."""
    length = log_decay.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, length).masked_fill(~lower.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def _stateless(a: Arguments, delta: Tensor) -> dict[str, Tensor]:
    """What was asked for and needs no state."""
    chosen = a.emit.heads_of(a.emit.tokens_of(delta), 2)
    A = a.emit.heads_of(a.A, 0)
    group = [head // a.heads_per_group for head in a.emit.channels or range(a.A.shape[0])]

    def A_bar() -> Tensor:
        given = None if a.log_decay is None else a.widened(a.emit.heads_of(a.emit.tokens_of(a.log_decay), 2))
        A_bar = torch.exp(decay_exponent(chosen, A, given, None if a.starts is None else a.emit.tokens_of(a.starts)))
        return A_bar[..., 0] if a.scalar_A else A_bar

    makers = {
        "delta": lambda: chosen.clone(),
        "A_bar": A_bar,
        "B_bar": lambda: write_scale(chosen, A, a.discretization) * a.widened(a.emit.tokens_of(a.B))[:, :, group],
        "B": lambda: a.emit.tokens_of(a.B).clone(),
        "C": lambda: a.emit.tokens_of(a.C).clone(),
        "delta_cumsum": lambda: a.emit.tokens_of(a.emit.heads_of(delta, 2).cumsum(1, dtype=torch.float64)),
    }
    return {name: make() for name, make in makers.items() if name in a.emit.variables}


def _per_head(tensor: Tensor, n_head: int) -> Tensor:
    """(batch, token, group, state) -> its head axis, left at 1 where one group serves all."""
    n_group = tensor.shape[2]
    return tensor if n_group == 1 else tensor.repeat_interleave(n_head // n_group, dim=2)


def _block_length(a: Arguments) -> int:
    """Tokens whose A_bar, write, states and y's products (zoh: and phi1's four), all state-sized, fit BLOCK_BYTES."""
    n_tensor = 4 if a.discretization == "euler" else 8
    return max(1, BLOCK_BYTES // (n_tensor * a.initial_state.numel() * a.initial_state.itemsize))


def _chunk_length(a: Arguments) -> int:
    """Tokens whose segment sums, decays and scores (batch, head, token, LONGEST_CHUNK) fit BLOCK_BYTES."""
    bytes_a_token = 3 * LONGEST_CHUNK * a.x.shape[0] * a.x.shape[2] * a.dtype.itemsize
    return min(LONGEST_CHUNK, max(1, BLOCK_BYTES // bytes_a_token))
