"""How much a prediction owes to the first tokens of its context: the model run again without them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mamba_probe import provenance
from mamba_probe.arguments import array, whole, wholes
from mamba_probe.inputs import ModelInput, checked_input

__all__ = ["remembrance"]

CUT = ("input_ids", "inputs_embeds")
"""What tokens are removed from."""

Context = tuple[int, int]
"""A row, and how many of its first tokens are removed."""


def remembrance(
    probe: Any, inputs: Any = None, attention_mask: Any = None, *, starts: Sequence[int] | np.ndarray | None = None,
    queries: int | Sequence[int] | np.ndarray | None = None, batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Distance between the next-token distributions at a query with and without the first t tokens.

    $$\mathrm{EffRem}_T(t) = \tfrac12 \sum_v |q(v \mid x_{0:T}) - q(v \mid x_{t:T})|$$

    Source: effective remembrance of Buitrago and Gu, "Understanding and Improving Length Generalization in Recurrent
    Models", arXiv 2507.02782, whose distance is the total variation too; `null_other_row`: ours. Rows are run without
    their padding, those of one length together: one forward pass a start, and at most one more for the null.

    Args:
        probe: an attached probe, of a model that gives logits.
        inputs: token ids (batch, token), a dict with `input_ids` or `inputs_embeds`, or a `Task`.
        attention_mask: (batch, token), 1 at tokens and 0 at padding.
        starts: how many of the first tokens are removed: positions t up to the query; default: 0, and 1, 2, 4, .. from
            either end of the shortest context.
        queries: position among the valid tokens that predicts: one for all rows or (batch,) one a row; default: the
            last valid token of each.
        batch_size: rows a forward call; None is all at once.

    Returns:
        remembrance (batch, start) in 0 to 1, and null_other_row (batch, start): the distance to the prediction from as
        many tokens up to the next row's query: how far unrelated contexts of that length are; NaN where no other row
        has as many. In float64 from the logits as the model gives them.

    Raises:
        ValueError: no logits, nothing to cut, edits or a recording active, a query or start that a row lacks.

    >>> import mamba_probe as mp
    >>> task = mp.tasks.mqar(batch=2, length=64, seed=0)
    >>> asked = [np.flatnonzero(row == "query")[-1] for row in task.role]
    >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
    ...     found = remembrance(probe, task, starts=[0, 20], queries=asked)
    >>> found["remembrance"].values.round(2).tolist()
    [[0.0, 0.53], [0.0, 0.53]]
    """
    probe._check_unedited("remembrance")
    if any(tap.listener is not None for tap in probe._taps.values()):
        raise ValueError("remembrance runs the model, and a recording is open on this probe: leave it first")
    given = checked_input(probe.model, probe._adapters[0].sizes.width, inputs, attention_mask, None, None)
    batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
    name, valid = _cut(given), _valid(given)
    at = _queries(valid, queries)
    removed = _starts(at, starts)
    rows = [given.keywords[name][i][torch.from_numpy(np.flatnonzero(row))] for i, row in enumerate(valid)]
    kept = {key: value for key, value in given.keywords.items() if not isinstance(value, Tensor)}

    def predicted(contexts: list[Context]) -> Float[np.ndarray, "context vocab"]:
        distinct = list(dict.fromkeys(contexts))
        cut = [rows[row][start : at[row] + 1] for row, start in distinct]
        found = _predictions(probe.model, name, cut, kept, batch_size)
        return found[[distinct.index(context) for context in contexts]]

    every = range(len(rows))
    intact = predicted([(row, 0) for row in every])
    found = np.full((2, len(rows), len(removed)), np.nan)
    for place, start in enumerate(removed.tolist()):
        others = {row: other for row in every if (other := _other(at, row, start)) is not None}
        cut = predicted([*((row, start) for row in every), *others.values()])
        found[0, :, place] = _distance(intact, cut[: len(rows)]) if start else 0.0
        found[1, list(others), place] = _distance(intact[list(others)], cut[len(rows) :])
    return _described(probe, given, valid, at, removed, found)


def _cut(given: ModelInput) -> str:
    """The keyword that tokens are removed from.

    Raises:
        ValueError: none, or others that would have to be cut with it.
    """
    held = [key for key, value in given.keywords.items() if isinstance(value, Tensor) and key != "attention_mask"]
    if len(held) != 1 or held[0] not in CUT:
        raise ValueError(f"remembrance removes tokens from {' or '.join(CUT)}, given alone; got {sorted(held)}")
    return held[0]


def _valid(given: ModelInput) -> Bool[np.ndarray, "batch token"]:
    mask = given.keywords.get("attention_mask")
    return np.ones((given.batch, given.length), bool) if mask is None else mask.cpu().numpy().astype(bool)


def _queries(
    valid: Bool[np.ndarray, "batch token"], asked: int | Sequence[int] | np.ndarray | None
) -> Int[np.ndarray, " batch"]:
    counts = valid.sum(axis=1)
    if asked is None:
        return counts - 1
    given = array("queries", asked)
    if given.dtype.kind not in "iu" or given.shape not in ((), (len(valid),)):
        raise ValueError(f"queries needs one position, or one a row, (batch = {len(valid)},); got {asked!r}")
    at = np.broadcast_to(given, len(valid)).astype(np.int64)
    if (at < 0).any() or (at >= counts).any():
        row = int(np.flatnonzero((at < 0) | (at >= counts))[0])
        raise ValueError(f"queries: row {row} has positions 0 .. {counts[row] - 1}; got {at[row]}")
    return at


def _starts(at: Int[np.ndarray, " batch"], asked: Sequence[int] | np.ndarray | None) -> Int[np.ndarray, " start"]:
    last = int(at.min())
    if asked is None:
        steps = 2 ** np.arange(last.bit_length())
        return np.unique(np.concatenate([[0, last], steps, last - steps]))
    given = np.array(wholes("starts", asked), dtype=np.int64)
    if not given.size or len(np.unique(given)) < len(given):
        raise ValueError(f"starts is a non-empty list of distinct positions; got {asked!r}")
    if given.min() < 0 or given.max() > last:
        raise ValueError(f"starts must lie in 0 .. {last}, the earliest query, which is never removed; got {asked!r}")
    return given


def _other(at: Int[np.ndarray, " batch"], row: int, start: int) -> Context | None:
    """As many tokens up to the query of the next row, around the batch, that has them."""
    length = int(at[row]) - start
    following = [*range(row + 1, len(at)), *range(row)]
    return next(((other, int(at[other]) - length) for other in following if at[other] >= length), None)


def _predictions(
    model: Any, name: str, contexts: list[Tensor], kept: dict[str, Any], batch_size: int | None
) -> Float[np.ndarray, "batch vocab"]:
    """The next-token distribution after each context; contexts of one length run together."""
    found: dict[int, np.ndarray] = {}
    lengths = np.array([len(context) for context in contexts])
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)
        step = batch_size or len(same)
        for rows in (same[start : start + step] for start in range(0, len(same), step)):
            with torch.no_grad():
                logits = getattr(model(**{name: torch.stack([contexts[row] for row in rows])}, **kept), "logits", None)
            if not isinstance(logits, Tensor) or logits.ndim != 3:
                raise ValueError(f"remembrance needs a language model; {type(model).__name__} gives no logits")
            found |= zip(rows.tolist(), logits[:, -1].double().softmax(-1).cpu().numpy(), strict=True)
    return np.stack([found[row] for row in range(len(contexts))])


def _distance(p: Float[np.ndarray, "batch vocab"], q: Float[np.ndarray, "batch vocab"]) -> Float[np.ndarray, " batch"]:
    """Total variation."""
    return np.minimum(np.abs(p - q).sum(axis=1) / 2, 1.0)


def _described(
    probe: Any, given: ModelInput, valid: np.ndarray, at: np.ndarray, removed: np.ndarray, found: np.ndarray
) -> xr.Dataset:
    text = {
        "remembrance": "total variation between predictions with and without the first tokens",
        "null_other_row": "total variation to the prediction from as many tokens of another row",
    }
    variables = {
        key: (("batch", "start"), values, {"long_name": words, "units": "1"})
        for (key, words), values in zip(text.items(), found, strict=True)
    }
    coords = {
        "batch": np.arange(given.batch),
        "start": ("start", removed, {"long_name": "first tokens removed", "units": "token"}),
        "query_position": ("batch", at),
        "valid": (("batch", "token"), valid),
        "position": (("batch", "token"), np.where(valid, np.cumsum(valid, axis=1) - 1, -1)),
    }
    attrs = provenance.of_model(probe.model, "remembrance") | {
        "backend": probe.backend,
        "estimator": "total variation of next-token distributions at the query, softmax in float64",
        "source": "effective remembrance, Buitrago and Gu, arXiv 2507.02782; null_other_row ours",
    }
    return xr.Dataset(variables, coords, attrs)
