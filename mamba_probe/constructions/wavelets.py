"""A Mamba-1 or Mamba-2 block that returns the coarse Haar coefficients of its input."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from textwrap import fill

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.haar_decay import decay
from mamba_probe.constructions.haar_flat import flat_b, flat_x
from mamba_probe.constructions.haar_layout import Layout, Plan, haar_rows
from mamba_probe.constructions.haar_ramps import delta, ramps, ramps_mamba2
from mamba_probe.constructions.tables import MambaTable, check_dtype, mixer_of, own_mixer_of

__all__ = ["haar", "window_sums"]

VARIANTS: dict[str, Callable[[Layout, float], Plan]] = {
    "flat-x": flat_x,
    "flat-B": flat_b,
    "ramps": ramps,
    "delta": delta,
    "decay": decay,
}
VARIANTS_MAMBA2 = {"ramps": ramps_mamba2}
MIXERS = {"mamba1": VARIANTS, "mamba2": VARIANTS_MAMBA2}
REFUSED = ("D", "flat-decay")  # erase by a large delta up to the window, hold by a small one in it


def haar(
    length: int = 256,
    levels: int = 3,
    beta: float = 64.0,
    variant: str = "flat-x",
    dtype: torch.dtype = torch.float32,
    mixer: str = "mamba1",
) -> Construction:
    r"""Build the block whose last token returns the `2**levels` coarsest Haar coefficients of a sequence u.

    The features are (u_t, t/T, 1). With windows of L = T / 2^levels tokens and c = log(e - 1), the default's

    .. math:: \Delta^{[a,b)}_t = \mathrm{softplus}\bigl(c - \mathrm{SiLU}(\beta(a - \tfrac12 - t))
        - \mathrm{SiLU}(\beta(t - b + \tfrac12))\bigr)

    is 1 in the window and at most exp(c - beta/2) outside. Source: ours (our construction of the claim of
    arXiv 2506.11891 that Mamba represents discontinuous functions through wavelets).

    ========== ===================================== ============================ ================ =================
    variant    delta                                 u enters through             channels         error
    ========== ===================================== ============================ ================ =================
    "flat-x"   1 in a window, 0 outside              x: kernels are Haar          4 2^levels - 1   exp(-beta / 2)
    "flat-B"   the same                              B: kernels are u in a window 3 2^levels       exp(-beta / 2)
    "ramps"    softplus(beta (t - a + 3/4 and 1/4))  B                            2 2^levels + 2   exp(-beta / 4)
    "delta"    softplus(beta (t - a + 1/2 + u / 16)) delta, for abs(u) < 8        2^levels + 3     exp(-7 beta / 16)
    "decay"    softplus(beta (n + 1/2 - t)), A = -1  B; levels = log2 T           T + 4            exp(-beta / 2)
    ========== ===================================== ============================ ================ =================

    "ramps" and "delta" lose about T^2 of relative precision: "delta" is for float64 only. Mamba-2 has "ramps" alone, in
    2 2^levels - 1 heads of two channels, u through x; its gated norm would divide the coefficients by their own size,
    so the block is `mamba_probe.blocks.Mamba2Block` without it.

    Arguments:
        length: tokens T of a sequence, a power of two.
        levels: decomposition levels J, with `2**levels <= length`; equal for "decay".
        beta: steepness of the windows' edges.
        variant: a row of the table.
        dtype: of the weights, float32 or float64.
        mixer: "mamba1", or "mamba2" for "ramps".

    Returns:
        A construction around a bare `MambaMixer`, or our own `Mamba2Block`. `inputs(u)` takes u (batch, token) to
        hidden states (batch, token, model); `expected(u)` is the coefficients (batch, model), zero beyond `2**levels`.
        For "flat-x" `read_out @ kernels`, with kernels (channel, token) = C exp(A sum delta) delta B at the last token,
        is the Haar basis, and so for Mamba-2's kernels (head, token); for the others, whose kernels are not kernels of
        u, `read_out` is None. Its `signatures`: of the kernels d out / d u, `kernel_cosine` with the Haar functions,
        `discontinuity_index`, their largest step over their range, the constant one left out, and `capture_residual`,
        the share of the Haar functions' energy outside their span; with a `read_out`, `layer_best_cosine` and
        `layer_scaling_cosine` of `wavelet_alignment`, means over all kernels, the constant one among them.

    Raises:
        ValueError: if the sizes do not fit each other, or the variant, mixer or dtype is another one.

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
        >>> haar(length=16, levels=2, variant="flat-B")
        Construction(haar flat-B: MambaMixer, model=4, channel=12, state=1, rank=4, float32)
        >>> haar(length=16, levels=2, variant="ramps", mixer="mamba2")
        Construction(haar ramps: Mamba2Block, model=4, channel=14, state=1, head=7, float32)
    """
    _check_variant("haar", variant, mixer)
    needs = {
        f"length a power of two (got {length})": length > 0 and length & (length - 1) == 0,
        f"levels >= 1 (got {levels})": levels >= 1,
        f"2**levels <= length (got 2**{levels} > {length})": levels < 1 or 2**levels <= length,
        f'2**levels >= length for variant="decay", which holds every token (got 2**{levels} < {length})': (
            variant != "decay" or levels < 1 or 2**levels >= length
        ),
        f"beta > 0 and finite (got {beta})": 0 < beta < math.inf,
    }
    _check("haar", needs, dtype)
    name = "haar" if variant == "flat-x" else f"haar {variant}"
    layout = Layout(length, haar_rows(length, 2**levels))
    outputs = "Haar coefficients (cA_n, cD_n, cD_{n-1}, ...) of the whole sequence"
    construction = _construction(name, layout, MIXERS[mixer][variant](layout, beta), dtype, outputs, _coefficients)
    if construction.read_out is not None:
        constant = 1 / layout.kernels  # share of the one kernel without a wavelet
        construction.signatures.update(layer_best_cosine=1 - constant, layer_scaling_cosine=constant)
    return construction


def window_sums(
    length: int = 1000,
    windows: int = 8,
    beta: float = 64.0,
    variant: str = "flat-x",
    dtype: torch.dtype = torch.float32,
    mixer: str = "mamba1",
) -> Construction:
    r"""Build the block of `haar` that returns the sums of u over equal windows, for any length they divide.

    .. math:: \mathrm{out}_k = \sum_{t = kL}^{(k+1)L - 1} u_t, \qquad L = T / \mathrm{windows}

    Source: ours.

    Arguments:
        length: tokens T of a sequence.
        windows: number of windows, a divisor of `length`; equal for "decay".
        beta: steepness of the windows' edges.
        variant: as in `haar`.
        dtype: of the weights, float32 or float64.
        mixer: as in `haar`.

    Raises:
        ValueError: if the sizes do not fit each other, or the variant, mixer or dtype is another one.

    Example:
        >>> import numpy as np, torch
        >>> construction = window_sums(length=12, windows=3)
        >>> u = np.arange(12.0)[None]
        >>> construction.expected(u).tolist()
        [[6.0, 22.0, 38.0]]
        >>> with torch.no_grad():
        ...     construction.model(construction.inputs(u))[:, -1].round(decimals=3).tolist()
        [[6.0, 22.0, 38.0]]
    """
    _check_variant("window_sums", variant, mixer)
    needs = {
        f"2 <= windows <= length (got windows = {windows}, length = {length})": 2 <= windows <= length,
        f"length % windows == 0 (got {length} and {windows})": windows < 1 or length % windows == 0,
        f'windows >= length for variant="decay", which holds every token (got {windows} < {length})': (
            variant != "decay" or windows >= length
        ),
        f"beta > 0 and finite (got {beta})": 0 < beta < math.inf,
    }
    _check("window_sums", needs, dtype)
    name = "window_sums" if variant == "flat-x" else f"window_sums {variant}"
    layout = Layout(length, np.eye(windows))
    plan = MIXERS[mixer][variant](layout, beta)
    return _construction(name, layout, plan, dtype, "the outputs, a sum each,", _sums)


def _construction(
    name: str,
    layout: Layout,
    plan: Plan,
    dtype: torch.dtype,
    outputs: str,
    truth: Callable[[np.ndarray, int], np.ndarray],
) -> Construction:
    block = plan.block
    padding = block.out_proj.shape[1] - len(plan.channels)
    return Construction(
        name=name,
        model=mixer_of(block, dtype) if isinstance(block, MambaTable) else own_mixer_of(block, dtype, gated_norm=False),
        inputs=partial(_inputs, layout=layout, limit=plan.limit, dtype=dtype),
        expected=partial(_expected, layout=layout, limit=plan.limit, truth=truth),
        read_out=plan.read_out,
        bound=plan.bound,
        channels=plan.channels + ["padding"] * padding,
        claim=fill(plan.claim.format(windows=layout.windows, outputs=outputs), 118),
        states=[plan.state],
        signatures={"kernel_cosine": 1.0, "discontinuity_index": 1.0, "capture_residual": 0.0},
    )


def _check_variant(name: str, variant: str, mixer: str) -> None:
    if mixer not in MIXERS:
        raise ValueError(f"{name}: mixer={mixer!r} is not supported, expected one of {list(MIXERS)}")
    if variant in REFUSED:
        raise ValueError(
            f"{name}: variant={variant!r}, decay used as a flat window, is not offered: B_bar = delta B writes the "
            "last erasing token with weight delta_erase / delta_hold, a leak of 1e4 to 1e6 beside an error of 1e-3 or "
            'more in the window; use variant="flat-B" for flat windows, variant="decay" for windows of one token'
        )
    if variant not in VARIANTS:
        close = get_close_matches(str(variant), VARIANTS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}: variant={variant!r} is not supported, expected one of {list(VARIANTS)}{hint}")
    if variant not in MIXERS[mixer]:
        flat = ": its delta needs silu features, which dt of Mamba-2 does not see" * variant.startswith("flat")
        raise ValueError(
            f"{name}: variant={variant!r} is not offered with mixer={mixer!r}{flat}; "
            f'use variant="ramps", or mixer="mamba1"'
        )


def _check(name: str, needs: dict[str, bool], dtype: torch.dtype) -> None:
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"{name}: needs {'; '.join(failed)}")
    check_dtype(dtype)


def _signal(u: ArrayLike, length: int, limit: float) -> Float[np.ndarray, "batch token"]:
    array = np.asarray(u, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != length:
        raise ValueError(f"u must be (batch, token) with {length} tokens, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("u holds values that are not finite")
    if array.size and not np.abs(array).max() < limit:
        raise ValueError(f"needs |u| < {limit:g}, so that eps |u| < beta / 2 (got {np.abs(array).max():g})")
    return array


def _inputs(u: ArrayLike, *, layout: Layout, limit: float, dtype: torch.dtype) -> Tensor:
    """Return the hidden states (batch, token, model): u_t, t/T, 1 and zeros."""
    signal = _signal(u, layout.length, limit)
    hidden = np.zeros((*signal.shape, layout.model))
    hidden[..., 0], hidden[..., 1], hidden[..., 2] = signal, np.arange(layout.length) / layout.length, 1
    return torch.tensor(hidden, dtype=dtype)


def _expected(
    u: ArrayLike, *, layout: Layout, limit: float, truth: Callable[[np.ndarray, int], np.ndarray]
) -> Float[np.ndarray, "batch model"]:
    outputs = truth(_signal(u, layout.length, limit), layout.windows)
    return np.pad(outputs, [(0, 0), (0, layout.model - layout.windows)])


def _coefficients(signal: np.ndarray, windows: int) -> np.ndarray:
    """Return the coefficients in pywt's order, coarsest first."""
    import pywt

    levels = signal.shape[1].bit_length() - 1
    return np.concatenate(pywt.wavedec(signal, "haar", level=levels), axis=1)[:, :windows]


def _sums(signal: np.ndarray, windows: int) -> np.ndarray:
    return signal.reshape(len(signal), windows, -1).sum(-1)
