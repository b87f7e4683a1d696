"""Launching kernels by a plan, which is made once for all calls of one form.

A short sequence takes less time on the device than Python takes to work out what to launch. So that is done once: tile,
grid and sizes, and to ask Triton which version of a kernel fits, which alone is tens of microseconds with fifty
arguments. A call after that makes its tensors, takes their addresses, and launches.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton import knobs

__all__ = ["Plan", "Plans", "blocks", "fusible", "listed", "padded", "planned", "slots", "start"]

ALIGNED = 512
"""Bytes at whose multiples torch's own tensors begin on a CUDA device."""

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


class Launch(NamedTuple):
    """A kernel, and its arguments in order: tensors by `names`, None where there is none, then all others."""

    kernel: Any
    grid: tuple[int, int, int]
    names: tuple[str | None, ...]
    others: tuple[Any, ...]
    options: dict[str, Any]
    named: Callable[[Mapping[str | None, Any]], tuple[Any, ...]]

    def __call__(self, tensors: Mapping[str | None, Any]) -> Any:
        """By Triton's own way; answers the version of the kernel that it chose."""
        return self.kernel[self.grid](*self.named(tensors), *self.others, **self.options)


class Plan:
    """Launches, one after another, and the tensors to make for them: for all calls whose tensors have the same dtypes,
    shapes and strides, and which launch with the same sizes.

    What Triton's choice of a version depends on beside that is where tensors lie: at a multiple of 16 bytes or not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.scratch: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self.n_byte = 0
        self.parts: dict[str, tuple[str, int, int]] = {}
        self.versions: dict[Hashable, list[Any]] = {}

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A tensor for the launches to fill; its name."""
        self.made[name] = shape, dtype
        return name

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A tensor that none but the launches use, a piece of one for all of these; its name."""
        self.scratch[name] = self.n_byte, shape, dtype
        self.n_byte += blocks(math.prod(shape) * dtype.itemsize, ALIGNED) * ALIGNED
        return name

    def part(self, name: str, of: str, begin: int) -> str:
        """Such a tensor from its element `begin` on; its name."""
        *_, dtype = self.made.get(of) or self.scratch[of]
        self.parts[name] = of, begin, begin * dtype.itemsize
        return name

    def add(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
        """A launch: tensors by their names, which come first, then all other arguments in order, constexpr ones too;
        and options such as num_warps."""
        n = max(i for i, argument in enumerate(arguments) if isinstance(argument, str)) + 1
        names = arguments[:n]
        self.launches.append(Launch(kernel, grid, names, arguments[n:], options, itemgetter(*names)))


Plans = dict[Hashable, Plan]
"""Of calls of one form, by what else they depend on."""


def planned(plans: Plans | None, key: Hashable, make: Callable[[], Plan]) -> Plan:
    """That of `plans`, made where there is none yet; made anew where there are no `plans`."""
    if plans is None:
        return make()
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = make()
    return plan


def start(plan: Plan, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Make the plan's tensors and launch its kernels; what they filled, by its names."""
    made = {name: torch.empty(shape, dtype=dtype, device=plan.device) for name, (shape, dtype) in plan.made.items()}
    where: dict[str | None, Any] = {None: None}
    low = 0
    for tensors in (given, made):
        for name, tensor in tensors.items():
            where[name] = place = None if tensor is None else tensor.data_ptr()
            low |= place or 0
    aligned = low % 16 == 0 or tuple([place and place % 16 for place in where.values()])
    scratch = torch.empty(plan.n_byte, dtype=torch.uint8, device=plan.device) if plan.n_byte else None
    versions = plan.versions.get(aligned)
    if versions is None or _hooked():
        _choose(plan, {**given, **made}, scratch, aligned)
        return made
    if scratch is not None:
        begin = scratch.data_ptr()
        for name, (offset, _, _) in plan.scratch.items():
            where[name] = begin + offset
    for name, (of, _, n_byte) in plan.parts.items():
        where[name] = where[of] + n_byte
    driver: Any = triton.runtime.driver.active
    stream = driver.get_current_stream(plan.device.index)
    for launch, version in zip(plan.launches, versions, strict=True):
        version.run(
            *launch.grid, stream, version.function, version.packed_metadata, None, None, None,
            *launch.named(where), *launch.others,
        )  # fmt: skip
    return made


def _choose(plan: Plan, tensors: dict[str, Any], scratch: Tensor | None, aligned: Hashable) -> None:
    """Launch by Triton's own way, and keep what it chose; interpreted, it chooses nothing."""
    every: dict[str | None, Any] = {None: None, **tensors}
    for name, (offset, shape, dtype) in plan.scratch.items():
        size = math.prod(shape) * dtype.itemsize
        every[name] = cast(Tensor, scratch)[offset : offset + size].view(dtype).view(shape)
    for name, (of, begin, _) in plan.parts.items():
        every[name] = every[of].view(-1)[begin:]
    chosen = [launch(every) for launch in plan.launches]
    if None not in chosen:
        plan.versions[aligned] = chosen


def _hooked() -> bool:
    """Whether anybody, a profiler say, asked Triton to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


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
