"""Arguments of `measure`, checked and put into one form."""

from collections.abc import Sequence
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.memory_horizon.options import Options

__all__ = ["LEVELS", "asked", "asked_levels"]

LEVELS = MappingProxyType({"1/e": float(np.exp(-1)), "1/2": 0.5})
"""Levels by name."""


def asked_levels(level: float | str | Sequence[float | str]) -> dict[str, float]:
    """Retention of each level by its name, in the order given.

    Raises:
        ValueError: an unknown name, a number outside (0, 1), none, or one twice.

    >>> asked_levels(["1/2", 0.1])
    {'1/2': 0.5, '0.1': 0.1}
    """
    given = [level] if isinstance(level, float | int | str) else list(level)
    found: dict[str, float] = {}
    for one in given:
        if isinstance(one, str) and one not in LEVELS:
            raise ValueError(f"level is a number in (0, 1) or one of {list(LEVELS)}; got {one!r}")
        value = LEVELS[one] if isinstance(one, str) else float(one)
        if not 0 < value < 1:
            raise ValueError(f"level is a retention and must be above 0 and below 1; got {value}")
        found[one if isinstance(one, str) else f"{value:g}"] = value
    if not given or len(found) < len(given):
        raise ValueError(f"level needs at least one retention, each once; got {level!r}")
    return found


def asked(
    view: Canonical, tokens: Sequence[int] | None, event_tokens: object, epsilon: float, token_blocks: int | None,
    mass: bool, n_bootstrap: int, seed: int,
) -> Options:  # fmt: skip
    """The options of a measurement.

    Raises:
        ValueError: tokens or events that a row does not hold, epsilon outside (0, 1), blocks of several rows, of gaps
            or of no token, a mass horizon of no token.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is what may be lost of a write, above 0 and below 1; got {epsilon}")
    spans = [int(np.ptp(view.positions(row))) + 1 for row in range(view.n_rows)]
    options = Options(
        tokens=_tokens(view, tokens), events=_events(view, event_tokens), epsilon=epsilon,
        units=_units(view, token_blocks), within=max(1, min(spans) // 2), longest=max(spans), mass=mass,
        n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip
    if mass and not options.tokens:
        raise ValueError("mass is measured at queries: name them by their positions, tokens=[...]")
    return options


def _units(view: Canonical, token_blocks: int | None) -> tuple[tuple[int, slice], ...]:
    if token_blocks is None:
        return tuple((row, slice(None)) for row in range(view.n_rows))
    if view.n_rows > 1:
        raise ValueError(f"token_blocks is for a trace of one row; with {view.n_rows}, rows are drawn")
    n_tokens = len(view.positions(0))
    if not view.contiguous(0) or not 2 <= token_blocks <= n_tokens:
        raise ValueError(
            f"token_blocks needs at least 2 blocks of a row without gaps, and a token for each; got {token_blocks} for "
            f"{n_tokens} tokens{'' if view.contiguous(0) else ' with gaps'}"
        )
    edges = np.linspace(0, n_tokens, token_blocks + 1).round().astype(int).tolist()
    return tuple((0, slice(start, end)) for start, end in pairwise(edges))


def _tokens(view: Canonical, tokens: Sequence[int] | None) -> tuple[int, ...]:
    given = np.asarray(() if tokens is None else tokens)
    if given.size and (given.dtype.kind not in "iu" or given.ndim != 1):
        raise ValueError(f"tokens needs integers, positions among a row's valid tokens; got {tokens!r}")
    asked = tuple(given.tolist())
    for row in range(view.n_rows):
        missing = sorted(set(asked) - set(view.positions(row).tolist()))
        if missing:
            raise ValueError(f"tokens {missing} are not among the valid tokens of row {row}: {_range(view, row)}")
    return asked


def _events(view: Canonical, event_tokens: object) -> tuple[int, ...]:
    if event_tokens is None:
        return ()
    events = np.atleast_1d(np.asarray(event_tokens))
    if not np.issubdtype(events.dtype, np.integer) or events.ndim != 1 or len(events) not in (1, view.n_rows):
        raise ValueError(
            f"event_tokens needs one position, or one for each of the {view.n_rows} rows; got {event_tokens!r}"
        )
    events = np.broadcast_to(events, view.n_rows)
    for row, event in enumerate(events):
        if event not in view.positions(row):
            raise ValueError(f"event_tokens: {event} is not among the valid tokens of row {row}: {_range(view, row)}")
    return tuple(int(event) for event in events)


def _range(view: Canonical, row: int) -> str:
    position = view.positions(row)
    return f"{len(position)} tokens at positions {position[0]} to {position[-1]}"
