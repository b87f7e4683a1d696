"""Checkpoint formats: one format a file, recognised by what config.json and the tensors' names say.

Each format has `NAME`, `matches(config, keys)` and `convert(config, weights, where)`; the last returns a `Recipe`.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Protocol

from torch import Tensor

from mamba_probe.formats import hf, mixer, own, state_spaces
from mamba_probe.formats.recipe import Recipe

__all__ = ["FORMATS", "LATER", "Format", "recognise", "refuse_family"]


class Format(Protocol):
    """What a format's module offers."""

    @property
    def NAME(self) -> str:
        """What a loaded module's provenance calls the format."""
        ...

    def matches(self, config: Mapping[str, Any], keys: Collection[str]) -> bool:
        """Whether a checkpoint with this config and these tensor names is of this format."""
        ...

    def convert(self, config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
        """The module to build, on the meta device, and its weights under that module's names."""
        ...


FORMATS: tuple[Format, ...] = (state_spaces, own, mixer, hf)
"""Tried in this order; their conditions exclude each other."""

LATER = (
    "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1",
)  # fmt: skip
"""Values of `model_type` whose mixers are selective SSMs, but which are not supported yet."""

_SUPPORTED = (
    "supported are model_type 'mamba' and 'mamba2', original state-spaces checkpoints of Mamba1 and Mamba2, "
    "bare MambaMixer and Mamba2Mixer directories, and 'mamba_probe' (our own blocks)"
)


def recognise(config: Mapping[str, Any], keys: Collection[str], where: str) -> Format:
    """Choose the format of a checkpoint from its config and the names of its tensors.

    Source: ours.

    Args:
        config: config.json as a dictionary.
        keys: names of the tensors in the weight files.
        where: the checkpoint's place, for error messages.

    Raises:
        ValueError: no supported format has this config and these names; an unsupported family is named.

    Example:
        >>> recognise({"model_type": "mamba"}, ["backbone.embeddings.weight"], "here").NAME
        'transformers'
        >>> recognise({"model_type": "jamba"}, [], "here")
        Traceback (most recent call last):
        ...
        ValueError: here: model_type 'jamba' is not supported yet; supported are ...
    """
    refuse_family(config, where)
    for candidate in FORMATS:
        if candidate.matches(config, keys):
            return candidate
    raise ValueError(
        f"{where}: config.json has neither `model_type` (transformers) nor `d_model`, `n_layer` and `vocab_size` "
        f"(state-spaces): it has {sorted(config)}, and the weights start with {sorted(keys)[:5]}; {_SUPPORTED}."
    )


def refuse_family(config: Mapping[str, Any], where: str) -> None:
    """Refuse another family than Mamba and Mamba-2 by its config alone, before weights are read.

    Source: ours.

    Raises:
        ValueError: `model_type` names an unsupported family.

    Example:
        >>> refuse_family({"model_type": "gpt2"}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: model_type 'gpt2' is not known to have a Mamba SSM layer; supported are ...
    """
    if config.get("model_type", "mamba") not in ("mamba", "mamba2", own.NAME):
        raise ValueError(f"{where}: {_refusal(config)}; {_SUPPORTED}.")


def _refusal(config: Mapping[str, Any]) -> str:
    kind = config["model_type"]
    if kind in LATER:
        return f"model_type {kind!r} is not supported yet"
    if str(kind).lower() == "mamba3":
        return f"model_type {kind!r} (Mamba-3) has another recurrence, which is not supported"
    code = " (its code, named by `auto_map`, is never run)" if "auto_map" in config else ""
    near = get_close_matches(str(kind), ("mamba", "mamba2", own.NAME, *LATER), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"model_type {kind!r}{code} is not known to have a Mamba SSM layer{hint}"
