"""Launching a kernel: Triton is asked once which of a kernel's versions fits, and not again.

That question costs more time on the host than a short sequence takes on the device: with fifty arguments, tens of
microseconds a launch.
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["blocks", "fusible", "listed", "padded", "slots", "start"]

LIMIT = 4096
"""Versions remembered; then all are forgotten, and asked for again."""

PLAIN = (int, float, bool, tuple, type(None))
"""Classes of arguments that are no tensors."""

_chosen: dict[Hashable, Any] = {}
_captured: list[Tensor] = []
"""What CUDA graphs read."""


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover n; Triton's own `cdiv` costs microseconds a call on the host.

    >>> blocks(9, 4)
    3
    """
    return -(-n // size)


def padded(n: int) -> int:
    """The least power of two from n on.

    >>> padded(9)
    16
    """
    return 1 << (n - 1).bit_length()


def fusible(n_state: int) -> bool:
    """Whether a product may be fused with the sum over states that it belongs to.

    Of an odd number of states a thread holds one of a row: the lanes of a row, which each find its sum, would round it
    differently, and which of them is written is undefined (a race, though of one value's last bit).

    >>> fusible(16), fusible(5)
    (True, False)
    """
    return n_state % 2 == 0 or n_state == 1


def start(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
    """Run `kernel` with all its arguments in order, constexpr ones too, and options such as num_warps.

    What Triton's choice depends on is a tensor's dtype and alignment, and the other arguments themselves.
    """
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*arguments, **options)
        return
    driver: Any = triton.runtime.driver.active
    places = [a if a.__class__ in PLAIN else a.data_ptr() for a in arguments]
    kinds = tuple([p if a is p else (a.dtype, p % 16) for a, p in zip(arguments, places, strict=True)])
    key = kernel.fn, driver.get_current_device(), kinds, tuple(options.items())
    version = _chosen.get(key)
    if version is None:
        if len(_chosen) >= LIMIT:
            _chosen.clear()
        _chosen[key] = kernel[grid](*arguments, **options)
    else:
        version[grid](*places)  # of a tensor, the driver would be asked where it lies


def slots(indices: Sequence[int] | None, size: int, device: torch.device) -> Tensor | None:
    """Where each token or head goes in the emission, -1 where nowhere; None where each goes to its own place."""
    return None if indices is None else _copied(tuple(indices), size, device)


def listed(indices: Sequence[int], device: torch.device) -> Tensor:
    """The indices themselves."""
    return _copied(tuple(indices), None, device)


def _copied(indices: tuple[int, ...], size: int | None, device: torch.device) -> Tensor:
    """A copy that waits for nothing on a CUDA device, and that a CUDA graph may capture: this reads the page-locked
    memory again with every replay, which is why that is kept."""
    if device.type != "cuda":
        return _made(indices, size)
    made = _pinned(indices, size)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(made)
    return made.to(device, non_blocking=True)


def _made(indices: tuple[int, ...], size: int | None) -> Tensor:
    numbers = torch.tensor(indices, dtype=torch.int32)
    if size is None:
        return numbers
    slots = torch.full((size,), -1, dtype=torch.int32)
    slots[numbers] = torch.arange(len(indices), dtype=torch.int32)
    return slots


@lru_cache(maxsize=256)
def _pinned(indices: tuple[int, ...], size: int | None) -> Tensor:
    return _made(indices, size).pin_memory()
