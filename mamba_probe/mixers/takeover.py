"""Rebinding one instance's forward with some of its module's functions replaced.

The forward of a mixer calls module-level functions (scan, step, convolution). We copy that forward, with a copy of its
module's globals in which only those names differ, and set it on the one instance: the library's own mask, cache, norm
and multiplier code runs unchanged, other models never notice, and removing the attribute restores the instance.
"""

from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

__all__ = ["Seen", "called_names", "innermost", "rebind"]

RELEASES = {"transformers": ">= 5.16", "mamba_ssm": ">= 2.2", "fla": ">= 0.6"}
"""The releases whose mixers we know, by package."""


def rebind(function: FunctionType, replacements: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """A copy of `function` that finds `replacements` where it would find the globals of these names.

    Decorators are followed: a function held in a closure is rebound too when it comes from the module `function` was
    written in (`__wrapped__` tells which that is).

    Raises:
        ValueError: a name that the function does not call: this release of the library is not one we know.
    """
    missing = sorted(set(replacements) - called_names(function))
    if missing:
        package, name = function.__module__.partition(".")[0], f"{function.__module__}.{function.__qualname__}"
        if package not in RELEASES:
            raise ValueError(
                f"{name} does not call a function {', '.join(missing)} by its plain name: put the recurrence into a"
                " function of that module, call it as such (not through `self` or an attribute), and name it in"
                " `replacements`"
            )
        raise ValueError(
            f"{name} does not call {', '.join(missing)}: this release of {package} is not supported"
            f" ({RELEASES[package]} is)"
        )
    home = innermost(function).__globals__
    changed = {**home, **replacements}
    changed.pop("__name__", None)  # by it torch.compile would look for the values of its guards in the library's module
    return _copy(function, home, changed)


class Seen:
    """A module as its own forward sees it while it is probed: some attributes and methods are others, the rest is its.

    What a forward reaches through `self`, methods and options, is replaced here, and nothing of it on the module.

    >>> from types import SimpleNamespace
    >>> seen = Seen(SimpleNamespace(fast=True, width=3), {"fast": False}, {"doubled": lambda self: 2 * self.width})
    >>> seen.fast, seen.width, seen.doubled()
    (False, 3, 6)
    """

    def __init__(self, module: Any, options: Mapping[str, Any], methods: Mapping[str, Callable[..., Any]]):
        bound = {name: MethodType(method, self) for name, method in methods.items()}
        self.__dict__.update({"module": module} | dict(options) | bound)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["module"], name, value)


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
