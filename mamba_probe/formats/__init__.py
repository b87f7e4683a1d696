"""Checkpoint formats: one format a file, recognised by what config.json and the tensors' names say.

Each format has `NAME`, `matches(config, keys)` and `convert(config, weights, where)`; the last returns what `fill`s a
module, or refuses by name what no module here can hold.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor, nn

from mamba_probe.formats import (
    caduceus,
    codestral,
    fla,
    hf,
    mamba_minimal,
    mambapy,
    mixer,
    own,
    pretrained,
    s4d,
    state_spaces,
    vim,
    zoology,
)

__all__ = ["FORMATS", "WITHOUT_CONFIG", "Fillable", "Format", "recognise", "refuse_family"]


class Fillable(Protocol):
    """A module to build and its weights."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors that go into the module."""
        ...

    def fill(self, where: str) -> nn.Module:
        """Build the module from the weights, strictly."""
        ...


class Format(Protocol):
    """What a format's module offers."""

    @property
    def NAME(self) -> str:
        """What a loaded module's provenance calls the format."""
        ...

    def matches(self, config: Mapping[str, Any], keys: Collection[str]) -> bool:
        """Whether a checkpoint with this config and these tensor names is of this format."""
        ...

    def convert(self, config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Fillable:
        """The module to build and its weights under that module's names."""
        ...


WITHOUT_CONFIG: tuple[Format, ...] = (vim, caduceus, s4d)
"""Formats that the tensors' names alone tell."""

FORMATS: tuple[Format, ...] = (
    *WITHOUT_CONFIG, codestral, zoology, mambapy, mamba_minimal, state_spaces, own, fla, mixer, hf, pretrained,
)  # fmt: skip
"""Tried in this order: those that only names tell from another come before it."""

_KNOWN = ("mamba", "mamba2", own.NAME, caduceus.MODEL_TYPE, *pretrained.STEMS)
_SUPPORTED = (
    f"supported are model_type 'mamba', 'mamba2', {', '.join(map(repr, pretrained.STEMS))} (transformers), "
    "fla's 'mamba' and 'mamba2', original state-spaces checkpoints of Mamba1 and Mamba2, Mamba-Codestral, "
    "mamba-minimal, mamba.py, zoology, a bare MambaMixer, Mamba2Mixer or S4D, and 'mamba_probe' (our own blocks)"
)


def recognise(config: Mapping[str, Any] | None, keys: Collection[str], where: str) -> Format:
    """Choose the format of a checkpoint from its config and the names of its tensors.

    Source: ours.

    Args:
        config: config.json (or params.json) as a dictionary, None if there is none.
        keys: names of the tensors in the weight files.
        where: the checkpoint's place, for error messages.

    Raises:
        FileNotFoundError: there is no config, and the names are of no format that needs none.
        ValueError: no supported format has this config and these names; an unsupported family is named.

    Example:
        >>> recognise({"model_type": "mamba"}, ["backbone.embeddings.weight"], "here").NAME
        'transformers'
        >>> recognise({"model_type": "gpt2"}, [], "here")
        Traceback (most recent call last):
        ...
        ValueError: here: model_type 'gpt2' is not known to have a Mamba SSM layer; supported are ...
    """
    refuse_family(config or {}, where)
    for candidate in WITHOUT_CONFIG if config is None else FORMATS:
        if candidate.matches(config or {}, keys):
            return candidate
    start = f"the weights start with {sorted(keys)[:5]}"
    if config is None:
        raise FileNotFoundError(
            f"{where} has no config.json, and {start}: only a standalone S4D is told by its tensors alone. Put the "
            "checkpoint's config.json (params.json, or the fields of the class that made it) beside the weights."
        )
    raise ValueError(
        f"{where}: config.json has neither `model_type` (transformers) nor `d_model`, `n_layer` and `vocab_size` "
        f"(state-spaces): it has {sorted(config)}, and {start}; {_SUPPORTED}."
    )


def refuse_family(config: Mapping[str, Any], where: str) -> None:
    """Refuse a family that no module here holds by its config alone, before weights are read.

    Source: ours.

    Raises:
        ValueError: `model_type` names an unsupported family, or the weights are quantised.

    Example:
        >>> refuse_family({"model_type": "gpt2"}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: model_type 'gpt2' is not known to have a Mamba SSM layer; supported are ...
    """
    if config.get("model_type", "mamba") not in _KNOWN:
        raise ValueError(f"{where}: {_refusal(config)}; {_SUPPORTED}.")
    if config.get("model_type") == caduceus.MODEL_TYPE:
        caduceus.convert(config, {}, where)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{where}: the weights are quantised (config.json has `quantization_config`), which load does not read. "
            "Load the model with transformers and attach to it, or give the checkpoint in floating point."
        )


def _refusal(config: Mapping[str, Any]) -> str:
    kind = config["model_type"]
    if str(kind).lower() == "mamba3":
        return f"model_type {kind!r} (Mamba-3) has another recurrence, which is not supported"
    code = " (its code, named by `auto_map`, is never run)" if "auto_map" in config else ""
    near = get_close_matches(str(kind), _KNOWN, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"model_type {kind!r}{code} is not known to have a Mamba SSM layer{hint}"
