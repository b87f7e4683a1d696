"""Launching kernels by a plan, which is made once for all calls of one form.

A short sequence takes less time on the device than Python takes to work out what to launch. So that is done once: tile,
grid and sizes, and to ask Triton which version of a kernel fits, which alone is tens of microseconds with fifty
arguments. A call after that makes its tensors, takes their addresses, and launches.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import lru_cache, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # pyright: ignore[reportAttributeAccessIssue]
from triton import knobs

__all__ = ["Plan", "Plans", "blocks", "fusible", "listed", "maker", "padded", "planned", "run", "slots", "start"]

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


Made = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]


class Launch(NamedTuple):
    """A kernel, and its arguments in order: tensors by `names`, None where a call gives none, then all others; and what
    is made for it, name, shape, strides and dtype: not before the launches ahead of it, for which a device may wait."""

    makes: tuple[Made, ...]
    kernel: Any
    grid: tuple[int, int, int]
    names: tuple[str | None, ...]
    others: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, tensors: Mapping[str | None, Any]) -> Any:
        """By Triton's own way; answers the version of the kernel that it chose."""
        return self.kernel[self.grid](*map(tensors.get, self.names), *self.others, **self.options)


class Step(NamedTuple):
    """A launch of the version that Triton chose: what is made for it, and which of the call's addresses it takes."""

    makes: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    run: Callable[..., Any]
    grid: tuple[int, int, int]
    fixed: tuple[Any, ...]
    taken: Callable[[list[int | None]], tuple[int | None, ...]]
    others: tuple[Any, ...]


class Plan:
    """Launches, one after another, and the tensors to make for each: for all calls whose tensors have the same dtypes,
    shapes and strides, and which launch with the same sizes.

    What Triton's choice of a version depends on beside that is where tensors lie: at a multiple of 16 bytes or not.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: list[Launch] = []
        self.next: list[Made] = []
        self.made: list[str] = []
        self.scratch: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self.n_byte = 0
        self.steps: dict[Hashable, list[Step]] = {}
        """By the names of what a call gives, in order, and how it is aligned."""

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A tensor for the next launch, or those after it, to fill; its name."""
        self.next.append((name, tuple(shape), torch.empty(shape, device="meta").stride(), dtype))
        return name

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A tensor that none but the launches use, a piece of one for all of these; its name."""
        self.scratch[name] = self.n_byte, shape, dtype
        self.n_byte += blocks(math.prod(shape) * dtype.itemsize, ALIGNED) * ALIGNED
        return name

    def part(self, name: str, of: str, begin: int) -> str:
        """Such a tensor from its element `begin` on, in one row; its name."""
        n_byte, shape, dtype = self.scratch[of]
        self.scratch[name] = n_byte + begin * dtype.itemsize, (math.prod(shape) - begin,), dtype
        return name

    def add(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
        """A launch: tensors by their names, which come first, then all other arguments in order, constexpr ones too;
        and options such as num_warps."""
        n = max(i for i, argument in enumerate(arguments) if isinstance(argument, str)) + 1
        self.launches.append(Launch(tuple(self.next), kernel, grid, arguments[:n], arguments[n:], options))
        self.made += [name for name, *_ in self.next]
        self.next.clear()

    def bound(self, names: Sequence[str], versions: Sequence[Any]) -> list[Step]:
        """The launches, for the addresses of `names`, None, those of pieces of scratch, and of what is made."""
        place = {name: i for i, name in enumerate((*names, None, *self.scratch, *self.made))}
        nothing = place[None]
        return [
            Step([made[1:] for made in launch.makes], version.run, launch.grid,
                 (version.function, version.packed_metadata, None, None, None),
                 itemgetter(*[place.get(name, nothing) for name in launch.names]), launch.others)
            for launch, version in zip(self.launches, versions, strict=True)
        ]  # fmt: skip


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
    return dict(zip(plan.made, run(plan, tuple(given), given.values()), strict=True))


def run(plan: Plan, names: tuple[str, ...], given: Collection[Tensor | None]) -> list[Tensor]:
    """`start`, of what `names` call, others being None; what the kernels filled, in the order of the plan's `made`."""
    make = maker(plan.device)
    scratch = make((plan.n_byte,), (1,), torch.uint8) if plan.n_byte else None
    where = [None if tensor is None else tensor.data_ptr() for tensor in given]
    low = reduce(or_, filter(None, where), 0)  # what is made here begins at multiples of ALIGNED
    aligned = low % 16 == 0 or tuple([place and place % 16 for place in where])
    steps = plan.steps.get((names, aligned))
    if steps is None or _hooked():
        return _choose(plan, dict(zip(names, given, strict=True)), scratch, aligned)
    where.append(None)
    if scratch is not None:
        begin = scratch.data_ptr()
        where += [begin + offset for offset, _, _ in plan.scratch.values()]
    driver: Any = triton.runtime.driver.active
    stream, made = driver.get_current_stream(plan.device.index), []
    for makes, launch, grid, fixed, taken, others in steps:
        for shape, strides, dtype in makes:
            tensor = make(shape, strides, dtype)
            made.append(tensor)
            where.append(tensor.data_ptr())
        launch(*grid, stream, *fixed, *taken(where), *others)
    return made


def _choose(plan: Plan, given: Mapping[str, Tensor | None], scratch: Tensor | None, aligned: Hashable) -> list[Tensor]:
    """Launch by Triton's own way, and keep what it chose; interpreted, it chooses nothing."""
    every: dict[str | None, Any] = {**given, None: None}
    for name, (offset, shape, dtype) in plan.scratch.items():
        size = math.prod(shape) * dtype.itemsize
        every[name] = cast(Tensor, scratch)[offset : offset + size].view(dtype).view(shape)
    made, chosen = [], []
    for launch in plan.launches:
        for name, shape, strides, dtype in launch.makes:
            every[name] = torch.empty_strided(shape, strides, dtype=dtype, device=plan.device)
            made.append(every[name])
        chosen.append(launch(every))
    if None not in chosen:
        plan.steps[tuple(given), aligned] = plan.bound(tuple(given), chosen)
    return made


def maker(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """What makes tensors, uninitialised, of a shape, strides and a dtype, on the current CUDA device or another kind.

    On CUDA what torch's own compiled graphs call: half the time, and no NaN where algorithms are to be deterministic.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return _empty_strided_cuda
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


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
