"""A Mamba-1 or Mamba-2 block that forgets everything but one token."""

import math
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.keep_tables import TABLES
from mamba_probe.constructions.tables import check_dtype, mixer_of

__all__ = ["keep_nth", "ramp_bound"]

MIXERS = ("mamba1", "mamba2")
NORMED = """
The gated norm brings outputs to one size: only the last token's is claimed, whose size before the norm is known and
restored."""

CLAIMS = {
    "ramp": """delta_t = softplus(beta (n + 1/2 - t)) and A = -1: exp(A delta) is 0 up to token n, which erases, and 1
after it, which holds. The last token returns the one-hot code of token n.""",
    "event": """delta_t = softplus(beta (2 s_t - 1)) with the marker s_t = 1 at token n and 0 elsewhere, and A = -1:
exp(A delta) is 0 at token n and 1 elsewhere; nothing needs to be erased, as token n alone is written. The last token
returns the one-hot code of token n.""",
}


def keep_nth(
    n_tokens: int = 16,
    length: int = 256,
    n: int = 128,
    beta: float = 64.0,
    profile: str = "ramp",
    dtype: torch.dtype = torch.float32,
    mixer: str = "mamba1",
) -> Construction:
    r"""Build the block whose last token returns token `n` of the sequence, however long ago that was.

    The features are the one-hot token, t/T (the marker s_t = 1[t = n] for "event") and 1; with A = -1, B = C = 1,

    .. math:: \Delta_t = \mathrm{softplus}(\beta(n + \tfrac12 - t)), \qquad \mathrm{out} = h_{T-1} / (\beta / 2)

    with an error of about 3 exp(-beta / 2), whatever the length, or, for "event",

    .. math:: \Delta_t = \mathrm{softplus}(\beta(2 s_t - 1)), \qquad \mathrm{out} = h_{T-1} / \beta

    with an error of at most T (1 + 1 / beta) exp(-beta). Source: ours (our construction of the claim of
    arXiv 2506.11891 on memory decay).

    Mamba-2 is one head with a channel a token id. Its gated norm gives every token's output the same size; only the
    last token's is claimed, whose size before the norm is known and restored. transformers computes that norm, and
    Mamba-2's own scan, in float32 whatever the dtype.

    Arguments:
        n_tokens: number of token ids.
        length: tokens T of a sequence, for "ramp" a power of two.
        n: index of the token to keep, in `[0, length - 1]`.
        beta: steepness of the ramp; for "event" the delta of token n.
        profile: "ramp": delta falls along the sequence, exp(A delta) is 0 up to n and 1 after it; "event": exp(A delta)
            is 0 at n and 1 elsewhere.
        dtype: of the weights, float32 or float64.
        mixer: "mamba1" or "mamba2".

    Returns:
        A construction around a bare `MambaMixer` or `Mamba2Mixer`. `inputs(token_ids)` takes ids (batch, token) to
        hidden states (batch, token, model); `expected(token_ids)` is the one-hot token n (batch, model). Its
        `signatures`, each where there are tokens to take it from: the means of exp(A delta) before, at and after n;
        `gamma`, the mean after n less that up to n; `sigma_at_most`, a bound on -A times the sum of delta after n;
        `horizon_of_n_at_least`, in tokens: the end of the sequence censors it; `horizon_before_n`, of token n - 1.

    Raises:
        ValueError: if the sizes do not fit each other, or the profile, mixer or dtype is another one.

    Example:
        >>> import numpy as np, torch
        >>> construction = keep_nth(n_tokens=4, length=32, n=3)
        >>> tokens = np.array([[0, 1, 2, 3] * 8])
        >>> with torch.no_grad():
        ...     output = construction.model(construction.inputs(tokens))[:, -1]
        >>> output.round(decimals=5).tolist()
        [[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
        >>> keep_nth(n_tokens=4, length=32, n=3, mixer="mamba2")
        Construction(keep_nth: Mamba2Mixer, model=6, channel=6, state=1, head=1, float32)
    """
    _check(n_tokens, length, n, beta, profile, mixer)
    check_dtype(dtype)
    ramp = profile == "ramp"
    feature = np.arange(length) / length if ramp else np.eye(1, length, n)[0]
    error = ramp_bound(beta) if ramp else length * (1 + 1 / beta) * math.exp(-beta)
    rest = ["position" if ramp else "marker", "one"] if mixer == "mamba1" else ["padding"] * 2
    return Construction(
        name="keep_nth" if ramp else "keep_nth event",
        model=mixer_of(TABLES[mixer, profile](n_tokens, length, n, beta), dtype),
        inputs=partial(_inputs, n_tokens=n_tokens, feature=feature, dtype=dtype),
        expected=partial(_expected, n_tokens=n_tokens, length=length, n=n),
        read_out=None,
        bound=error if mixer == "mamba1" else _normed(error),
        channels=[f"token {token}" for token in range(n_tokens)] + rest,
        claim=CLAIMS[profile] + NORMED * (mixer == "mamba2"),
        states=["delta of token n, in the channel of its id"],
        signatures=_signatures(ramp, length, n, beta),
    )


def ramp_bound(beta: float) -> float:
    r"""Return the error of "ramp" for any length: tokens that outlive k erasing steps, later writes and later decay.

    .. math:: \sum_{k \ge 1} (2k + 1) e^{-\beta k^2 / 2} + \frac{(2 / \beta + 1) e^{-\beta / 2}}{1 - e^{-\beta}}

    Source: ours.

    Arguments:
        beta: steepness of the ramp, positive.

    Example:
        >>> f"{ramp_bound(64.0):.1e}"
        '5.1e-14'
    """
    older = sum((2 * k + 1) * math.exp(-beta * k * k / 2) for k in range(1, 2 + math.ceil(40 / math.sqrt(beta))))
    return older + (2 / beta + 1) * math.exp(-beta / 2) / -math.expm1(-beta)


def _normed(error: float) -> float | None:
    """Return the error after the norm, from the sum of the errors before it; None where they exceed what is kept."""
    return error / (1 - error) if error < 1 else None


def _signatures(ramp: bool, length: int, n: int, beta: float) -> dict[str, float]:
    """Return the ideal values, in the limit of a large beta; bounds and horizons hold at this beta."""
    after = length - 1 - n
    decay = {"mean_decay_before": 0.0 if ramp else 1.0} if n else {}
    decay |= {"mean_decay_at": 0.0}
    decay |= {"mean_decay_after": 1.0, "gamma": 1.0 if ramp else 1 / (n + 1)} if after else {}
    least = math.exp(-beta / 2) / -math.expm1(-beta) if ramp else after * math.exp(-beta)
    decay |= {"sigma_at_most": least if after else 0.0}
    decay |= {"horizon_of_n_at_least": float(after)} if least < 1 else {}
    erased = beta / 2 if ramp else beta  # delta of token n, at least
    return decay | ({"horizon_before_n": 1.0} if n and erased >= 1 else {})


def _check(n_tokens: int, length: int, n: int, beta: float, profile: str, mixer: str) -> None:
    if profile not in CLAIMS:
        raise ValueError(f"keep_nth: profile={profile!r} is not supported, expected one of {list(CLAIMS)}")
    if mixer not in MIXERS:
        hint = "; a time-invariant one keeps no token of its choice" if mixer == "s4d" else ""
        raise ValueError(f"keep_nth: mixer={mixer!r} is not supported, expected one of {list(MIXERS)}{hint}")
    needs = {
        f"n_tokens >= 1 (got {n_tokens})": n_tokens >= 1,
        f"length >= 1 (got {length})": length >= 1,
        f"length a power of two (got {length})": profile == "event" or length < 1 or length & (length - 1) == 0,
        f"0 <= n <= length - 1 (got n = {n}, length = {length})": 0 <= n <= length - 1,
        f"beta > 0 and finite (got {beta})": 0 < beta < math.inf,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"keep_nth: needs {'; '.join(failed)}")


def _ids(token_ids: ArrayLike, n_tokens: int, length: int) -> Int[np.ndarray, "batch token"]:
    ids = np.asarray(token_ids)
    if ids.ndim != 2 or ids.shape[1] != length or ids.dtype.kind not in "iu":
        raise ValueError(
            f"keep_nth: token_ids must be integers (batch, token) with {length} tokens, got {ids.dtype} of {ids.shape}"
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < n_tokens):
        raise ValueError(f"keep_nth: token_ids must be in [0, {n_tokens}), got [{ids.min()}, {ids.max()}]")
    return ids


def _inputs(token_ids: ArrayLike, *, n_tokens: int, feature: Float[np.ndarray, " token"], dtype: torch.dtype) -> Tensor:
    """Return the hidden states (batch, token, model): the one-hot token, t/T or the marker, and 1."""
    ids = _ids(token_ids, n_tokens, feature.size)
    hidden = np.zeros((*ids.shape, n_tokens + 2))
    hidden[..., :n_tokens] = np.eye(n_tokens)[ids]
    hidden[..., n_tokens], hidden[..., n_tokens + 1] = feature, 1
    return torch.tensor(hidden, dtype=dtype)


def _expected(token_ids: ArrayLike, *, n_tokens: int, length: int, n: int) -> Float[np.ndarray, "batch model"]:
    return np.eye(n_tokens, n_tokens + 2)[_ids(token_ids, n_tokens, length)[:, n]]
