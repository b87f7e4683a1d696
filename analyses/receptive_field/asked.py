"""What is asked for, checked once: queries, prefixes by the length trained on, lags, shares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.hidden_attention.plan import queries

__all__ = ["FRACTIONS", "Asked"]

FRACTIONS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Prefixes whose mean distance is compared, in units of the length trained on."""
NEAR = 2**0.5
"""How far, as a factor, an asked token may lie from a prefix's length: half way to the next, which is twice as long."""
SPREAD = 8
"""Queries by default, evenly spread over the shortest row."""
SHORTEST = 2 / FRACTIONS[0]
"""Length trained on whose shortest prefix has two tokens; one has no distance."""


@dataclass(frozen=True)
class Asked:
    """The checked request.

    Attributes:
        shown: the queries that are asked for by position, ascending, which all rows have.
        train_length: None where unknown.
        ends: last token of each prefix by row, no column without a length; -1 where a row has none.
        roles: what those tokens are in the task, by prefix; "" where unknown.
        on_asked: whether they are where the task asks, each row's own, and not the same position in every row.
        lags, theta, top: as `measure` takes them.
    """

    shown: Int[np.ndarray, " query_token"]
    train_length: int | None
    ends: Int[np.ndarray, "row fraction"]
    roles: tuple[str, ...]
    on_asked: bool
    shortest: int
    lags: tuple[int, int | None]
    theta: float
    top: float

    @property
    def trained(self) -> bool:
        """Whether every row has the tokens of a row of training."""
        return self.train_length is not None and self.train_length <= self.shortest

    @property
    def lengths(self) -> Float[np.ndarray, "row fraction"]:
        """Tokens of each prefix by row; NaN where a row has none."""
        return np.where(self.ends < 0, np.nan, self.ends + 1.0)

    @classmethod
    def of(
        cls, view: Canonical, query_tokens: Sequence[int] | np.ndarray | None, train_length: int | None,
        lags: tuple[int, int | None], theta: float, top: float,
    ) -> "Asked":  # fmt: skip
        """Check the request against the trace.

        Raises:
            ValueError: a query that not every row has, a length below 8, lags in no order, a share outside (0, 1).
        """
        shortest = int(view.valid.sum(axis=1).min())
        shown = _shown(shortest, query_tokens)
        _check_lags(lags)
        for name, share in (("theta", theta), ("top", top)):
            if not 0 < share < 1:
                raise ValueError(f"{name} is a share above 0 and below 1; got {share}")
        _check_length(train_length)
        queries(view, shown)
        ends, roles, on_asked = _ends(view, train_length, shortest)
        return cls(shown, train_length, ends, roles, on_asked, shortest, lags, theta, top)


def _ends(
    view: Canonical, length: int | None, shortest: int
) -> tuple[Int[np.ndarray, "row fraction"], tuple[str, ...], bool]:
    """The asked token nearest to each prefix's length; the same position in every row where a task does not ask so."""
    if length is None:
        return np.zeros((view.n_rows, 0), dtype=int), (), False
    last = np.floor(np.array(FRACTIONS) * length).astype(int) - 1
    fixed = np.tile(np.where(last < shortest, last, -1), (view.n_rows, 1))
    if "role" not in view.trace.coords:
        return fixed, ("",) * len(FRACTIONS), False
    roles = view.trace["role"].transpose("batch", "token").values
    of_rows = [roles[row, view.valid[row]].astype(str) for row in range(view.n_rows)]
    near = np.array([_nearest(np.flatnonzero(of == "query"), last) for of in of_rows])
    trained = near[:, FRACTIONS.index(1.0)] >= 0
    on_asked = bool((near[trained] >= 0).any(axis=0).sum() > 1)
    ends = near if on_asked else fixed
    return ends, tuple(_named(of_rows, column) for column in ends.T), on_asked


def _nearest(asked: Int[np.ndarray, " asked"], last: Int[np.ndarray, " fraction"]) -> list[int]:
    """Of each prefix the asked token whose length is nearest, at most a factor away; -1 where none is.

    >>> _nearest(np.array([30, 33, 50]), np.array([15, 31, 63]))
    [-1, 30, 50]
    """
    found = []
    for end in last:
        inside = asked[(asked + 1 >= (end + 1) / NEAR) & (asked + 1 < (end + 1) * NEAR)]
        found.append(int(inside[np.abs(inside - end).argmin()]) if inside.size else -1)
    return found


def _named(roles: list[np.ndarray], ends: Int[np.ndarray, " row"]) -> str:
    return ", ".join(sorted({str(of[end]) for of, end in zip(roles, ends, strict=True) if end >= 0}))


def _shown(shortest: int, asked: Sequence[int] | np.ndarray | xr.DataArray | None) -> Int[np.ndarray, " query_token"]:
    if asked is None:
        return np.unique(np.maximum(shortest * np.arange(1, SPREAD + 1) // SPREAD - 1, 0))
    given = np.asarray(asked)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or len(np.unique(given)) < len(given):
        raise ValueError(f"query_tokens needs distinct positions (query_token,), the same in every row; got {asked!r}")
    if given.min() < 0 or given.max() >= shortest:
        raise ValueError(f"query_tokens must lie in 0 .. {shortest - 1}, the shortest row's positions; got {asked!r}")
    return np.sort(given)


def _check_length(length: object) -> None:
    if length is not None and (not isinstance(length, int | np.integer) or length < SHORTEST):
        raise ValueError(f"train_length is the tokens of a row of training, at least {SHORTEST:.0f}; got {length!r}")


def _check_lags(lags: tuple[int, int | None]) -> None:
    if not isinstance(lags, tuple | list) or len(lags) != 2 or lags[0] < 0:
        raise ValueError(f"lags is (first, last), tokens between a source and its query, last None for all; got {lags}")
    if lags[1] is not None and lags[1] <= lags[0]:
        raise ValueError(f"lags must run from a shorter to a longer one; got {lags}")
