"""The arguments of a scan, checked in one place and upcast where the contract says so."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_probe.kernels.emission import Emit

__all__ = ["Arguments", "check"]

DISCRETIZATIONS = ("euler",)
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of one scan; shapes as in `selective_scan`.

    x, z, delta, B and C keep the dtype they came in. A, D (head, head_channel), delta_bias and initial_state
    (zeros when none was given) have the compute `dtype`.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    delta_limits: tuple[float, float]
    initial_state: Tensor
    emit: Emit
    dtype: torch.dtype

    @property
    def n_token(self) -> int:
        """Tokens in this call."""
        return self.x.shape[1]

    @property
    def heads_per_group(self) -> int:
        """Consecutive heads that share one B and C."""
        return self.x.shape[2] // self.B.shape[2]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, for questions that concern each of them."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))


def check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    delta_limits: tuple[float, float],
    initial_state: Tensor | None,
    emit: Emit | None,
) -> Arguments:
    """Arguments that every backend may rely on, or a ValueError that says which one is wrong and why."""
    given = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given = {name: value for name, value in (given | {"initial_state": initial_state}).items() if value is not None}
    dtype = _compute_dtype(given)
    _check_shapes(given)
    sizes = x.shape[0], *x.shape[2:], B.shape[3]
    start = initial_state if initial_state is not None else x.new_zeros(sizes, dtype=dtype)
    return Arguments(
        x=x,
        delta=delta,
        A=A.to(dtype),
        B=B,
        C=C,
        D=None if D is None else D.to(dtype).reshape(*D.shape, *[1] * (2 - D.ndim)).expand(x.shape[2:]),
        z=z,
        delta_bias=None if delta_bias is None else delta_bias.to(dtype),
        delta_softplus=bool(delta_softplus),
        delta_limits=_limits(delta_limits),
        initial_state=start.to(dtype),
        emit=_checked_emit(emit, n_token=x.shape[1], n_head=x.shape[2]),
        dtype=dtype,
    )


def _compute_dtype(given: dict[str, Tensor]) -> torch.dtype:
    """float64 when every tensor is, else float32; on the way, tensors must be real floats on one device."""
    device = getattr(given["x"], "device", None)
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}")
        if value.is_complex():
            raise ValueError(f"`{name}` is complex ({value.dtype}): complex A (S4D) is not supported yet, only real A")
        if value.dtype not in INPUT_DTYPES:
            raise ValueError(f"`{name}` must be float32, bfloat16, float16 or float64; got {value.dtype}")
        if value.device != device:
            raise ValueError(f"`{name}` is on {value.device}, `x` on {device}: move them to one device")
    double = [name for name, value in given.items() if value.dtype == torch.float64]
    if double and len(double) < len(given):
        other = ", ".join(name for name in given if name not in double)
        raise ValueError(f"float64 is all or none: {', '.join(double)} are float64, {other} are not")
    return torch.float64 if double else torch.float32


def _check_shapes(given: dict[str, Tensor]) -> None:
    """Bind each axis name at its first sight (x, delta, A, B, ...) and hold the later tensors to it."""
    sizes: dict[str, int] = {}
    _match("x", given["x"], ("batch", "token", "head", "head_channel"), sizes)
    if not sizes["token"]:
        raise ValueError(f"`x` has no token: the sequence is empty, shape {tuple(given['x'].shape)}")
    _match("delta", given["delta"], ("batch", "token", "head"), sizes)
    for name in "BC":
        if given[name].ndim == 2:
            raise ValueError(f"`{name}` is constant, (group, state): not supported yet; give it per token")
        _match(name, given[name], ("batch", "token", "group", "state"), sizes)
    _match("A", given["A"], ("head", "state")[: max(1, given["A"].ndim)], sizes)
    if given["A"].ndim > 2:
        raise ValueError(f"`A` must be (head, state) or (head,); got shape {tuple(given['A'].shape)}")
    optional = {
        "D": ("head", "head_channel")[: max(1, given["D"].ndim)] if "D" in given else (),
        "z": ("batch", "token", "head", "head_channel"),
        "delta_bias": ("head",),
        "initial_state": ("batch", "head", "head_channel", "state"),
    }
    for name, axes in optional.items():
        if name in given:
            _match(name, given[name], axes, sizes)
    if empty := [axis for axis, size in sizes.items() if not size]:
        raise ValueError(f"axis {', '.join(empty)} has size 0: nothing to scan")
    if sizes["head"] % sizes["group"]:
        raise ValueError(
            f"head must be a multiple of group; got {sizes['head']} heads (`x`) and {sizes['group']} groups (`B`)"
        )


def _match(name: str, value: Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    expected = ", ".join(f"{axis} {sizes[axis]}" if axis in sizes else axis for axis in axes)
    right = value.ndim == len(axes) and all(
        sizes.get(axis, size) == size for axis, size in zip(axes, value.shape, strict=True)
    )
    if not right:
        raise ValueError(f"`{name}` must have shape ({expected}); got {tuple(value.shape)}")
    sizes.update(zip(axes, value.shape, strict=True))


def _limits(limits: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`delta_limits` must be two numbers (low, high); got {limits!r}") from error
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"`delta_limits` must be (low, high) with low <= high; got {limits!r}")
    return low, high


def _checked_emit(emit: Emit | None, *, n_token: int, n_head: int) -> Emit:
    emit = Emit() if emit is None else emit
    if not isinstance(emit, Emit):
        raise ValueError(f"`emit` must be an Emit; got {type(emit).__name__}: write Emit(variables=(...))")
    for name, indices, size in (("tokens", emit.tokens, n_token), ("channels", emit.channels, n_head)):
        if indices is not None and max(indices) >= size:
            axis = "tokens" if name == "tokens" else "heads"
            raise ValueError(f"`emit.{name}` holds {max(indices)}, but this call has {size} {axis}: 0 .. {size - 1}")
    return emit
