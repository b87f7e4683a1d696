"""Fields of foreign configs: known or unknown, representable or not, renamed to transformers' names."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from mamba_probe.blocks import MOST

__all__ = ["MOST_LAYERS", "refuse_counts", "refuse_unknown", "refuse_values", "rename", "whole", "with_sizes"]

MOST_LAYERS = 1024
"""Layers that a config may name beyond the tensors it has: a module is built for each before shapes are compared."""
_WIDTHS = ("d_model", "hidden_size", "dim", "n_embd")
_DEPTHS = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")
_EMBEDDING = re.compile(r"(^|\.)(embeddings?|embed_tokens|word_embeddings)\.weight$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_COUNT = re.compile(r"(^|_)(layers?|blocks|depth)$")


def refuse_counts(config: Mapping[str, Any], n_tensors: int, where: str) -> None:
    """Refuse a number of layers or blocks that the weights cannot be those of, before a module is built for each.

    Source: ours. Every layer has a tensor; a bare mixer's config may name the few layers of the model it is from.

    Raises:
        ValueError: a field ending in layer, layers, blocks or depth, in the config or in an object of it, exceeds both
            the number of tensors and `MOST_LAYERS`.

    Example:
        >>> refuse_counts({"num_hidden_layers": 10**9}, 12, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: config.json: num_hidden_layers=1000000000, but the weights are 12 tensors.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            refuse_counts(value, n_tensors, where)
        elif _COUNT.search(str(name)) and isinstance(value, int) and value > max(n_tensors, MOST_LAYERS):
            raise ValueError(f"{where}: config.json: {name}={value}, but the weights are {n_tensors} tensors.")


def with_sizes(error: ValueError, config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> ValueError:
    """The error of weights that do not fit, led by the width and the number of layers, where config and file differ.

    Source: ours.

    Example:
        >>> print(with_sizes(ValueError("no fit"), {"d_model": 8}, {"embedding.weight": Tensor(5, 4)}, "here"))
        here: config.json has d_model 8, the embedding in the file has 4.
        no fit
    """
    width = next(
        (tensor.shape[-1] for name, tensor in weights.items() if tensor.shape and _EMBEDDING.search(name)), None
    )
    layers = {found[1] for name in weights if (found := _LAYER.search(name))}
    said = [
        f"{where}: config.json has {name} {value}, the embedding in the file has {width}."
        for name, value in config.items()
        if name in _WIDTHS and width not in (None, value)
    ] + [
        f"{where}: config.json has {name} {value}, the file has {len(layers)} layers."
        for name, value in config.items()
        if name in _DEPTHS and layers and value != len(layers)
    ]
    return ValueError("\n".join([*said, str(error)])) if said else error


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], where: str, prefix: str = "") -> None:
    """Refuse a field that the format does not have.

    Source: ours.

    Args:
        given: the config.
        known: names of all its fields.
        where: the checkpoint's place, for error messages.
        prefix: what stands before the names in messages, e.g. "ssm_cfg.".

    Raises:
        ValueError: a field is unknown (the nearest is named), or `given` is no dictionary.

    Example:
        >>> refuse_unknown({"d_staet": 4}, ["d_state"], "here")
        Traceback (most recent call last):
        ...
        ValueError: here: config.json: d_staet is unknown; did you mean d_state?
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: config.json: {prefix.rstrip('.')} must be a dictionary, got {given!r}.")
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {sorted(known)}."
            raise ValueError(f"{where}: config.json: {prefix}{name} is unknown{hint}")


def refuse_values(
    given: Mapping[str, Any],
    only: Mapping[str, tuple],
    where: str,
    prefix: str = "",
    why: str = "transformers' class cannot represent it",
) -> None:
    """Refuse a field whose value no class that is built here can represent.

    Source: ours.

    Args:
        given: the config.
        only: field -> the values that can be represented.
        where, prefix: as in `refuse_unknown`.
        why: the reason, for the message.

    Raises:
        ValueError: a field has another value.

    Example:
        >>> refuse_values({"mup": True}, {"mup": (False,)}, "here", why="no class has it")
        Traceback (most recent call last):
        ...
        ValueError: here: config.json: mup=True is not supported, only False is: no class has it.
    """
    for name, allowed in only.items():
        if name in given and given[name] not in allowed:
            raise ValueError(
                f"{where}: config.json: {prefix}{name}={given[name]!r} is not supported, only {allowed[0]!r} is: {why}."
            )


def rename(given: Mapping[str, Any], table: Mapping[str, str], default: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `table` under their new names, the format's own defaults where they are absent.

    Source: ours.

    Example:
        >>> rename({"d_model": 8}, {"d_model": "hidden_size", "expand": "expand"}, {"expand": 2})
        {'hidden_size': 8, 'expand': 2}
    """
    filled = {**default, **given}
    return {target: filled[name] for name, target in table.items() if name in filled}


def whole(name: str, value: Any, where: str) -> int:
    """A whole number >= 1, and no larger than any size of a model is.

    Source: ours.

    Raises:
        ValueError: `value` is none, or above `MOST`.

    Example:
        >>> whole("d_model", 8, "here")
        8
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: config.json: {name} must be a whole number >= 1, got {value!r}.")
    if value > MOST:
        raise ValueError(f"{where}: config.json: {name} is at most {MOST}, got {value}.")
    return value
