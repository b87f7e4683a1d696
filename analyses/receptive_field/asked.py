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
SPREAD = 8
"""Queries by default, evenly spread over the shortest row."""
SHORTEST = 2 / FRACTIONS[0]
"""Length trained on whose shortest prefix has two tokens; one has no distance."""


@dataclass(frozen=True)
class Asked:
    """The checked request.

    Attributes:
        at: every query that is read, ascending positions that all rows have.
        shown: which of them are asked for by position.
        train_length: None where unknown.
        fractions: where each prefix's last token is among `at`; -1 where the shortest row ends before.
        lags, theta, top: as `measure` takes them.
    """

    at: Int[np.ndarray, " query"]
    shown: Int[np.ndarray, " query_token"]
    train_length: int | None
    fractions: Int[np.ndarray, " fraction"]
    shortest: int
    lags: tuple[int, int | None]
    theta: float
    top: float

    @property
    def trained(self) -> bool:
        """Whether every row has the tokens of a row of training."""
        return self.train_length is not None and self.train_length <= self.shortest

    @property
    def pace(self) -> Float[np.ndarray, " fraction"]:
        """Mean distance of a query that reads all tokens alike, over that at the length trained on."""
        lengths = np.floor(np.array(FRACTIONS) * (self.train_length or 0))
        return (lengths - 1) / (lengths[FRACTIONS.index(1.0)] - 1)

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
        last = np.zeros(0, dtype=int)
        if train_length is not None:
            if not isinstance(train_length, int | np.integer) or train_length < SHORTEST:
                raise ValueError(
                    f"train_length is the tokens of a row of training, at least {SHORTEST:.0f}; got {train_length!r}"
                )
            last = np.floor(np.array(FRACTIONS) * train_length).astype(int) - 1
        at = np.unique(np.concatenate([shown, last[last < shortest]]))
        queries(view, at)
        fractions = np.where(last < shortest, np.searchsorted(at, last), -1)
        return cls(at, shown, train_length, fractions, shortest, lags, theta, top)


def _shown(shortest: int, asked: Sequence[int] | np.ndarray | xr.DataArray | None) -> Int[np.ndarray, " query_token"]:
    if asked is None:
        return np.unique(np.maximum(shortest * np.arange(1, SPREAD + 1) // SPREAD - 1, 0))
    given = np.asarray(asked)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or len(np.unique(given)) < len(given):
        raise ValueError(f"query_tokens needs distinct positions (query_token,), the same in every row; got {asked!r}")
    if given.min() < 0 or given.max() >= shortest:
        raise ValueError(f"query_tokens must lie in 0 .. {shortest - 1}, the shortest row's positions; got {asked!r}")
    return np.sort(given)


def _check_lags(lags: tuple[int, int | None]) -> None:
    if not isinstance(lags, tuple | list) or len(lags) != 2 or lags[0] < 0:
        raise ValueError(f"lags is (first, last), tokens between a source and its query, last None for all; got {lags}")
    if lags[1] is not None and lags[1] <= lags[0]:
        raise ValueError(f"lags must run from a shorter to a longer one; got {lags}")
