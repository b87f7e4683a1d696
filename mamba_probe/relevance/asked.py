"""Which logit is explained: at which token of a row, and of which id."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from mamba_probe.arguments import array
from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name

__all__ = ["Asked", "asked_of"]

NAMED = ("last_query", "queries")


@dataclass(frozen=True)
class Asked:
    """Tokens that are asked about, and ids, -1 for the top logit there; a token of -1 is none."""

    token: Int[np.ndarray, "batch query"]
    target: Int[np.ndarray, "batch query"]
    tokens_rule: str
    target_rule: str

    def rows(self, rows: slice) -> "Asked":
        """The same of some rows."""
        return replace(self, token=self.token[rows], target=self.target[rows])


def asked_of(inputs: Any, valid: np.ndarray, tokens: Any, target: Any, vocab: int) -> Asked:
    """What `mamba_probe.relevance.relevance` was asked for.

    Raises:
        ValueError: tokens that a row has not, an id beyond the vocabulary, answers where none is known.
    """
    task = inputs if isinstance(inputs, Task) else None
    token, tokens_rule = _tokens(task, valid, tokens)
    found, target_rule = _targets(task, token, target, vocab)
    return Asked(token, np.where(token < 0, -1, found), tokens_rule, target_rule)


def _tokens(task: Task | None, valid: np.ndarray, tokens: Any) -> tuple[np.ndarray, str]:
    if isinstance(tokens, str) and tokens not in NAMED:
        raise unknown_name("tokens", tokens, NAMED)
    if tokens is None and task is None:
        return valid.shape[1] - 1 - valid[:, ::-1].argmax(1)[:, None], "the last valid token of each row"
    if tokens is None or isinstance(tokens, str):
        if task is None:
            raise ValueError(f"tokens={tokens!r} needs a Task, which says where it asks; got ids: name positions")
        return _queries(task, valid, tokens or "last_query")
    return _positions(valid, tokens), "positions as asked for"


def _queries(task: Task, valid: np.ndarray, tokens: str) -> tuple[np.ndarray, str]:
    asks = (task.target >= 0) & valid
    if not asks.any(1).all():
        raise ValueError(f"row {int((~asks.any(1)).argmax())} of the task asks nothing: name tokens=[positions]")
    if tokens == "last_query":
        return asks.shape[1] - 1 - asks[:, ::-1].argmax(1)[:, None], "the last query of each row"
    found = np.full((len(asks), asks.sum(1).max()), -1)
    for row, each in enumerate(asks):
        found[row, : each.sum()] = np.flatnonzero(each)
    return found, "every query of each row"


def _positions(valid: np.ndarray, tokens: Any) -> np.ndarray:
    """Token of each asked position in each row; positions count valid tokens."""
    wanted, counts = array("tokens", tokens), valid.sum(1)
    if wanted.ndim not in (1, 2) or not wanted.size or wanted.dtype.kind not in "iu":
        need = "positions: a list for every row, or one list a row (batch, query)"
        raise ValueError(f"tokens are {need}; got {tokens!r}")
    if wanted.ndim == 2 and len(wanted) != len(valid):
        raise ValueError(f"tokens has {len(wanted)} rows and the input {len(valid)}")
    each = np.broadcast_to(wanted, (len(valid), wanted.shape[-1]))
    if (each < 0).any() or (each >= counts[:, None]).any():
        row = int(((each < 0) | (each >= counts[:, None])).any(1).argmax())
        raise ValueError(f"tokens must be positions 0 .. {counts[row] - 1} in row {row}; got {each[row].tolist()}")
    return np.stack([np.flatnonzero(row)[at] for row, at in zip(valid, each, strict=True)])


def _targets(task: Task | None, token: np.ndarray, target: Any, vocab: int) -> tuple[np.ndarray, str]:
    if isinstance(target, str) and target not in ("answer", "top"):
        raise unknown_name("target", target, ("answer", "top"))
    if (target is None and task is None) or (isinstance(target, str) and target == "top"):
        return np.full(token.shape, -1), "the model's own top logit there"
    if target is None or isinstance(target, str):
        return _answers(task, token), "the task's answer"
    ids = array("target", target)
    ids = ids[:, None] if ids.ndim == 1 else ids
    if ids.dtype.kind not in "iu" or (ids.ndim == 2 and ids.shape not in (token.shape, (len(token), 1))):
        need = f"an id, one a row ({len(token)},), or (batch, query) = {token.shape}"
        raise ValueError(f"target is {need}; got {ids.dtype} of shape {np.shape(target)}")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"target ids must lie in 0 .. {vocab - 1}; got {ids.min()} .. {ids.max()}")
    return np.broadcast_to(ids, token.shape), "ids as asked for"


def _answers(task: Task | None, token: np.ndarray) -> np.ndarray:
    if task is None:
        raise ValueError('target="answer" needs a Task, which knows its answers; got ids: pass the ids of targets')
    found = np.take_along_axis(task.target, np.maximum(token, 0), axis=1)
    if ((found < 0) & (token >= 0)).any():
        row, query = np.argwhere((found < 0) & (token >= 0))[0]
        raise ValueError(f'no answer is asked for at token {token[row, query]} of row {row}: pass target="top" or ids')
    return found
