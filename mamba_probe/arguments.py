"""Arguments of the public entries that are counts, indices, names or numbers: checked here, and nowhere else.

Readers of traces ask here too, and load no torch: its tensors are known by what they can do.
"""

import math
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np

__all__ = ["LARGEST", "array", "listed", "path_like", "real", "texts", "whole", "wholes"]

LARGEST = 2**63 - 1
"""Greatest whole number that torch and numpy both take."""


def whole(name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """A whole number, numpy's too; no bool, and no float that happens to be one.

    Raises:
        ValueError: naming the argument, what it may be, and what came.

    >>> whole("batch_size", np.int64(3), least=1)
    3
    >>> whole("seed", 0.5)
    Traceback (most recent call last):
    ...
    ValueError: seed is at least 0 and a whole number; got 0.5
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        span = f"at least {least}" if most == LARGEST else f"in {least} .. {most}"
        raise ValueError(f"{name} is {span} and a whole number; got {_shown(value)}")
    return int(value)


def wholes(name: str, values: Any) -> list[int]:
    """Whole numbers out of a list, a range, or an array of one axis, as they come; which there are is not asked here.

    Raises:
        ValueError: naming the argument and what came.

    >>> wholes("tokens", np.arange(2))
    [0, 1]
    >>> wholes("tokens", [0.5])
    Traceback (most recent call last):
    ...
    ValueError: tokens is a list of whole numbers; got [0.5]
    """
    given = array(name, values) if _is_tensor(values) else values
    found = listed(name, given, "whole numbers")
    if any(isinstance(each, bool | np.bool_) or not isinstance(each, int | np.integer) for each in found):
        raise ValueError(f"{name} is a list of whole numbers; got {_shown(values)}")
    return [whole(f"each of {name}", each, -LARGEST) for each in found]


def texts(name: str, values: Any) -> list[str]:
    """Names out of a list; a single one is none.

    Raises:
        ValueError: naming the argument and what came.

    >>> texts("variables", ["delta"])
    ['delta']
    >>> texts("variables", "delta")
    Traceback (most recent call last):
    ...
    ValueError: variables is a list of names; got 'delta': pass variables=['delta']
    """
    if isinstance(values, str):
        raise ValueError(f"{name} is a list of names; got {values!r}: pass {name}=[{values!r}]")
    found = listed(name, values, "names")
    if not found or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name} is a non-empty list of names; got {_shown(values)}")
    return [str(each) for each in found]


def listed(name: str, values: Any, of: str) -> list[Any]:
    """What a list, tuple, range or array holds; no text, mapping or single thing.

    Raises:
        ValueError: naming the argument and what came.

    >>> listed("edits", 3, "edits")
    Traceback (most recent call last):
    ...
    ValueError: edits is a list of edits; got 3
    """
    single = isinstance(values, str | bytes | Mapping | PathLike) or _is_tensor(values)
    if single or not isinstance(values, Iterable):
        raise ValueError(f"{name} is a list of {of}; got {_shown(values)}")
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"{name} is a list of {of}; got an array of shape {values.shape}")
    return list(values)


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> float:
    """A number within bounds, which belong to it.

    Raises:
        ValueError: naming the argument, what it may be, and what came.

    >>> real("tolerance", 1e-3, 0, 1)
    0.001
    """
    is_real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_real or math.isnan(value) or not low <= value <= high or (finite and math.isinf(value)):
        raise ValueError(f"{name} is a number in [{low:g}, {high:g}]; got {_shown(value)}")
    return float(value)


def array(name: str, value: Any) -> np.ndarray:
    """An array of real numbers, whole ones or truth values.

    Raises:
        ValueError: naming the argument and what came.

    >>> array("read_out", [[1, 2]]).shape
    (1, 2)
    """
    try:
        found = value.detach().cpu().numpy() if _is_tensor(value) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} is a rectangular array of numbers; got {type(value).__name__} ({error})") from error
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{name} is an array of real numbers; got {_shown(value)} of dtype {found.dtype}")
    return found


def path_like(name: str, value: Any) -> str | PathLike[str]:
    """A path, as text or as an object.

    Raises:
        ValueError: naming the argument and what came.

    >>> path_like("path", "run.zarr")
    'run.zarr'
    """
    if not isinstance(value, str | PathLike):
        raise ValueError(f"{name} is a path; got {_shown(value)}")
    return value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return f"{type(value).__name__} of shape {tuple(shape)}" if len(shape) else f"{value!r:.80}"
