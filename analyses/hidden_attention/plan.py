"""What is asked for, checked once: queries by row, a rule to join heads, a rule to scale rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import xarray as xr
from jaxtyping import Int

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.hidden_attention.core import AGGREGATES, NORMALISATIONS

__all__ = ["LAST", "Plan", "Queries", "check_causal", "queries", "rules"]

LAST = -1
"""Label of the one query of each row where none was asked for: its last valid token."""

Queries = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | xr.DataArray | None


@dataclass(frozen=True)
class Plan:
    """Queries by index among a row's valid tokens, and the named rules."""

    at: Int[np.ndarray, "batch query_token"]
    label: Int[np.ndarray, " query_token"]
    aggregate: str
    normalise: str
    seed: int


def rules(aggregate: str, normalise: str) -> tuple[str, str]:
    """The two names, checked.

    Raises:
        ValueError: an unknown one, with the nearest.

    >>> rules("signed", "raw")
    Traceback (most recent call last):
    ValueError: unknown aggregate 'signed': did you mean 'signed_mean'? Known: signed_mean, mean_absolute, l2, none
    """
    for what, name, known in (("aggregate", aggregate, AGGREGATES), ("normalise", normalise, NORMALISATIONS)):
        if name not in known:
            close = get_close_matches(str(name), known, cutoff=0.4)
            nearest = f": did you mean {close[0]!r}? Known: " if close else "; known: "
            raise ValueError(f"unknown {what} {name!r}{nearest}{', '.join(known)}")
    return aggregate, normalise


def check_causal(view: Canonical, row: int) -> None:
    """Check that a row holds every token that a query reads.

    Raises:
        ValueError: its tokens have gaps, or do not begin with the first.
    """
    first = int(view.positions(row)[0])
    if not view.contiguous(row) or first:
        what = f"begin at position {first}" if first else "are not contiguous"
        raise ValueError(f"the tokens of row {row} {what}: a query reads every token before it; record all tokens")


def queries(view: Canonical, asked: Queries) -> tuple[Int[np.ndarray, "batch query_token"], np.ndarray]:
    """Queries of each row by index among its valid tokens, and their labels.

    Raises:
        ValueError: empty, no integers, of another shape, one twice, a token that a row lacks, or a row with gaps.
    """
    for row in range(view.n_rows):
        check_causal(view, row)
    n_valid = view.valid.sum(axis=1)
    if asked is None:
        return n_valid[:, None] - 1, np.array([LAST])
    given = np.asarray(asked)
    if not given.size:
        raise ValueError("query_tokens is empty; leave it None for the last valid token of each row")
    if given.dtype.kind not in "iu" or given.ndim not in (1, 2) or (given.ndim == 2 and len(given) != view.n_rows):
        raise ValueError(
            f"query_tokens needs integers (query_token,) or (batch = {view.n_rows}, query_token); got {given.dtype} of "
            f"shape {given.shape}"
        )
    at = np.broadcast_to(given, (view.n_rows, given.shape[-1])).astype(np.int64)
    for row, tokens in enumerate(at):
        if tokens.min() < 0 or tokens.max() >= n_valid[row] or len(np.unique(tokens)) < len(tokens):
            raise ValueError(
                f"query_tokens {tokens.tolist()} must be distinct positions 0 to {n_valid[row] - 1}: row {row} has "
                f"{n_valid[row]} valid tokens"
            )
    return at, given if given.ndim == 1 else np.arange(given.shape[1])
