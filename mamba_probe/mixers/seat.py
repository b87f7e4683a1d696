"""Where a module's forward sits: on the module, or inside what accelerate or nnsight put around it."""

from types import FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["clear", "seat", "seated"]


def seated(module: nn.Module) -> Any:
    """What runs in place of the forward of the module's class; None where nothing does.

    >>> linear = nn.Linear(2, 3)
    >>> seated(linear)
    >>> seat(linear, lambda self, given: given)
    >>> seated(linear).__name__, linear("given")
    ('<lambda>', 'given')
    >>> clear(linear)
    >>> seated(linear)
    """
    state = _nnsight(module)
    found = module.__dict__.get(_attribute(module)) if state is None else state.original
    function = getattr(found, "__func__", found)
    return None if function is type(module).forward else function


def seat(module: nn.Module, forward: FunctionType) -> None:
    """Have `forward` run in place of the forward of the module's class."""
    state = _nnsight(module)
    if state is None:
        setattr(module, _attribute(module), MethodType(forward, module))
    else:
        state.body = state.original = forward
        state.sourced, state.compiled = False, None  # `.source` is made again, of what runs now


def clear(module: nn.Module) -> None:
    """Have the forward of its class run again."""
    if _nnsight(module) is None and _attribute(module) == "forward":
        del module.forward
    else:
        seat(module, type(module).forward)  # type: ignore[arg-type]


def _attribute(module: nn.Module) -> str:
    """The attribute that holds a forward: accelerate calls `_old_forward` where it stands around it."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def _nnsight(module: nn.Module) -> Any:
    """What nnsight (0.8) knows of a module that it has wrapped, the forward that it calls among it; else None."""
    forward: Any = module.__dict__.get("forward")
    return forward.state if type(forward).__module__ == "nnsight.intervention.source" else None
