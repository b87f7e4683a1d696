"""Which tokens belong to which class: by place, by text, by a task's role, or by labels of the user's."""

import unicodedata

import numpy as np
import xarray as xr
from jaxtyping import Bool, Shaped

from mamba_probe.trace import require

__all__ = ["FIRST", "classes", "masks"]

FIRST = "first token"
"""The first valid token of a row: BOS where the tokenizer puts one."""
SPACES = " \u0120\u2581"
"""How tokenizers write the space before a word: as it is, as GPT-2 does, as SentencePiece does."""
NEWLINES = ("\n", "\u010a", "<0x0A>")
"""How they write a line's end."""


def classes(trace: xr.Dataset, labels: Shaped[np.ndarray, "batch token"] | None = None) -> xr.DataArray:
    """Masks of token classes, which may overlap.

    "first token" always; "newline" and "punctuation" where the trace has `token_text`; "role: key" and so on where it
    is a task's; and one for each of `labels`. Classes that no row has beside other tokens are left out. Source: the
    boundary tokens of arXiv 2606.00930; the others ours.

    Args:
        trace: with `valid`.
        labels: (batch, token) of strings, "" for none.

    Raises:
        ValueError: labels of another shape, or no strings.

    >>> trace = xr.Dataset(coords={"valid": (("batch", "token"), [[False, True, True]]),
    ...     "token_text": (("batch", "token"), [["", "Hi", "!"]])}, attrs={"schema_version": 1, "family": "mamba"})
    >>> found = classes(trace)
    >>> found["class"].values.tolist(), found.values.astype(int).tolist()
    (['first token', 'punctuation'], [[[0, 1, 0]], [[0, 0, 1]]])
    """
    valid = _valid(trace)
    found = {name: mask & valid for name, mask in (masks(trace) | _by_label(labels, valid)).items()}
    kept = {
        name: mask for name, mask in found.items() if np.any(mask.any(axis=1) & (mask.sum(axis=1) < valid.sum(axis=1)))
    }
    return xr.DataArray(
        np.stack([*kept.values()]) if kept else np.zeros((0, *valid.shape), bool),
        {"class": np.array(list(kept), dtype=object)}, ("class", "batch", "token"),
    )  # fmt: skip


def masks(trace: xr.Dataset) -> dict[str, Bool[np.ndarray, "batch token"]]:
    """Every class that the trace itself knows, those too that no row has, padding not taken out.

    Args:
        trace: with `valid`.
    """
    return {FIRST: np.cumsum(_valid(trace), axis=1) == 1} | _by_text(trace) | _by_role(trace)


def _valid(trace: xr.Dataset) -> Bool[np.ndarray, "batch token"]:
    require(trace, "valid")
    return trace["valid"].transpose("batch", "token").values.astype(bool)


def _by_text(trace: xr.Dataset) -> dict[str, np.ndarray]:
    if "token_text" not in trace.coords:
        return {}
    text = trace["token_text"].transpose("batch", "token").values
    return {"newline": np.vectorize(_is_newline, otypes=[bool])(text),
            "punctuation": np.vectorize(_is_punctuation, otypes=[bool])(text)}  # fmt: skip


def _is_newline(piece: str) -> bool:
    return any(end in piece for end in NEWLINES)


def _is_punctuation(piece: str) -> bool:
    bare = piece.strip(SPACES)
    return bool(bare) and all(unicodedata.category(sign).startswith("P") for sign in bare)


def _by_role(trace: xr.Dataset) -> dict[str, np.ndarray]:
    if "role" not in trace.coords:
        return {}
    role = trace["role"].transpose("batch", "token").values
    return {f"role: {name}": role == name for name in sorted(set(role.ravel().tolist()) - {""})}


def _by_label(labels: np.ndarray | None, valid: np.ndarray) -> dict[str, np.ndarray]:
    if labels is None:
        return {}
    given = np.asarray(labels)
    if given.shape != valid.shape or not all(isinstance(label, str) for label in given.ravel().tolist()):
        raise ValueError(
            f"labels needs strings (batch, token) = {valid.shape}, empty for no class; got {given.dtype} {given.shape}"
        )
    return {name: given == name for name in sorted(set(given.ravel().tolist()) - {""})}
