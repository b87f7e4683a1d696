"""Rebinding one instance's forward with some of its module's functions replaced.

The forward of a mixer calls module-level functions (scan, step, convolution). We copy that forward, with a copy of its
module's globals in which only those names differ, and set it on the one instance: the library's own mask, cache, norm
and multiplier code runs unchanged, other models never notice, and removing the attribute restores the instance.
"""

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

__all__ = ["called_names", "innermost", "rebind"]


def rebind(function: FunctionType, replacements: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """A copy of `function` that finds `replacements` where it would find the globals of these names.

    Decorators are followed: a function held in a closure is rebound too when it comes from the module `function` was
    written in (`__wrapped__` tells which that is).

    Raises:
        ValueError: a name that the function does not call: this release of the library is not one we know.
    """
    missing = sorted(set(replacements) - called_names(function))
    if missing:
        raise ValueError(
            f"{function.__module__}.{function.__qualname__} does not call {', '.join(missing)}: this release of"
            " transformers is not supported (>= 5.16 is)"
        )
    home = innermost(function).__globals__
    changed = {**home, **replacements}
    changed.pop("__name__", None)  # by it torch.compile would look for the values of its guards in the library's module
    return _copy(function, home, changed)


def called_names(function: FunctionType) -> set[str]:
    """Global names that the innermost wrapped function refers to."""
    return set(innermost(function).__code__.co_names)


def innermost(function: FunctionType) -> FunctionType:
    """The function under all decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__  # type: ignore[attr-defined]
    return function


def _copy(function: FunctionType, home: dict[str, Any], changed: dict[str, Any]) -> FunctionType:
    closure = tuple(CellType(_of_cell(cell, home, changed)) for cell in function.__closure__ or ()) or None
    own = changed if function.__globals__ is home else function.__globals__
    code = function.__code__.replace()  # its own: torch.compile keeps what it made of one for all that share it
    copy = FunctionType(code, own, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__doc__, copy.__module__ = function.__qualname__, function.__doc__, function.__module__
    return copy


def _of_cell(cell: CellType, home: dict[str, Any], changed: dict[str, Any]) -> Any:
    content = cell.cell_contents
    inner = content if isinstance(content, FunctionType) else None
    return _copy(inner, home, changed) if inner is not None and innermost(inner).__globals__ is home else content
