"""Functions of time with jumps, for the approximation of one function by a few states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Float

from mamba_probe.tasks.draw import distinct
from mamba_probe.tasks.refusal import require, require_integers

__all__ = ["KINDS", "Signals", "function_approximation"]

KINDS = ("steps", "piecewise_constant", "smooth_jump")


@dataclass(frozen=True, eq=False, repr=False)
class Signals:
    """Real functions on [0, 1), sampled. Source: ours.

    Arguments:
        t: time of each sample (sample,), `i / length`.
        values: of the functions (batch, sample).
        jumps: times at which each function jumps, increasing (batch, jump); the new value holds from there on.
        kind: one of `KINDS`.
        params: the generator's arguments, the seed among them.
    """

    t: Float[np.ndarray, " sample"]
    values: Float[np.ndarray, "batch sample"]
    jumps: Float[np.ndarray, "batch jump"]
    kind: str
    params: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        batch, length = self.values.shape
        return f"Signals({self.kind}: batch={batch}, length={length}, n_pieces={self.jumps.shape[1] + 1})"


def function_approximation(
    kind: str = "steps",
    batch: int = 1,
    length: int = 1024,
    n_pieces: int = 2,
    jumps: Sequence[float] | None = None,
    seed: int = 0,
) -> Signals:
    r"""Draw functions with n - 1 jumps, at times a_1 < .. < a_{n-1} of (0, 1).

    With k(t) the number of jumps at or before t,

    .. math:: \text{steps: } s(t) = [k(t) \text{ even}], \qquad
        \text{piecewise constant: } c_{k(t)}, \; c_i \sim N(0, 1), \qquad
        \text{smooth jump: } \sin 2 \pi t + [k(t) \text{ odd}]

    so that with n = 2 the first is 1[t < a] and the last a sine plus a jump of 1. Source: ours, for the claim of
    arXiv 2506.11891 on approximating functions with discontinuities.

    Arguments:
        kind: "steps", "piecewise_constant" or "smooth_jump".
        batch: number of functions.
        length: samples of each.
        n_pieces: pieces, n above.
        jumps: the times a_i, equal for all functions; None: drawn a function, every set of samples as likely.
        seed: of the random generator; equal seeds give equal functions.

    Raises:
        ValueError: if the kind is unknown, or the sizes or the jumps do not fit each other.

    Example:
        >>> signals = function_approximation("steps", length=8, jumps=[0.5])
        >>> signals
        Signals(steps: batch=1, length=8, n_pieces=2)
        >>> signals.values.tolist()
        [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """
    given = dict(locals())
    _check(kind, batch, length, n_pieces, jumps, seed)
    rng, t = np.random.default_rng(seed), np.arange(length) / length
    if jumps is None:
        places = (1 + np.sort(distinct(rng, batch, np.ones(length - 1), n_pieces - 1), axis=1)) / length
    else:
        places = np.tile(np.asarray(jumps, dtype=float), (batch, 1))
        given["jumps"] = places[0].tolist()
    passed = (t >= places[:, :, None]).sum(axis=1)
    if kind == "steps":
        values = (passed + 1.0) % 2
    elif kind == "piecewise_constant":
        values = np.take_along_axis(rng.standard_normal((batch, n_pieces)), passed, axis=1)
    else:
        values = np.sin(2 * np.pi * t) + passed % 2
    return Signals(t, values, places, kind, given)


def _check(kind: str, batch: int, length: int, n_pieces: int, jumps: Sequence[float] | None, seed: int) -> None:
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"function_approximation: kind={kind!r} is unknown; known: {', '.join(KINDS)}{hint}")
    require_integers("function_approximation", batch=batch, length=length, n_pieces=n_pieces, seed=seed)
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"n_pieces >= 2 (got {n_pieces})": n_pieces >= 2,
        f"length >= n_pieces (got {length} < {n_pieces})": length >= n_pieces,
    }
    require("function_approximation", needs)
    if jumps is not None:
        require("function_approximation", _jump_needs(np.asarray(jumps, dtype=float), length, n_pieces))


def _jump_needs(jumps: Float[np.ndarray, " jump"], length: int, n_pieces: int) -> dict[str, bool]:
    first = np.ceil(jumps * length)  # first sample of each new piece
    return {
        f"len(jumps) == n_pieces - 1 (got {jumps.size}, {n_pieces - 1})": jumps.shape == (n_pieces - 1,),
        f"0 < jumps < 1, finite (got {jumps.tolist()})": bool(((jumps > 0) & (jumps < 1)).all()),
        f"a sample of each piece: ceil({length} * jumps) increasing and <= {length - 1} (got {first.tolist()})": bool(
            (np.diff(first.ravel(), prepend=0) > 0).all() and (first <= length - 1).all()
        ),
    }
