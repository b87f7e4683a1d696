"""The selective scan, one token after another: the definition that every other backend is held to.

Symbols of one token t, for head i of group g(i) = i // (head / group), channel p and state n:

    delta_t (head)              clamp(softplus(delta + bias), limits)
    A_bar_t (head, state)       exp(delta_t A), or exp(log_decay_t) where given; 0 where a new sequence starts
    B_bar_t (head, state)       delta_t B_t                      "euler", as Mamba's own kernels execute it
                                delta_t phi1(delta_t A) B_t      "zoh", phi1(z) = (exp(z) - 1) / z, exact for constant x
    h_t     (head, p, state)    A_bar_t h_{t-1} + B_bar_t x_t
    y_t     (head, p)           sum_n C_t h_t + D x_t            complex h: sum_n 2 Re(C_t h_t) + D x_t
    out_t   (head, p)           y_t silu(z_t), or y_t without z
    m_t     (head, state)       |A_bar_t| m_{t-1} + |B_bar_t|         what unit writes of all tokens so far have left
    d_t     (head, state)       |A_bar_t| (d_{t-1} + m_{t-1})         the same, each times its distance in tokens
    mass_t  (head)              sum_n |C_t| m_t                       complex: of the pair, 2 |C_t|
    mass_distance_t (head)      sum_n |C_t| d_t / sum_n |C_t| m_t     ours, as m and d

Source: Gu & Dao 2023, "Mamba", arXiv 2312.00752 (recurrence); Dao & Gu 2024, arXiv 2405.21060 (A a scalar a head);
Gu et al. 2022, "On the parameterization and initialization of diagonal state space models", arXiv 2206.11893 (S4D:
complex A, constant B and C, zoh).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emission
from mamba_probe.kernels.scan.arguments import Arguments

__all__ = ["decay_exponent", "read_out", "read_size", "scan", "step_size", "write_scale"]


def scan(a: Arguments) -> tuple[Tensor, Tensor, Emission]:
    """Outputs (batch, token, head, head_channel) in x's dtype, last state, emission."""
    tokens = set(range(a.n_token) if a.emit.tokens is None else a.emit.tokens)
    h, (m, d) = a.initial_state, a.x.new_zeros((2, *a.state_shape[:2], a.state_shape[3]), dtype=a.dtype)
    delta_cumsum = 0.0
    outputs, kept = [], []
    for t in range(a.n_token):
        x, B, C = (_at(tensor, t, a) for tensor in (a.x, a.B, a.C))
        B, C = (tensor.repeat_interleave(a.heads_per_group, 1) for tensor in (B, C))
        delta = step_size(_at(a.delta, t, a), a)
        log_decay = None if a.log_decay is None else _at(a.log_decay, t, a)
        A_bar = torch.exp(decay_exponent(delta, a.A, log_decay, None if a.starts is None else a.starts[:, t]))
        B_bar = write_scale(delta, a.A, a.discretization) * B
        h = A_bar[:, :, None] * h + B_bar[:, :, None] * x[..., None]
        m, d = A_bar.abs() * m + B_bar.abs(), A_bar.abs() * (d + m)
        y = read_out((C[:, :, None] * h).sum(-1))
        y = y if a.D is None else y + a.D * x
        outputs.append((y if a.z is None else y * F.silu(_at(a.z, t, a))).to(a.x.dtype))
        delta_cumsum = delta_cumsum + delta.double()
        if t in tokens:
            A_bar = A_bar[..., 0] if a.scalar_A else A_bar
            step = {"delta": delta, "A_bar": A_bar, "B_bar": B_bar, "h": h, "y": y, "delta_cumsum": delta_cumsum}
            mass, far = ((read_size(C) * each).sum(-1) for each in (m, d))
            step |= {"energy": (h.abs() ** 2).sum(-1), "mass": mass, "mass_distance": far / mass}
            chosen = [name for name in a.emit.variables if name in step]
            kept.append({name: a.emit.rounded(name, a.emit.heads_of(step[name], 1)) for name in chosen})
    emission = {name: torch.stack([step[name] for step in kept], dim=1) for name in kept[0]}
    inputs = {name: a.emit.tokens_of(vars(a)[name]).clone() for name in "BC" if name in a.emit.variables}
    return torch.stack(outputs, dim=1), h, Emission(**emission, **inputs)


def step_size(delta: Tensor, a: Arguments) -> Tensor:
    """Raw delta (..., head) of the compute dtype -> step size: + bias, softplus (identity above 20), clamp."""
    delta = delta if a.delta_bias is None else delta + a.delta_bias
    delta = F.softplus(delta, beta=1.0, threshold=20.0) if a.delta_softplus else delta
    return torch.clamp(delta, *a.delta_limits)


def decay_exponent(delta: Tensor, A: Tensor, log_decay: Tensor | None, starts: Tensor | None) -> Tensor:
    """log A_bar (..., head, state or 1): delta A or what replaces it, and -inf where a new sequence starts."""
    exponent = delta[..., None] * A if log_decay is None else log_decay
    return exponent if starts is None else exponent.masked_fill(starts, -torch.inf)


def write_scale(delta: Tensor, A: Tensor, discretization: str) -> Tensor:
    """B_bar / B (..., head, state or 1): delta ("euler") or delta phi1(delta A) ("zoh"), real or complex.

    Near delta A = 0 phi1 is its series, sum of z^k / (k + 1)!, so that the derivative (1/2 at 0) keeps its digits too;
    elsewhere it is all (exp(delta A) - 1) / A, which is -1 / A also where delta A is past the type's range.

    >>> step, A = torch.ones(1, dtype=torch.float64), torch.tensor([[0.0, 1e-6, -2.0]], dtype=torch.float64)
    >>> write_scale(step, A, "zoh").tolist()
    [[1.0, 1.0000005000001666, 0.43233235838169365]]
    """
    delta = delta[..., None]
    if discretization == "euler":
        return delta
    z = delta * A
    near = z.abs() < 0.5
    small, series = z.masked_fill(~near, 0.0), torch.ones_like(z)
    for k in range(16, 1, -1):
        series = 1 + small / k * series
    large, rate = z.masked_fill(near, 1.0), A.expand_as(z).masked_fill(near, 1.0)
    return torch.where(near, delta * series, (torch.exp(large) - 1) / rate)


def read_out(sums: Tensor) -> Tensor:
    """Sums of C h over the states -> real outputs: a complex state stands for itself and its conjugate."""
    return 2 * sums.real if sums.is_complex() else sums


def read_size(C: Tensor) -> Tensor:
    """|C|, and twice that for a complex C: of a state and its conjugate."""
    return 2 * C.abs() if C.is_complex() else C.abs()


def _at(tensor: Tensor, t: int, a: Arguments) -> Tensor:
    """Token t in the compute dtype; contiguous, so that the bits do not depend on the strides of the whole."""
    return a.widened(tensor[:, t]).contiguous()
