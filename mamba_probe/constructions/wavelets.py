"""A Mamba-1 block that returns the coarse Haar coefficients of its input."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_probe.constructions.block import INVERSE_SOFTPLUS_ONE, SILU_ONE, Block, check_dtype, pour
from mamba_probe.constructions.construction import Construction

__all__ = ["haar"]

LOG_DECAY = -80.0  # A_log: no decay that a float64 can see

CLAIM = """Window k = [k L, (k+1) L) has two channels, x = silu(u) and x = silu(-u), with delta = 1 inside the window
and 0 outside, no decay, B = C = 1: their states hold the sum of u over the window, and out_proj turns the 2^levels sums
into Haar coefficients (cA_n, cD_n, cD_{n-1}, ...) of the whole sequence at its last token."""


def haar(
    length: int = 256,
    levels: int = 3,
    beta: float = 64.0,
    variant: str = "flat-x",
    dtype: torch.dtype = torch.float32,
) -> Construction:
    r"""Build the block whose last token returns the `2**levels` coarsest Haar coefficients of a sequence u.

    The features are (u_t, t/T, 1). With windows of L = T / 2^levels tokens and c = log(e - 1),

    .. math:: \Delta^{[a,b)}_t = \mathrm{softplus}\bigl(c - \mathrm{SiLU}(\beta(a - \tfrac12 - t))
        - \mathrm{SiLU}(\beta(t - b + \tfrac12))\bigr)

    is 1 in the window and at most exp(c - beta/2) outside. Source: ours (our construction of the claim of
    arXiv 2506.11891 that Mamba represents discontinuous functions through wavelets).

    Arguments:
        length: tokens T of a sequence, a power of two.
        levels: decomposition levels J, with `2**levels <= length`.
        beta: steepness of the windows' edges; the error is of order exp(-beta / 2).
        variant: "flat-x": flat windows, u through x.
        dtype: of the weights, float32 or float64.

    Returns:
        A construction around a bare `MambaMixer`. `inputs(u)` takes u (batch, token) to hidden states
        (batch, token, model); `expected(u)` is the coefficients (batch, model), zero beyond `2**levels`.
        `read_out @ kernels`, with kernels (channel, token) = C exp(A sum delta) delta B at the last token, is the Haar
        basis.

    Raises:
        ValueError: if the sizes do not fit each other, or the variant or dtype is another one.

    Example:
        >>> import numpy as np, torch
        >>> construction = haar(length=16, levels=2)
        >>> construction
        Construction(haar: MambaMixer, model=4, channel=16, state=1, rank=4, float32)
        >>> u = np.r_[np.ones(8), -np.ones(8)][None]
        >>> construction.expected(u).round(6) + 0.0
        array([[0., 4., 0., 0.]])
        >>> with torch.no_grad():
        ...     output = construction.model(construction.inputs(u))[:, -1]
        >>> bool(np.allclose(output, construction.expected(u), atol=1e-5))
        True
    """
    _check(length, levels, beta, variant)
    check_dtype(dtype)
    windows = 2**levels
    model = max(3, windows)
    block, channels = _block(length, windows, beta, model)
    config = block.config(dtype, architectures=["MambaMixer"])
    odd = block.in_proj_x[:, 0] / 2  # silu(u) = u/2 + even part, silu(-u) = -u/2 + the same even part
    read_out = block.out_proj[:windows] * SILU_ONE * odd
    return Construction(
        name="haar",
        model=pour(config, block.state_dict(dtype)),
        inputs=partial(_inputs, length=length, model=model, dtype=dtype),
        expected=partial(_expected, length=length, windows=windows, model=model),
        read_out=read_out,
        bound=_bound(length, windows, beta),
        channels=channels,
        claim=CLAIM,
    )


def _block(length: int, windows: int, beta: float, model: int) -> tuple[Block, list[str]]:
    """Return the weights, and what each channel is for: ramps, windows of u, windows of -u, the constant, padding."""
    block, knots = Block.zeros(model, 4 * model, state=1, rank=windows), windows - 1
    down, up = np.arange(knots), knots + np.arange(knots)
    plus, minus, one = 2 * knots + np.arange(windows), 2 * knots + windows + np.arange(windows), 2 * knots + 2 * windows
    knot = np.arange(1, windows) * (length // windows)
    block.conv[: one + 1, 0] = 1
    block.in_proj_x[down, 1], block.conv_bias[down] = -beta * length, beta * (knot - 0.5)
    block.in_proj_x[up, 1], block.conv_bias[up] = beta * length, beta * (0.5 - knot)
    block.in_proj_x[plus, 0], block.in_proj_x[minus, 0] = 1, -1
    block.conv_bias[one] = 1
    block.in_proj_z[np.r_[plus, minus], 2] = 1
    block.x_proj_dt[np.arange(1, windows), down] = 1  # window k opens at knot k ...
    block.x_proj_dt[np.arange(knots), up] = 1  # ... and closes at knot k + 1
    block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    block.dt_proj[plus, np.arange(windows)] = block.dt_proj[minus, np.arange(windows)] = -1
    block.dt_bias[:] = INVERSE_SOFTPLUS_ONE
    block.A_log[:] = LOG_DECAY
    rows = _haar_of_windows(length, windows) / SILU_ONE
    block.out_proj[:windows, plus], block.out_proj[:windows, minus] = rows, -rows
    return block, _labels(knot, length, windows, 4 * model)


def _labels(knot: np.ndarray, length: int, windows: int, channel: int) -> list[str]:
    edges = [0, *knot.tolist(), length]
    spans = [f"[{a}, {b})" for a, b in pairwise(edges)]
    labels = [f"ramp down {a}" for a in knot] + [f"ramp up {a}" for a in knot]
    labels += [f"window of u {span}" for span in spans] + [f"window of -u {span}" for span in spans] + ["one"]
    return labels + ["padding"] * (channel - len(labels))


def _haar_of_windows(length: int, windows: int) -> Float[np.ndarray, "kernel window"]:
    """Return the Haar functions of a sequence, one column a window: each is constant on every window."""
    rows = [np.full(windows, length**-0.5)]
    width = windows
    while width > 1:
        wavelet = np.repeat([1.0, -1.0], width // 2) * (width * length / windows) ** -0.5
        rows += list(np.kron(np.eye(windows // width), wavelet))
        width //= 2
    return np.stack(rows)


def _bound(length: int, windows: int, beta: float) -> float:
    """Return the error of a coefficient for |u| <= 1: a window's leak (inside, outside, decay) times the widest row."""
    ratio = math.exp(-beta)
    leak = math.exp(-1) if beta < 2 else beta / 2 * math.exp(-beta / 2)  # |silu - relu| at half a token
    slope = 1 / (1 + math.exp(-INVERSE_SOFTPLUS_ONE - 2 * leak))
    inside = slope * beta * (1 + ratio) / (1 - ratio) ** 2
    outside = 2 * math.expm1(1.0) * math.exp(2 * leak) / (1 - ratio)
    decay = math.exp(LOG_DECAY) * (length / windows) ** 2 / 2
    return windows / math.sqrt(length) * (math.exp(-beta / 2) * (inside + outside) + decay)


def _check(length: int, levels: int, beta: float, variant: str) -> None:
    if variant != "flat-x":
        raise ValueError(
            f'haar: variant={variant!r} is not supported; use variant="flat-x" (flat windows, u through x)'
        )
    needs = {
        f"length a power of two (got {length})": length > 0 and length & (length - 1) == 0,
        f"levels >= 1 (got {levels})": levels >= 1,
        f"2**levels <= length (got 2**{levels} > {length})": levels < 1 or 2**levels <= length,
        f"beta > 0 and finite (got {beta})": 0 < beta < math.inf,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"haar: needs {'; '.join(failed)}")


def _signal(u: ArrayLike, length: int) -> Float[np.ndarray, "batch token"]:
    array = np.asarray(u, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != length:
        raise ValueError(f"haar: u must be (batch, token) with {length} tokens, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("haar: u holds values that are not finite")
    return array


def _inputs(u: ArrayLike, *, length: int, model: int, dtype: torch.dtype) -> Tensor:
    """Return the hidden states (batch, token, model): u_t, t/T, 1 and zeros."""
    signal = _signal(u, length)
    hidden = np.zeros((*signal.shape, model))
    hidden[..., 0], hidden[..., 1], hidden[..., 2] = signal, np.arange(length) / length, 1
    return torch.tensor(hidden, dtype=dtype)


def _expected(u: ArrayLike, *, length: int, windows: int, model: int) -> Float[np.ndarray, "batch model"]:
    """Return the coefficients in pywt's order, coarsest first."""
    import pywt

    signal = _signal(u, length)
    coefficients = np.concatenate(pywt.wavedec(signal, "haar", level=length.bit_length() - 1), axis=1)
    return np.pad(coefficients[:, :windows], [(0, 0), (0, model - windows)])
