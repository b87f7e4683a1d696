"""The selective scan in blocks of tokens with plain torch, or compiled (`compiled.py` says when); differentiable.

Real A (head,): matrix products within a chunk, decays from segment sums (Dao & Gu 2024, arXiv 2405.21060, section 6);
never from differences of cumulative sums, which lose 4.8e-4 .. 2.2e-3 after a large delta. Any other A: exp over a
whole block at once, then one multiply-add a token. In both, the log of A_bar is -inf where a sequence starts.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan import compiled
from mamba_probe.kernels.scan.arguments import Arguments
from mamba_probe.kernels.scan.block import Block, Step, select
from mamba_probe.kernels.scan.naive import decay_exponent, read_out, read_size, step_size, write_scale

__all__ = ["BLOCK_BYTES", "scan"]

BLOCK_BYTES = 16 * 2**20
"""Memory that the temporaries of one block may take; outputs, emission and autograd's saved tensors come on top."""
LONGEST_CHUNK = 64
"""Tokens of a chunk for A (head,): its work a token grows with this length."""


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    answer = None
    if compiled.wanted(a):
        answer = compiled.attempt(lambda: _by_blocks(a, compiled.step, compiled.length(a, BLOCK_BYTES)))
    if answer is None:
        chunks = a.scalar_A and not a.A.is_complex()
        answer = _by_blocks(a, *((_chunked, _chunk_length(a)) if chunks else (_blocked, _block_length(a))))
    return answer


def _by_blocks(a: Arguments, step: Callable[[Tensor, Block], Step], length: int) -> tuple[Tensor, Tensor, Emission]:
    """`step` on `length` tokens at a time, and what depends on nothing but its y and states."""
    delta = step_size((a.delta[:, :1] if a.constant_delta else a.delta).to(a.dtype), a)
    kept = {name: _Kept(name, a) for name in ("h", "energy", "y") if name in a.emit.variables}
    h, outputs = a.initial_state, []
    for start in range(0, a.n_token, length):
        span = slice(start, start + length)
        block = Block(a, delta if a.constant_delta else delta[:, span], span)
        y, h, states = step(h, block)
        y = y if a.D is None else y + a.D * block.x
        chosen = a.emit.positions(start, start + length)
        after = states(chosen) if compiled.needs_states(a) else []
        for name, keeper in kept.items():
            keeper.add(select(list(y.unbind(1)), chosen) if name == "y" else after)
        outputs.append((y if a.z is None else y * F.silu(a.z[:, span].to(a.dtype))).to(a.x.dtype))
    emission = {name: keeper.all() for name, keeper in kept.items()} | _stateless(a, delta.expand(a.delta.shape))
    return torch.cat(outputs, dim=1), h, Emission(**emission, **_masses(a, delta))


class _Kept:
    """One variable that is emitted token by token; written once, into its place, where no gradient forbids it."""

    def __init__(self, name: str, a: Arguments) -> None:
        self._name, self._a, self._n_token, self._tokens = name, a, 0, []
        self._whole: Tensor | None = None

    def add(self, tokens: Sequence[Tensor]) -> None:
        """The next chosen tokens, each (batch, head, head_channel, ...)."""
        emit = self._a.emit
        tokens = [emit.rounded(self._name, emit.heads_of(token, 1)) for token in tokens]
        tokens = [_energy(token) for token in tokens] if self._name == "energy" else tokens
        if compiled.needs_grad(self._a):
            self._tokens += tokens
        elif tokens:
            if self._whole is None:
                n_token = self._a.n_token if emit.tokens is None else len(emit.tokens)
                self._whole = tokens[0].new_empty(len(tokens[0]), n_token, *tokens[0].shape[1:])
            torch.stack(tokens, dim=1, out=self._whole[:, self._n_token : self._n_token + len(tokens)])
            self._n_token += len(tokens)

    def all(self) -> Tensor:
        """(batch, token, head, head_channel, ...)."""
        return torch.stack(self._tokens, dim=1) if self._whole is None else self._whole


def _energy(h: Tensor) -> Tensor:
    """The sum of |h|^2 over the states."""
    return (h * h.conj()).real.sum(-1) if h.is_complex() else (h * h).sum(-1)


def _blocked(h: Tensor, block: Block) -> Step:
    """One block with any A; exponent and scale hold one token where delta is constant."""
    x, B, C = block.x, *(block.per_head(tensor)[:, :, :, None] for tensor in (block.B, block.C))
    A_bar = torch.exp(block.exponent)[:, :, :, None].expand(-1, x.shape[1], -1, -1, -1)
    write = block.scale[:, :, :, None] * x[..., None] * B
    states = []
    for decay, wrote in zip(A_bar.unbind(1), write.unbind(1), strict=True):
        h = torch.addcmul(wrote, decay, h)
        states.append(h)
    return read_out((torch.stack(states, dim=1) * C).sum(-1)), h, lambda chosen: select(states, chosen)


def _chunked(h: Tensor, block: Block) -> Step:
    """One chunk with real A (head,): heads as (g group, r head of the group), tokens l (to) and s (from)."""
    x, B, C = block.x, block.B, block.C
    n_group, exponent = B.shape[2], block.exponent.expand(-1, x.shape[1], -1, -1)
    exponent, write = exponent[..., 0].unflatten(2, (n_group, -1)), (block.scale * x).unflatten(2, (n_group, -1))
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

    return y.flatten(2, 3), states([x.shape[1] - 1])[:, 0], lambda chosen: list(states(chosen).unbind(1))


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

    def A_bar() -> Tensor:
        given = None if a.log_decay is None else a.widened(a.emit.heads_of(a.emit.tokens_of(a.log_decay), 2))
        exponent = decay_exponent(chosen, A, given, None if a.starts is None else a.emit.tokens_of(a.starts))
        A_bar = torch.exp(exponent) if given is exponent else exponent.exp_()
        return A_bar[..., 0] if a.scalar_A else A_bar

    makers = {
        "delta": lambda: chosen.clone(),
        "A_bar": A_bar,
        "B_bar": lambda: write_scale(chosen, A, a.discretization) * a.widened(a.emit.tokens_of(a.B))[:, :, _groups(a)],
        "B": lambda: a.emit.tokens_of(a.B).clone(),
        "C": lambda: a.emit.tokens_of(a.C).clone(),
        "delta_cumsum": lambda: a.emit.tokens_of(a.emit.heads_of(delta, 2).cumsum(1, dtype=torch.float64)),
    }
    return {name: a.emit.rounded(name, make()) for name, make in makers.items() if name in a.emit.variables}


def _masses(a: Arguments, delta: Tensor) -> dict[str, Tensor]:
    """mass and mass_distance where asked for, of the chosen heads and up to the last chosen token: a pass of its own.

    Blocks of plain torch, also where the states come from matrix products or from a compiled loop.
    """
    found = {name: [] for name in ("mass", "mass_distance") if name in a.emit.variables}
    n_token = a.emit.tokens[-1] + 1 if a.emit.tokens else a.n_token
    m, d = a.x.new_zeros((2, a.x.shape[0], len(_groups(a)), a.B.shape[3]), dtype=a.dtype)
    length = _mass_length(a)
    for start in range(0, n_token if found else 0, length):
        span = slice(start, min(start + length, n_token))
        decay, write, C = _of_mass(a, delta if a.constant_delta else delta[:, span], span)
        near, far = [], []
        for kept, wrote in zip(decay.unbind(1), write.unbind(1), strict=True):
            if "mass_distance" in found:
                far.append(d := kept * (d + m))
            near.append(m := torch.addcmul(wrote, kept, m))
        chosen = a.emit.positions(span.start, span.stop)
        if not select(near, chosen):
            continue
        mass, *further = ((C[:, chosen] * torch.stack(select(of, chosen), 1)).sum(-1) for of in (near, far) if of)
        for name, parts in found.items():
            parts.append(mass if name == "mass" else further[0] / mass)
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def _of_mass(a: Arguments, delta: Tensor, span: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen heads in `span`: |A_bar| and |B_bar| (batch, token, head, state), and |C| with head or 1."""
    A, delta = a.emit.heads_of(a.A, 0), a.emit.heads_of(delta, 2)
    log_decay = None if a.log_decay is None else a.widened(a.emit.heads_of(a.log_decay[:, span], 2))
    exponent = decay_exponent(delta, A, log_decay, None if a.starts is None else a.starts[:, span])
    B, C = (a.widened(tensor[:, span]) for tensor in (a.B, a.C))
    B, C = (tensor if tensor.shape[2] == 1 else tensor[:, :, _groups(a)] for tensor in (B, C))
    decay = torch.exp(exponent.real if exponent.is_complex() else exponent)
    write = write_scale(delta, A, a.discretization).abs() * B.abs()
    return decay.expand(-1, write.shape[1], -1, -1), write, read_size(C)


def _groups(a: Arguments) -> list[int]:
    """The group of each chosen head."""
    return [head // a.heads_per_group for head in a.emit.channels or range(a.A.shape[0])]


def _mass_length(a: Arguments) -> int:
    """Tokens whose |A_bar|, |B_bar|, m, d and their products with C (zoh: and phi1's four) fit BLOCK_BYTES."""
    n_tensor = 6 if a.discretization == "euler" else 10
    return max(1, BLOCK_BYTES // (n_tensor * a.x.shape[0] * a.x.shape[2] * a.B.shape[3] * a.dtype.itemsize))


def _block_length(a: Arguments) -> int:
    """Tokens whose A_bar, write, states and y's products (zoh: and phi1's four), all state-sized, fit BLOCK_BYTES."""
    n_tensor = 4 if a.discretization == "euler" else 8
    return max(1, BLOCK_BYTES // (n_tensor * a.initial_state.numel() * a.initial_state.itemsize))


def _chunk_length(a: Arguments) -> int:
    """Tokens whose segment sums, decays and scores (batch, head, token, LONGEST_CHUNK) fit BLOCK_BYTES."""
    bytes_a_token = 3 * LONGEST_CHUNK * a.x.shape[0] * a.x.shape[2] * a.dtype.itemsize
    return min(LONGEST_CHUNK, max(1, BLOCK_BYTES // bytes_a_token))
