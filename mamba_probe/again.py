"""Loading a recorded model once more, from where its trace says: only what ships here, unless the user says so.

A run's folder may be a stranger's. What its trace names could be any folder of this machine, or a hub id.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mamba_probe.loading import load
from mamba_probe.reference import load_beside, ships

__all__ = ["lacks", "load_again"]

_KINDS = {"source": (str,), "revision": (str, type(None)), "dtype": (str, type(None)), "vocab": (int,)}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def lacks(attrs: Mapping[str, Any], allowed: bool) -> str:
    """What is missing to load the model of a trace again, in words; "" where nothing is.

    Args:
        attrs: of the trace.
        allowed: whether the user said that folders and hub ids which the trace names may be loaded.

    Raises:
        ValueError: the trace's record of where it was loaded from is damaged.

    Example:
        >>> lacks({"loaded_from": '{"source": "zoo:mqar-mamba1"}'}, False)
        ''
        >>> lacks({"loaded_from": '{"source": "some/model"}'}, False)[:45]
        "the model, which the run says is 'some/model'"
    """
    given = _recorded(attrs)
    if not given:
        return "the model, which was not loaded by name or path: analyse it in the process that recorded it"
    if allowed or ships(given["source"]):
        return ""
    return (
        f"the model, which the run says is {given['source']!r}: it is loaded from there only if you say so,"
        " with --load-models (Run.open(directory, load_models=True))"
    )


def load_again(attrs: Mapping[str, Any], allowed: bool) -> nn.Module:
    """Load the model of a trace, as it was loaded.

    Raises:
        ValueError: as `lacks`, or it cannot be loaded from there.
    """
    lack = lacks(attrs, allowed)
    if lack:
        raise ValueError(f"{attrs.get('model')} cannot be loaded again: this needs {lack}")
    given = _recorded(attrs)
    if "vocab" in given:
        return load_beside(given["source"], given["vocab"])
    dtype = given.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"the run says its model was loaded as {dtype!r}; one of {', '.join(_DTYPES)} is needed")
    return load(given["source"], revision=given.get("revision"), dtype=None if dtype is None else getattr(torch, dtype))


def _recorded(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Where a trace says its model came from; nothing of one that was not loaded by name or path."""
    text = attrs.get("loaded_from") or "{}"
    try:
        given = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the run's record of its model, loaded_from, is no JSON: {error}") from error
    right = isinstance(given, dict) and all(isinstance(given[key], _KINDS.get(key, ())) for key in given)
    if not right or (given and "source" not in given):
        raise ValueError(f"the run's record of its model, loaded_from, is damaged: {text[:200]!r}")
    return given
