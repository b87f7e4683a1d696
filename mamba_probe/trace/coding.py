"""The one codec of our stores, Zarr and netCDF, and the seal by which a changed header is told.

Both stores choke on None, bool and dict attributes, so every attribute is written as JSON; strings are stored with
variable length and come back as objects; complex numbers are real pairs. Every chunk carries a checksum (CRC-32C in
Zarr, Fletcher-32 in netCDF), and the seal is the SHA-256 of what the chunks do not hold: in Zarr all metadata, in
netCDF names, dimensions, shapes, dtypes, attributes and the values of what has no checksum there.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["NARROWED", "PAIR", "SEAL", "check_seal", "decoded", "encoded", "header_of", "jsoned", "seal_of"]

PAIR = "real_imag"
"""Last dimension of a complex variable in a store: its real and its imaginary part."""
SEAL = "header_sha256"
"""The attribute of a store that holds its seal."""
NARROWED = "narrowed_to"
"""The attribute of a variable that was stored in a narrower dtype: which; it is widened when it is read."""


def encoded(dataset: xr.Dataset) -> xr.Dataset:
    """Attributes as JSON, strings as variable-length objects, complex as real pairs, no encoding left over.

    Raises:
        ValueError: an attribute that JSON cannot hold.
    """
    coded = dataset.copy()
    coded.attrs = jsoned({name: value for name, value in dataset.attrs.items() if name != SEAL})
    for name, variable in coded.variables.items():
        if variable.dtype.kind in "OUT":
            coded[name] = (variable.dims, variable.values.astype(object), variable.attrs)
        if variable.dtype.kind == "c":
            data: Any = variable.data
            pairs = np.stack([data.real, data.imag], axis=-1)
            coded[name] = ((*variable.dims, PAIR), pairs, variable.attrs)
        coded[name].attrs = jsoned(variable.attrs)
    return coded.drop_encoding()


def jsoned(attrs: Mapping[Any, Any]) -> dict[str, str]:
    """Attributes as JSON.

    Raises:
        ValueError: one that JSON cannot hold.
    """
    try:
        return {name: json.dumps(value) for name, value in attrs.items()}
    except TypeError as error:
        raise ValueError(
            f"an attribute cannot be stored as JSON ({error}); attributes: {sorted(map(str, attrs))}"
        ) from error


def decoded(coded: xr.Dataset) -> xr.Dataset:
    """What `encoded` took; coordinates are read, the rest stays lazy."""
    dataset = coded.assign_coords({name: coord.load() for name, coord in coded.coords.items()})
    dataset.attrs = {name: json.loads(value) for name, value in coded.attrs.items()}
    for name, variable in dataset.variables.items():
        attrs = {key: json.loads(value) for key, value in variable.attrs.items()}
        if variable.dtype.kind in "TOU":
            dataset[name] = (variable.dims, np.asarray(variable.values, dtype=object), attrs)
        if NARROWED in attrs:
            stored: Any = variable.data
            dataset[name] = (variable.dims, stored.astype(np.float32), attrs)
        if PAIR in variable.dims:
            data: Any = variable.data
            pairs = data.rechunk({-1: 2})
            dtype = np.result_type(pairs.dtype, np.complex64)
            joined = pairs.map_blocks(_joined, dtype, drop_axis=-1, dtype=dtype)
            dataset[name] = (variable.dims[:-1], joined, attrs)
        dataset[name].attrs = attrs
    return dataset


def _joined(pairs: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(pairs).view(dtype)[..., 0]


def header_of(coded: xr.Dataset) -> list[Any]:
    """What an encoded Dataset holds beside its values."""
    variables = {
        str(name): [[str(dim) for dim in variable.dims], list(variable.shape), str(variable.dtype), variable.attrs]
        for name, variable in coded.variables.items()
    }
    attrs = {name: value for name, value in coded.attrs.items() if name != SEAL}
    return [variables, sorted(map(str, coded.coords)), attrs]


def seal_of(header: Any) -> str:
    """The SHA-256 of a header, which JSON can hold."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def check_seal(seal: str | None, header: Any, where: Any) -> None:
    """Check that a header is the one that was written; a store from before there were seals has none.

    Raises:
        ValueError: it is another.
    """
    if seal is not None and seal != seal_of(header):
        raise ValueError(
            f"{where}: its header (names, dimensions, shapes, attributes) is not the one that was written: a bit was"
            " flipped, or it was edited by hand. Restore it from a copy, or record it again"
        )
