"""Labelled results: every variable says what it is and in which unit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["Entry", "described", "refuse"]

Entry = tuple[tuple[str, ...], np.ndarray, str, str]
"""Dimensions, values, long name, units."""


def described(entries: Mapping[str, Entry], coords: Mapping[str, Any], attrs: Mapping[str, str]) -> xr.Dataset:
    """A Dataset whose variables carry long_name and units.

    >>> described({"gain": (("layer",), np.ones(1), "selectivity gain", "1")}, {"layer": [3]}, {}).gain.long_name
    'selectivity gain'
    """
    variables = {
        name: (dims, values, {"long_name": text, "units": units})
        for name, (dims, values, text, units) in entries.items()
    }
    return xr.Dataset(variables, coords=dict(coords), attrs=dict(attrs))


def refuse(analysis: str, **arguments: object) -> None:
    """Refuse arguments of the common signature that an analysis does not use, rather than ignore them.

    Raises:
        ValueError: one of them is not None.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"{analysis}.measure does not use {', '.join(given)}; leave it None (its null is computed from the trace)"
        )
