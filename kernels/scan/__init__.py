"""The selective scan of Mamba-1 and Mamba-2: one contract, several backends. `kernels/README.md` specifies it."""

from contextlib import nullcontext
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from mamba_probe.kernels.emission import EMITTABLE, Emission, Emit
from mamba_probe.kernels.scan import operators
from mamba_probe.kernels.scan.arguments import as_flag, formed
from mamba_probe.kernels.scan.compiled import cpu_compile

__all__ = [
    "BACKENDS",
    "EMITTABLE",
    "Emission",
    "Emit",
    "ScanResult",
    "check_backend",
    "choose_backend",
    "cpu_compile",
    "selective_scan",
]

BACKENDS = ("naive", "cpu", "triton")
_MODULES = {"naive": "naive", "cpu": "cpu", "triton": "gpu"}


class ScanResult(NamedTuple):
    """y (batch, token, head, head_channel), gated when z was given; last_state; what was emitted."""

    y: Float[Tensor, "batch token head head_channel"]
    last_state: Inexact[Tensor, "batch head head_channel state"]
    emission: Emission


class Choice(NamedTuple):
    """A backend and why it is the one."""

    name: str
    reason: str


def choose_backend(device: torch.device | str) -> Choice:
    """What `backend="auto"` runs for tensors on `device`, and why. Never naive.

    >>> choose_backend("cpu").name
    'cpu'
    """
    device = torch.device(device)
    if device.type == "cuda":
        return Choice("triton", "the tensors are on a CUDA device")
    return Choice("cpu", f"the tensors are on {device}, and Triton's kernels need a CUDA device")


def selective_scan(
    x: Float[Tensor, "batch token head head_channel"],
    delta: Float[Tensor, "batch token head"],
    A: Inexact[Tensor, " head *state"],
    B: Inexact[Tensor, "*batch_token group state"],
    C: Inexact[Tensor, "*batch_token group state"],
    D: Float[Tensor, " head *head_channel"] | None = None,
    z: Float[Tensor, "batch token head head_channel"] | None = None,
    *,
    delta_bias: Float[Tensor, " head"] | None = None,
    delta_softplus: bool = False,
    delta_limits: tuple[float, float] = (0.0, inf),
    initial_state: Inexact[Tensor, "batch head head_channel state"] | None = None,
    seq_idx: Int[Tensor, "batch token"] | None = None,
    log_decay: Inexact[Tensor, "batch token head *state"] | None = None,
    discretization: str = "euler",
    emit: Emit | None = None,
    backend: str = "auto",
) -> ScanResult:
    """Run the recurrence over all tokens and emit what was asked for.

    delta = clamp(softplus(delta + bias)), h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t h_t + D x_t,
    times silu(z_t) when z is given. With "zoh" the write is delta_t phi1(delta_t A) B_t x_t, phi1(z) = (exp(z) - 1)/z.
    A complex state stands for its conjugate pair: y_t = 2 Re(C_t h_t) + D x_t.
    Under torch.compile it is one operator, `mamba_probe::scan` (see `operators`), for any number of tokens.
    Source: arXiv 2312.00752 and 2405.21060, in the Euler form their code executes; complex A and zoh: 2206.11893.

    Args:
        x: input. Mamba-1: head is the channel, head_channel is 1.
        delta: raw step size, before bias, softplus and limits.
        A: continuous-time state matrix, (head, state) or (head,); complex only with complex B, C and initial_state.
        B, C: input and output matrices, (group, state) when constant; head i uses group i // (head / group).
        D: skip, (head,) or (head, head_channel).
        z: gate before its SiLU.
        delta_bias: added to delta first.
        delta_softplus: whether softplus (identity above 20) follows.
        delta_limits: clamp that comes last.
        initial_state: state before the first token, zero when None.
        seq_idx: sequences packed into one row, int32 or int64: the state is forgotten where it changes from one token
            to the next. The first token changes from nothing: it keeps initial_state.
        log_decay: what replaces delta A in the decay, not in the write: (batch, token, head, state) where A is
            (head, state), (batch, token, head) where A is (head,); complex where A is.
        discretization: of the write: "euler" or "zoh".
        emit: what to emit, nothing when None.
        backend: "auto" (see `choose_backend`), "naive", "cpu" or "triton". "cpu" runs blocks of plain torch, and
            for A (head, state) a compiled loop from 10^10 state updates a call on, or as `cpu_compile` says.

    Returns:
        y in x's dtype, last_state and emission in float32 or complex64 (float64 or complex128 when all inputs are),
        see `Emission`.

    Raises:
        ValueError: naming the argument, what was expected and what came; for "triton" without a CUDA device or with
            complex A, which it does not support yet. While a model is compiled, torch wraps it.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> result = selective_scan(one, one[..., 0], torch.zeros(1, 1), one, one, emit=Emit(("h",), tokens=[1]))
    >>> result.y.flatten().tolist(), result.emission.h.flatten().tolist()
    ([1.0, 2.0, 3.0], [2.0])
    """
    tensors = (x, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, log_decay)
    options = (as_flag(delta_softplus), delta_limits, discretization, emit)
    if torch.compiler.is_compiling():
        name = choose_backend(x.device).name if backend == "auto" else backend
        return ScanResult(*operators.scan(tensors, *options, name))
    given = [tensor for tensor in tensors if tensor is not None]
    absent = D is None, z is None, delta_bias is None, initial_state is None, seq_idx is None, log_decay is None
    key = len(given), absent, options, backend
    answer = operators.again(key, given)
    return ScanResult(*(_anew(key, tensors, options, backend) if answer is None else answer))


def _anew(
    key: Any, tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str
) -> tuple[Tensor, Tensor, Emission]:
    """A call that is like none before, or that no backend remembers."""
    a, plans = formed(tensors, *options)
    kind = a.x.device.type
    name = choose_backend(a.x.device).name if backend == "auto" else backend
    module = backend_module(name)
    if name == "triton" and operators.needs_grad(tensors):
        answer = operators.direct(module, tensors, options, a, plans)
    else:
        more = {"plans": plans} if name == "triton" else {}
        # entering the context costs as much as a launch
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            answer = module.scan(a, **more)
    if name == "triton":
        operators.remember(key, tensors, options, a, plans)
    return answer


def check_backend(name: str, device: torch.device | str) -> None:
    """Check that backend `name` can run tensors on `device`, before there are any.

    Raises:
        ValueError: an unknown backend, or triton where it cannot run.

    >>> check_backend("cpu", "cpu")
    """
    module = backend_module(name)
    if name == "triton":
        module.check_device(torch.device(device))


def backend_module(name: str) -> Any:
    """The module of a backend: its `scan`, and what that needs."""
    if name not in BACKENDS:
        near = get_close_matches(str(name), (*BACKENDS, "auto"), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown `backend` {name!r}{hint} Known: auto, {', '.join(BACKENDS)}")
    if name == "triton" and find_spec("triton") is None:
        raise ValueError('backend "triton" needs the triton package, which is not installed: use backend="cpu"')
    return _imported(name)


@cache
def _imported(name: str) -> Any:
    return import_module(f"mamba_probe.kernels.scan.{_MODULES[name]}")
