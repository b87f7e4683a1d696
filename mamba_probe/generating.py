"""What `generate()` of transformers feeds to rows that are over, while a recording is open.

A row that has drawn an end-of-sequence token is fed that token, and padding from then on, while the mask goes on saying
1. Which ids those are is known where `generate` is called; a loop of the user's own is taken as it is.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import MethodType
from typing import Any

import numpy as np
from torch import nn

__all__ = ["Ended", "heard"]


class Ended:
    """Follows one call of `generate()` and tells its padding from tokens.

    >>> ended, own = Ended(eos=(9,), pad=0), np.array([0, 1])
    >>> ended.padding(np.array([[9, 3], [9, 4]]), None).any()  # the prompt: nothing in it ends a row
    np.False_
    >>> ended.padding(np.array([[9], [0]]), own).any()
    np.False_
    >>> ended.padding(np.array([[0], [0]]), own).tolist()
    [[True], [False]]
    """

    def __init__(self, eos: tuple[int, ...], pad: int, unheard: tuple[str, ...] = ()):
        self._eos, self._pad, self._unheard = eos, pad, unheard
        self._over: np.ndarray | None = None
        self._n_prompt = 0

    def padding(self, ids: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
        """Which tokens of a model call are padding of rows that are over.

        Args:
            ids: (batch, token), -1 where the model was given none.
            parents: the row that each row continues; None for whole sequences, of a `generate()` without a cache.
        """
        if self._over is None:
            self._warn(len(ids))
            self._over, self._n_prompt = np.zeros(len(ids), bool), ids.shape[1]
            return np.zeros(ids.shape, bool)
        old = self._n_prompt if parents is None else 0
        over = np.zeros(len(ids), bool) if parents is None else self._over[parents]
        made = ids[:, old:]
        ends = np.isin(made, self._eos)
        padding = (over[:, None] | (ends.cumsum(1) > ends)) & (made == self._pad)
        self._over = (padding | ends)[:, -1]
        return np.concatenate([np.zeros((len(ids), old), bool), padding], axis=1)

    def _warn(self, n_row: int) -> None:
        if self._unheard and n_row > 1:
            warnings.warn(
                f"a row that {' or '.join(self._unheard)} ends is fed padding while others go on, and the recording"
                " takes it for tokens: it knows padding only after an end-of-sequence id. Generate one row at a time",
                stacklevel=2,
            )


@contextmanager
def heard(model: nn.Module, start: Callable[[Ended | None], None]) -> Iterator[None]:
    """Call `start` with an `Ended` when `model.generate` begins, and with None when it is over."""
    if getattr(model, "generation_config", None) is None:  # no model of transformers that generates
        yield
        return
    own = model.__dict__.get("generate")
    generate: Any = model.generate

    def generate_heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not model:  # a copy
            return type(self).generate(self, *args, **kwargs)
        start(_ended(model, signature(generate).bind(*args, **kwargs).arguments))
        try:
            return generate(*args, **kwargs)
        finally:
            start(None)

    model.generate = MethodType(generate_heard, model)  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own


def _ended(model: nn.Module, given: dict[str, Any]) -> Ended | None:
    """By the ids that this `generate()` uses: its arguments, else its configuration's, else the model's."""
    options, config = given.get("kwargs", {}), given.get("generation_config")

    def used(name: str) -> list[int]:
        known = [getattr(each, name, None) for each in (config, model.generation_config)]
        value = options[name] if name in options else next((each for each in known if each is not None), None)
        return [] if value is None else np.atleast_1d(np.asarray(value)).tolist()

    eos, pad = used("eos_token_id"), used("pad_token_id")
    others = tuple(name for name in ("stopping_criteria", "stop_strings") if given.get(name) or used(name))
    return Ended(tuple(eos), (pad or eos)[0], others) if eos else None
