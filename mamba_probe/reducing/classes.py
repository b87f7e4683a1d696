"""Which class each token is of: by a task's roles, by the marks of `sinks`, by token id or by token text."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int, Shaped

from mamba_probe.analyses.sinks.classes import masks
from mamba_probe.reducing.reduction import ALL
from mamba_probe.trace.contract import unknown_name

__all__ = ["BY", "Classes", "classes"]

BY = ("role", "text")

Masks = dict[str, Bool[np.ndarray, "batch token"]]


class Classes:
    """Masks of a piece's tokens by class; what it is called in a result is `name`."""

    def __init__(self, of: Callable[[xr.Dataset], Masks], name: str):
        self._of, self.name = of, name

    def __call__(self, trace: xr.Dataset) -> Masks:
        """Of the valid tokens: "all", and the classes by name."""
        valid = trace["valid"].transpose("batch", "token").values.astype(bool)
        return {ALL: valid} | {name: mask & valid for name, mask in self._of(trace).items()}


def classes(by: Any, labels: Mapping[str, object], has_ids: bool) -> Classes:
    """How tokens are classed.

    Args:
        by: None; "role" (of a task); "text" (first token of a row, newline, punctuation, as in `sinks.classes`); a
            mapping of token ids, or an array over them, to names of classes; or a function of a token's text that gives
            one. A token without a name, "" or None is of no class but "all".
        labels: what the input is labelled with.
        has_ids: whether it is token ids.

    Raises:
        ValueError: what the input lacks for it; a name that is no string, or that is "all".
    """
    if by is None:
        return Classes(lambda trace: {}, "none")
    if isinstance(by, str):
        return _named(by, labels)
    if callable(by):
        function: Any = by
        if "token_text" not in labels:
            raise ValueError(f"by={by!r} takes the text of tokens: pass a corpus or text with its tokenizer")
        return Classes(_ByText(function), f"{getattr(by, '__name__', type(by).__name__)}(token_text)")
    if not has_ids:
        raise ValueError("by= names classes of token ids, and the inputs are no token ids")
    table = dict(by) if isinstance(by, Mapping) else dict(enumerate(_array(by)))
    by_id = _ByID({_checked_id(key): _checked(name, f"token id {key}") for key, name in table.items()})
    if not by_id.names:
        raise ValueError("by= names no class: every token id is without one")
    return Classes(by_id, f"token id ({len(table)} ids in {len(by_id.names)} classes)")


def _named(by: str, labels: Mapping[str, object]) -> Classes:
    if by not in BY:
        raise unknown_name("by", by, BY)
    needs = {"role": "role", "text": "token_text"}[by]
    if needs not in labels:
        what = {"role": "a task (mp.tasks)", "text": "a corpus or text with its tokenizer"}[by]
        raise ValueError(f"by={by!r} needs {what}: the inputs have no {needs}")
    if by == "role":
        return Classes(_roles, "role")
    return Classes(lambda trace: masks(trace.drop_vars("role", errors="ignore")), "first token, newline, punctuation")


def _roles(trace: xr.Dataset) -> Masks:
    role = trace["role"].transpose("batch", "token").values
    return {name: role == name for name in sorted({*role.ravel().tolist()} - {""})}


class _ByID:
    def __init__(self, names: Mapping[int, str]):
        self.names = sorted({name for name in names.values() if name})
        self._keys = np.array(sorted(names), dtype=np.int64)
        self._code = np.array([self.names.index(names[key]) if names[key] else -1 for key in self._keys.tolist()])

    def __call__(self, trace: xr.Dataset) -> Masks:
        ids: Int[np.ndarray, "batch token"] = trace["token_id"].transpose("batch", "token").values
        place = np.minimum(np.searchsorted(self._keys, ids), len(self._keys) - 1)
        code = np.where(self._keys[place] == ids, self._code[place], -1)
        return {name: code == i for i, name in enumerate(self.names)}


class _ByText:
    """A function of token text, called once for each token id."""

    def __init__(self, function: Callable[[str], str | None]):
        self._function = function
        self._known: dict[int, str] = {}

    def __call__(self, trace: xr.Dataset) -> Masks:
        ids = trace["token_id"].transpose("batch", "token").values
        text: list[str] = trace["token_text"].transpose("batch", "token").values.ravel().tolist()
        found, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        for key, at in zip(found.tolist(), first.tolist(), strict=True):
            if key >= 0 and key not in self._known:
                self._known[key] = _checked(self._function(text[at]), f"the token {text[at]!r}")
        names = np.array([self._known.get(key, "") for key in found.tolist()], dtype=object)[inverse].reshape(ids.shape)
        return {name: names == name for name in sorted({*names.ravel().tolist()} - {""})}


def _array(by: Any) -> Shaped[np.ndarray, " vocab"]:
    names = np.asarray(by)
    if names.ndim != 1:
        raise ValueError(
            "by= is None, 'role', 'text', a mapping of token ids, an array (vocab,) of names or a function of text; got"
            f" {type(by).__name__} with {names.ndim} dimension(s)"
        )
    return names


def _checked_id(key: Any) -> int:
    if isinstance(key, bool) or not isinstance(key, int | np.integer) or key < 0:
        raise ValueError(f"by= maps token ids, whole numbers from 0 on; got {key!r}")
    return int(key)


def _checked(name: Any, of: str) -> str:
    if name is None:
        return ""
    if not isinstance(name, str) or name == ALL:
        raise ValueError(f"the class of {of} is a string other than {ALL!r}, or None for no class; got {name!r}")
    return str(name)
