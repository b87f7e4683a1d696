"""A batch of token sequences with known answers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

__all__ = ["ROLES", "Task", "blank"]

ROLES = ("key", "value", "query", "filler", "kept", "marker")
"""key, value: a pair; query: asks; kept: to be remembered; marker: says that the next is; filler: any other token."""


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    r"""Token sequences, what each token is there for, and the answer wherever one is asked.

    Source: ours. A query is a token whose `target` is not -1.

    Arguments:
        name: name of the generator.
        input_ids: token ids (batch, token), in `[0, vocab)`.
        role: one of `ROLES` for each token (batch, token).
        target: token id to predict at a query, -1 elsewhere (batch, token).
        source_token: index in the row of the token that holds the answer, -1 elsewhere (batch, token).
        vocab: number of token ids.
        params: the generator's arguments, the seed among them.
        answers: token ids that an answer may be; None is every id.

    Raises:
        ValueError: if the arrays differ in shape, or hold a role, an id or an index that cannot be.

    Example:
        >>> from mamba_probe.tasks import mqar
        >>> task = mqar(batch=2, length=16, n_pairs=3, vocab=16)
        >>> task
        Task(mqar: batch=2, length=16, vocab=16, n_query=6, seed=0)
        >>> task.accuracy(task.target)
        (6, 6)
    """

    name: str
    input_ids: Int[np.ndarray, "batch token"]
    role: Shaped[np.ndarray, "batch token"]
    target: Int[np.ndarray, "batch token"]
    source_token: Int[np.ndarray, "batch token"]
    vocab: int
    params: dict[str, Any] = field(default_factory=dict)
    answers: range | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected (batch, token), got shape {self.input_ids.shape}")
        for name in ("role", "target", "source_token"):
            _same_shape(name, getattr(self, name), self.input_ids.shape)
        _within("input_ids", self.input_ids, 0, self.vocab)
        _within("target", self.target, -1, self.vocab)
        _within("source_token", self.source_token, -1, self.input_ids.shape[1])
        unknown = sorted(set(np.unique(self.role).tolist()) - set(ROLES))
        if unknown:
            raise ValueError(f"role: expected {', '.join(ROLES)}; got {', '.join(map(repr, unknown))}")

    def __repr__(self) -> str:
        batch, length = self.input_ids.shape
        seed = f", seed={self.params['seed']}" if "seed" in self.params else ""
        return f"Task({self.name}: batch={batch}, length={length}, vocab={self.vocab}, n_query={self.n_query}{seed})"

    @property
    def n_query(self) -> int:
        """Number of queries in the whole batch."""
        return int((self.target >= 0).sum())

    def accuracy(self, prediction: ArrayLike) -> tuple[int, int]:
        """Count the queries that `prediction` answers.

        Arguments:
            prediction: predicted token ids (batch, token); only those at queries count.

        Returns:
            The number answered correctly, and the number of queries.

        Raises:
            ValueError: if `prediction` is not an integer array of shape (batch, token).
        """
        ids = np.asarray(prediction)
        _same_shape("prediction", ids, self.input_ids.shape)
        if ids.dtype.kind not in "iu":
            raise ValueError(
                f"prediction: expected token ids, got dtype {ids.dtype}; take the argmax of the logits first"
            )
        return int((ids == self.target)[self.target >= 0].sum()), self.n_query


def blank(
    batch: int, length: int
) -> tuple[
    Int[np.ndarray, "batch token"],
    Shaped[np.ndarray, "batch token"],
    Int[np.ndarray, "batch token"],
    Int[np.ndarray, "batch token"],
]:
    """Return input_ids of token 0, roles "filler", and targets and source tokens of -1, to be written to."""
    input_ids, role = np.zeros((batch, length), np.int64), np.full((batch, length), "filler", dtype="<U6")
    target, source_token = np.full((2, batch, length), -1, dtype=np.int64)
    return input_ids, role, target, source_token


def _same_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: expected the shape of input_ids (batch, token) = {shape}, got {array.shape}")


def _within(name: str, array: np.ndarray, low: int, high: int) -> None:
    if array.size and not (low <= array.min() and array.max() < high):
        raise ValueError(f"{name}: expected values in [{low}, {high}), got [{array.min()}, {array.max()}]")
