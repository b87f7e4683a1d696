"""Several devices: a filled module is handed to accelerate, whose hooks bring each layer's weights where it runs."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mamba_probe.trace.contract import unknown_name

__all__ = ["dispatch", "refuse"]

_NAMED = ("auto", "balanced", "balanced_low_0", "sequential")


def refuse(device_map: str | Mapping[str, Any] | None, device: Any) -> None:
    """Refuse a device map that cannot be followed, before weights are read.

    Source: ours.

    Args:
        device_map: "auto", "balanced", "balanced_low_0", "sequential", or module name -> device; None is none.
        device: what `load` was given beside it.

    Raises:
        ValueError: another value, "disk", a device beside it, or accelerate is not installed.

    Example:
        >>> refuse({"": "disk"}, "cpu")
        Traceback (most recent call last):
        ...
        ValueError: device_map may not name 'disk': weights are read into memory; offload to 'cpu'.
    """
    if device_map is None:
        return
    if (isinstance(device_map, str) and device_map not in _NAMED) or not isinstance(device_map, str | Mapping):
        names = ", ".join(map(repr, _NAMED))
        raise ValueError(f"device_map must be one of {names} or a dictionary of devices, got {device_map!r}.")
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise ValueError("device_map may not name 'disk': weights are read into memory; offload to 'cpu'.")
    if str(device) != "cpu":
        raise ValueError(f"give device_map or device, not both; got device={device!r}.")
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ValueError("device_map needs accelerate, which is not installed: pip install accelerate.") from error


def dispatch(module: nn.Module, device_map: str | Mapping[str, Any]) -> nn.Module:
    """Spread a module over devices with accelerate.

    Source: huggingface/accelerate, `dispatch_model`, `get_balanced_memory` and `infer_auto_device_map`.

    Args:
        module: filled, on the CPU.
        device_map: as checked by `refuse`.

    Raises:
        ValueError: the model does not fit in memory, or accelerate refuses the map.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: list[str] = sorted(getattr(module, "_no_split_modules", None) or ())
    if not isinstance(device_map, str):
        known = {name for name, _ in (*module.named_modules(), *module.named_parameters())}
        unknown = [name for name in device_map if name not in known]
        if unknown:
            raise unknown_name("module of device_map", unknown[0], sorted(known))
        try:
            return dispatch_model(module, device_map=dict(device_map))
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"device_map={dict(device_map)!r} cannot be followed: {error}") from error
    memory = None
    if device_map != "sequential":
        low = device_map == "balanced_low_0"
        memory = get_balanced_memory(module, no_split_module_classes=whole, low_zero=low)
    places = infer_auto_device_map(module, max_memory=memory, no_split_module_classes=whole)
    if "disk" in places.values():
        raise ValueError(f"device_map={device_map!r}: the model does not fit in memory, {places} would be needed.")
    return dispatch_model(module, device_map=places)
