"""Adapters: one a mixer family. They read a mixer's weights by our names and take over its scan."""

from inspect import isabstract
from typing import TypeVar

from torch import nn

from mamba_probe.mixers.bamba import BambaAdapter, GraniteMoeHybridAdapter, NemotronHAdapter, Zamba2Adapter
from mamba_probe.mixers.base import MixerAdapter, Sizes
from mamba_probe.mixers.caduceus import BiMambaAdapter, RCPSAdapter
from mamba_probe.mixers.falcon_h1 import FalconH1Adapter
from mamba_probe.mixers.falcon_mamba import FalconMambaAdapter
from mamba_probe.mixers.fla import FlaMamba2Adapter, FlaMambaAdapter
from mamba_probe.mixers.jamba import JambaAdapter
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.mamba2 import Mamba2Adapter
from mamba_probe.mixers.mamba_ssm import MambaSsm2Adapter, MambaSsmAdapter
from mamba_probe.mixers.own import OwnMamba2Adapter, OwnMambaAdapter, S4DAdapter
from mamba_probe.mixers.s4d_layer import S4DLayerAdapter
from mamba_probe.mixers.tap import Call, Listener, Tap
from mamba_probe.mixers.vim import VimAdapter
from mamba_probe.mixers.zamba import ZambaAdapter

__all__ = ["ADAPTERS", "Call", "Listener", "MixerAdapter", "Sizes", "Tap", "find_mixers", "register"]

ADAPTERS: tuple[type[MixerAdapter], ...] = (
    MambaAdapter, FalconMambaAdapter, JambaAdapter, ZambaAdapter,
    Mamba2Adapter, BambaAdapter, Zamba2Adapter, GraniteMoeHybridAdapter, NemotronHAdapter, FalconH1Adapter,
    OwnMambaAdapter, OwnMamba2Adapter, S4DAdapter, S4DLayerAdapter,
    RCPSAdapter, BiMambaAdapter, VimAdapter,
    MambaSsmAdapter, MambaSsm2Adapter, FlaMambaAdapter, FlaMamba2Adapter,
)  # fmt: skip

_REGISTERED: list[type[MixerAdapter]] = []

REFUSED = ("Mamba2Simple", "LogLinearMamba2")
"""Mixers of mamba_ssm and fla that are like supported ones, and are refused by name, as is any Mamba3."""


Known = TypeVar("Known", bound=type[MixerAdapter])


def register(adapter: Known) -> Known:
    """Have every probe of this process know one more family of mixers; as a decorator, of its adapter.

    The class that an adapter names belongs to it: registered again, as by a notebook's cell, the newer one counts.

    Args:
        adapter: a class with everything that `MixerAdapter` leaves open; docs/adding-a-family.md makes one.

    Raises:
        ValueError: no such class, one that leaves something open, or a mixer that the package itself knows.

    >>> register(MambaAdapter)
    Traceback (most recent call last):
    ...
    ValueError: MambaMixer of transformers.models.mamba.modeling_mamba is read by MambaAdapter of this package already
    """
    if not (isinstance(adapter, type) and issubclass(adapter, MixerAdapter)):
        raise ValueError(f"register takes a subclass of mamba_probe.mixers.MixerAdapter; got {adapter!r}")
    missing = [name for name in ("class_path", "family") if not hasattr(adapter, name)]
    if isabstract(adapter) or missing:
        names = ", ".join(sorted({*missing, *adapter.__abstractmethods__}))
        raise ValueError(f"{adapter.__name__} leaves open what every adapter has: {names}")
    for known in ADAPTERS:
        if known.class_path == adapter.class_path:
            module, name = known.class_path
            raise ValueError(f"{name} of {module} is read by {known.__name__} of this package already")
    _REGISTERED[:] = [known for known in _REGISTERED if known.class_path != adapter.class_path] + [adapter]
    return adapter


def find_mixers(model: nn.Module) -> list[MixerAdapter]:
    """The mixers of `model`, in order; they are found by class, never by configuration.

    Raises:
        ValueError: no state-space layer at all, or one of a family that is not supported (named).
    """
    found, refused, inside = [], set(), set()
    known = (*ADAPTERS, *_REGISTERED)
    for name, module in model.named_modules():
        if module in inside:  # of a mixer that was found
            continue
        adapter = next((adapter for adapter in known if adapter.matches(module)), None)
        kind = type(module).__name__
        if adapter is not None:
            found.append(adapter(module, name, len(found)))
            inside |= set(module.modules())
        elif "mamba3" in kind.lower() or "A_log" in module._parameters or kind in REFUSED:
            refused.add(f"{kind} ({type(module).__module__})")
    paths = [adapter.class_path for adapter in known]
    supported = ", ".join(f"{name} of {module.split('.models.')[0]}" for module, name in paths)
    if refused:
        raise ValueError(f"unsupported mixer family: {', '.join(sorted(refused))}. Supported: {supported}.")
    if not found:
        raise ValueError(f"{type(model).__name__} has no state-space layer to probe. Supported: {supported}.")
    return found
