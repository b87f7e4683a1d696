"""The arguments of a scan, checked in one place and upcast where the contract says so."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_probe.kernels.emission import STATE_SIZED, Emit

__all__ = ["Arguments", "as_emit", "as_limits", "buffers", "check"]

DISCRETIZATIONS = ("euler", "zoh")
REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
DOUBLE_DTYPES = (torch.float64, torch.complex128)
INDEX_DTYPES = (torch.int32, torch.int64)
STATE_LIKE = ("A", "B", "C", "initial_state", "log_decay")
"""All complex or all real."""
NOTHING = Emit()


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of one scan; shapes as in `selective_scan`, but for what is brought into one form here.

    x, z, delta, B, C and log_decay keep the dtype they came in. A, D (head, head_channel), delta_bias and
    given_state (None when none was given) have the compute `dtype`, or its complex counterpart, and all but D are
    contiguous. A is (head, state), or (head, 1) where it came as (head,): `scalar_A`; log_decay is (batch, token, head,
    state or 1). B and C are (batch, token, group, state); those that came as (group, state) are named in `constant` and
    take no memory. starts (batch, token, 1, 1) says where seq_idx changes, never at the call's first token.
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
    given_state: Tensor | None
    starts: Tensor | None
    log_decay: Tensor | None
    discretization: str
    emit: Emit
    dtype: torch.dtype
    scalar_A: bool
    constant: tuple[str, ...]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(batch, head, head_channel, state)."""
        return self.x.shape[0], *self.x.shape[2:], self.B.shape[3]

    @property
    def state_dtype(self) -> torch.dtype:
        """That of a state: `dtype`, or its complex counterpart."""
        return self.dtype.to_complex() if self.A.is_complex() else self.dtype

    @cached_property
    def initial_state(self) -> Tensor:
        """Zeros, in no memory, when none was given."""
        if self.given_state is not None:
            return self.given_state
        return self.x.new_zeros((), dtype=self.state_dtype).expand(self.state_shape)

    @property
    def n_token(self) -> int:
        """Tokens in this call."""
        return self.x.shape[1]

    @property
    def kept(self) -> tuple[int, int]:
        """How many tokens and heads are emitted."""
        tokens, heads = self.emit.tokens, self.emit.channels
        return self.n_token if tokens is None else len(tokens), self.x.shape[2] if heads is None else len(heads)

    @property
    def heads_per_group(self) -> int:
        """Consecutive heads that share one B and C."""
        return self.x.shape[2] // self.B.shape[2]

    @property
    def constant_delta(self) -> bool:
        """Whether delta is one view of each head's value, expanded over the tokens (S4D)."""
        return self.n_token > 1 and self.delta.stride(1) == 0

    def widened(self, tensor: Tensor) -> Tensor:
        """A real tensor in the compute dtype; a complex one has its complex counterpart already."""
        return tensor if tensor.is_complex() else tensor.to(self.dtype)

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
    seq_idx: Tensor | None,
    log_decay: Tensor | None,
    discretization: str,
    emit: Emit | None,
) -> Arguments:
    """Arguments that every backend may rely on, or a ValueError that says which one is wrong and why."""
    optional = {"D": D, "z": z, "delta_bias": delta_bias, "initial_state": initial_state}
    optional |= {"seq_idx": seq_idx, "log_decay": log_decay}
    given = {"x": x, "delta": delta, "A": A, "B": B, "C": C}
    given |= {name: value for name, value in optional.items() if value is not None}
    kinds = tuple(_kind(name, value) for name, value in given.items())
    try:
        dtype = _agreed(kinds)
    except TypeError:  # sizes that are symbols of a compiler cannot be looked up
        dtype = _agreed.__wrapped__(kinds)
    state_dtype = dtype.to_complex() if A.is_complex() else dtype
    return Arguments(
        x=x,
        delta=delta,
        A=A.to(state_dtype).reshape(A.shape[0], -1).contiguous(),
        B=B if B.ndim == 4 else B.expand(*x.shape[:2], -1, -1),
        C=C if C.ndim == 4 else C.expand(*x.shape[:2], -1, -1),
        D=None if D is None else D.to(dtype).reshape(*D.shape, *[1] * (2 - D.ndim)).expand(x.shape[2:]),
        z=z,
        delta_bias=None if delta_bias is None else delta_bias.to(dtype).contiguous(),
        delta_softplus=bool(delta_softplus),
        delta_limits=as_limits(delta_limits),
        given_state=None if initial_state is None else initial_state.to(state_dtype).contiguous(),
        starts=None if seq_idx is None else _starts(seq_idx),
        log_decay=None if log_decay is None else log_decay.reshape(*x.shape[:3], -1),
        discretization=_known(discretization),
        emit=_checked_emit(emit, n_token=x.shape[1], n_head=x.shape[2], is_complex=A.is_complex()),
        dtype=dtype,
        scalar_A=A.ndim == 1,
        constant=tuple(name for name in "BC" if given[name].ndim == 2),
    )


class Kind(NamedTuple):
    """What of a tensor its check depends on."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


def _kind(name: str, value: Tensor) -> Kind:
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}")
    return Kind(name, value.dtype, value.shape, value.device)


@lru_cache(maxsize=1024)
def _agreed(kinds: tuple[Kind, ...]) -> torch.dtype:
    """The compute dtype of tensors that fit together; asked anew only for new dtypes, shapes or devices."""
    given = {kind.name: kind for kind in kinds}
    dtype = _compute_dtype(given)
    _check_shapes(given)
    return dtype


def _compute_dtype(given: dict[str, Kind]) -> torch.dtype:
    """float64 when every tensor is (or complex128), else float32; on the way, the dtypes and devices are checked."""
    device = given["x"].device
    for name, value in given.items():
        _check_dtype(name, value, given["A"])
        if value.device != device:
            raise ValueError(f"`{name}` is on {value.device}, `x` on {device}: move them to one device")
    floats = [name for name in given if name != "seq_idx"]
    double = [name for name in floats if given[name].dtype in DOUBLE_DTYPES]
    if double and len(double) < len(floats):
        other = ", ".join(name for name in floats if name not in double)
        raise ValueError(f"float64 is all or none: {', '.join(double)} are float64, {other} are not")
    return torch.float64 if double else torch.float32


def _check_dtype(name: str, value: Kind, A: Kind) -> None:
    if name == "seq_idx":
        if value.dtype not in INDEX_DTYPES:
            raise ValueError(f"`seq_idx` must be int32 or int64, one number a sequence; got {value.dtype}")
    elif value.dtype.is_complex and name not in STATE_LIKE:
        raise ValueError(f"`{name}` must be real; got {value.dtype}: only {', '.join(STATE_LIKE)} may be complex")
    elif value.dtype not in REAL_DTYPES + COMPLEX_DTYPES:
        raise ValueError(
            f"`{name}` must be float32, bfloat16, float16 or float64, or complex64 or complex128 (S4D); "
            f"got {value.dtype}"
        )
    elif name in STATE_LIKE and value.dtype.is_complex != A.dtype.is_complex:
        raise ValueError(
            f"`{name}` is {value.dtype}, `A` {A.dtype}: {', '.join(STATE_LIKE)} are all complex (S4D) or all real"
        )


def _check_shapes(given: dict[str, Kind]) -> None:
    """Bind each axis name at its first sight (x, delta, B, C, A, ...) and hold the later tensors to it."""
    sizes: dict[str, int] = {}
    _match("x", given["x"], ("batch", "token", "head", "head_channel"), sizes)
    if not sizes["token"]:
        raise ValueError(f"`x` has no token: the sequence is empty, shape {tuple(given['x'].shape)}")
    _match("delta", given["delta"], ("batch", "token", "head"), sizes)
    for name in "BC":
        constant = len(given[name].shape) == 2
        _match(name, given[name], ("group", "state") if constant else ("batch", "token", "group", "state"), sizes)
    of_A = ("head", "state")[: max(1, len(given["A"].shape))]
    _match("A", given["A"], of_A, sizes)
    optional = {
        "D": ("head", "head_channel")[: max(1, len(given["D"].shape))] if "D" in given else (),
        "z": ("batch", "token", "head", "head_channel"),
        "delta_bias": ("head",),
        "initial_state": ("batch", "head", "head_channel", "state"),
        "seq_idx": ("batch", "token"),
        "log_decay": ("batch", "token", *of_A),
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


def _match(name: str, value: Kind, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    right = len(value.shape) == len(axes) and all(
        sizes.get(axis, size) == size for axis, size in zip(axes, value.shape, strict=True)
    )
    if not right:
        expected = ", ".join(f"{axis} {sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ValueError(f"`{name}` must have shape ({expected}); got {tuple(value.shape)}")
    sizes.update(zip(axes, value.shape, strict=True))


def _starts(seq_idx: Tensor) -> Tensor:
    """Where a token belongs to another sequence than the token before it."""
    changes = torch.zeros_like(seq_idx, dtype=torch.bool)
    changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return changes[..., None, None]


def _known(discretization: str) -> str:
    if discretization not in DISCRETIZATIONS:
        near = get_close_matches(str(discretization), DISCRETIZATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown `discretization` {discretization!r}{hint} Known: {', '.join(DISCRETIZATIONS)}")
    return discretization


def as_limits(limits: tuple[float, float]) -> tuple[float, float]:
    """Two numbers, low and high."""
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`delta_limits` must be two numbers (low, high); got {limits!r}") from error
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"`delta_limits` must be (low, high) with low <= high; got {limits!r}")
    return low, high


def as_emit(emit: Emit | None) -> Emit:
    """What is asked for: nothing where None."""
    if emit is None:
        return NOTHING
    if not isinstance(emit, Emit):
        raise ValueError(f"`emit` must be an Emit; got {type(emit).__name__}: write Emit(variables=(...))")
    return emit


def _checked_emit(emit: Emit | None, *, n_token: int, n_head: int, is_complex: bool) -> Emit:
    emit = as_emit(emit)
    if emit.dtype is not None and is_complex:
        raise ValueError(f"`emit.dtype` is {emit.dtype}, but `A` is complex, and so is the state: leave it None")
    for name, indices, size in (("tokens", emit.tokens, n_token), ("channels", emit.channels, n_head)):
        if indices is not None and max(indices) >= size:
            axis = "tokens" if name == "tokens" else "heads"
            raise ValueError(f"`emit.{name}` holds {max(indices)}, but this call has {size} {axis}: 0 .. {size - 1}")
    return emit


def buffers(a: Arguments) -> dict[str, Tensor]:
    """Uninitialised outputs of what was asked for; B and C are inputs and need none."""
    if not a.emit.variables:
        return {}
    head_channel, state = a.x.shape[3], a.B.shape[3]
    tails = {
        "delta": (),
        "delta_cumsum": (),
        "A_bar": () if a.scalar_A else (state,),
        "B_bar": (state,),
        "h": (head_channel, state),
        "y": (head_channel,),
        "energy": (head_channel,),
        "mass": (),
        "mass_distance": (),
    }
    dtypes = dict.fromkeys(tails, a.dtype) | {"delta_cumsum": torch.float64}
    dtypes |= dict.fromkeys(STATE_SIZED, a.emit.dtype or a.state_dtype)
    return {
        name: torch.empty((a.x.shape[0], *a.kept, *tail), dtype=dtypes[name], device=a.x.device)
        for name, tail in tails.items()
        if name in a.emit.variables
    }
