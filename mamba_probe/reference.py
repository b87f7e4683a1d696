"""What a model's card says, and the reference that a report puts beside it: by default the one that the card names."""

from pathlib import Path
from typing import Any

from torch import nn

from mamba_probe import constructions, zoo
from mamba_probe.formats.files import read_json
from mamba_probe.loading import load
from mamba_probe.trace.contract import unknown_name
from mamba_probe.untrusted import inside

__all__ = ["NONE", "card_train_length", "describe", "is_closed_form", "load_beside", "named", "ships"]

NONE = "none"
"""What asks for no reference."""
CLOSED = "construction:"
ZOO = "zoo:"
KINDS = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "s4d": "S4D"}
LARGEST = 512
"""Token ids that a closed form is built for: with one state a key, more would be large and are tested nowhere."""


def ships(name: Any) -> bool:
    """Whether a model comes with the package, so that a file from anyone may name it: zoo:NAME or construction:KIND.

    Example:
        >>> ships("zoo:mqar-mamba1"), ships("owner/name")
        (True, False)
    """
    return isinstance(name, str) and name.startswith((CLOSED, ZOO))


def named(source: str) -> str | None:
    """Return what a checkpoint's card names as its reference; None without a card, or without a name in it.

    Raises:
        ValueError: the card names a folder or a hub id, which is read only if the user names it.

    Example:
        >>> named("zoo:mqar-mamba1") is None
        True
    """
    name = _card(source).get("beside")
    if name is not None and name != NONE and not ships(name):
        raise ValueError(
            f"the card of {source} names {name!r} as its reference, which does not ship with the package: pass"
            f" --beside {name} if you mean it, or --beside {NONE}"
        )
    return name


def load_beside(name: str, vocab: int) -> nn.Module:
    """Return a reference.

    Arguments:
        name: "construction:KIND", with KIND one of mamba1, mamba2 and s4d: the closed form of associative recall
            (`mamba_probe.constructions.mqar`) with `vocab` token ids; or what `mamba_probe.load` takes.
        vocab: token ids of the model that it is put beside.

    Raises:
        ValueError: an unknown KIND, or more token ids than a closed form is built for.

    Example:
        >>> load_beside("construction:mamba2", 16).config.vocab_size
        16
    """
    if not name.startswith(CLOSED):
        return load(name)
    kind = name.removeprefix(CLOSED)
    if kind not in KINDS:
        raise unknown_name("construction", kind, tuple(KINDS))
    if vocab > LARGEST:
        raise ValueError(
            f"{name} is built for at most {LARGEST} token ids; the model has {vocab}: pass --beside {NONE}"
        )
    model: Any = constructions.mqar(kind, vocab // 2, vocab // 2).model
    model._mamba_probe_source = {"source": name, "vocab": vocab}
    return model


def is_closed_form(name: str, given: bool = False) -> bool:
    """Whether a reference's weights were written down, as far as its name and card say; see `describe`."""
    return name.startswith(CLOSED) or "construction" in _shipped_card(name, given)


def describe(name: str, given: bool = False) -> str:
    """Return what a reference is, in a sentence; nothing where no card says.

    Arguments:
        name: as in `load_beside`.
        given: whether the user named it in this process. A stored run may name any folder, and only the card of what
            ships is read then.

    Example:
        >>> describe("construction:s4d")
        'A one-layer S4D language model that solves the task. Its weights are written down in closed form, not trained.'
    """
    kind = KINDS.get(name.removeprefix(CLOSED)) if name.startswith(CLOSED) else None
    if kind is not None:
        what = f"A one-layer {kind} language model that solves the task."
        return f"{what} Its weights are written down in closed form, not trained."
    return str(_shipped_card(name, given).get("what", ""))


def _shipped_card(name: str, given: bool) -> dict[str, Any]:
    return _card(name) if given or name.startswith(ZOO) else {}


def card_train_length(source: str) -> int | None:
    """Return the longest rows that a checkpoint was trained on, where its card says that it was trained; else None.

    Example:
        >>> card_train_length("zoo:trained-keep-mamba1-64"), card_train_length("zoo:mqar-mamba1")
        (64, None)
    """
    card = _card(source)
    return int(card["task"]["length"]) if "config" in card else None


def _card(source: str) -> dict[str, Any]:
    folder = zoo.path(source.removeprefix(ZOO)) if source.startswith(ZOO) else Path(source)
    path = folder / "card.json"
    return read_json(inside(path, folder)) if path.is_file() else {}
