"""The arguments of a scan, checked in one place and upcast where the contract says so."""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mamba_probe.kernels.emission import STATE_SIZED, Emit

__all__ = ["TENSORS", "Arguments", "as_emit", "as_flag", "as_limits", "buffers", "check", "formed"]

TENSORS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay")
"""Arguments of a scan that are tensors, in their order here."""

NEEDED = TENSORS[:5]
"""Those that are never None."""

LIMIT = 256
"""Forms remembered; then all are forgotten."""

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
    take no memory. D that came as (head,) is `shared_D`. starts (batch, token, 1, 1) says where seq_idx changes, never
    at the call's first token.
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
    shared_D: bool
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
    tensors = x, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, log_decay
    return formed(tensors, delta_softplus, delta_limits, discretization, emit)[0]


@dataclass(frozen=True, eq=False)
class Form:
    """What calls share that have the same options, and tensors that differ only in what they hold; made once."""

    options: dict[str, Any]
    """Those of `Arguments`' fields that are no tensors."""
    dtype: torch.dtype
    state_dtype: torch.dtype
    ready: frozenset[str]
    """Tensors that come in the form `Arguments` has, or not at all."""
    plans: dict[Hashable, Any] = field(default_factory=dict)
    """What backends keep for further calls."""

    def arguments(self, tensors: Sequence[Tensor | None]) -> Arguments:
        """`Arguments` of another such call."""
        x, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, log_decay = cast(Any, tensors)
        ready = self.ready
        return Arguments(
            x=x,
            delta=delta,
            A=A if "A" in ready else A.to(self.state_dtype).reshape(A.shape[0], -1).contiguous(),
            B=B if "B" in ready else B.expand(*x.shape[:2], -1, -1),
            C=C if "C" in ready else C.expand(*x.shape[:2], -1, -1),
            D=D if "D" in ready else D.to(self.dtype) if D.ndim == 2 else _skip(D, x.shape[2:], self.dtype),
            z=z,
            delta_bias=delta_bias if "delta_bias" in ready else delta_bias.to(self.dtype).contiguous(),
            given_state=initial_state if "initial_state" in ready else initial_state.to(self.state_dtype).contiguous(),
            starts=None if seq_idx is None else _starts(seq_idx),
            log_decay=log_decay if "log_decay" in ready else log_decay.reshape(*x.shape[:3], -1),
            **self.options,
        )


_forms: dict[Hashable, Form] = {}


def formed(
    tensors: Sequence[Tensor | None],
    delta_softplus: bool,
    delta_limits: tuple[float, float],
    discretization: str,
    emit: Emit | None,
) -> tuple[Arguments, dict[Hashable, Any]]:
    """`check` for `tensors` in the order of TENSORS, and what backends keep for further calls of this form.

    What depends on the form alone is checked once a form.
    """
    options = delta_softplus, as_limits(delta_limits), discretization, emit
    key = tuple(
        [
            (t.dtype, t.shape, t.stride(), t.device) if isinstance(t, Tensor) and t.layout is torch.strided else t
            for t in tensors
        ]
    )
    try:
        form = _forms.get((key, options))
    except TypeError:  # sizes that are symbols of a compiler cannot be looked up, nor can arguments of a wrong type
        return _form(tensors, *options).arguments(tensors), {}
    if form is None:
        if len(_forms) >= LIMIT:
            _forms.clear()
        form = _forms[key, options] = _form(tensors, *options)
    return form.arguments(tensors), form.plans


def _form(
    tensors: Sequence[Tensor | None],
    delta_softplus: bool,
    delta_limits: tuple[float, float],
    discretization: str,
    emit: Emit | None,
) -> Form:
    """Checks all that a call's form says."""
    given = {name: _kind(name, t) for name, t in zip(TENSORS, tensors, strict=True) if t is not None or name in NEEDED}
    dtype = _compute_dtype(given)
    _check_shapes(given)
    x, A = given["x"], given["A"]
    state_dtype = dtype.to_complex() if A.dtype.is_complex else dtype
    options = {
        "delta_softplus": delta_softplus,
        "delta_limits": delta_limits,
        "discretization": _known(discretization),
        "emit": _checked_emit(emit, n_token=x.shape[1], n_head=x.shape[2], is_complex=A.dtype.is_complex),
        "dtype": dtype,
        "scalar_A": len(A.shape) == 1,
        "shared_D": "D" in given and len(given["D"].shape) == 1,
        "constant": tuple(name for name in "BC" if len(given[name].shape) == 2),
    }
    wanted = {"A": (2, state_dtype), "B": (4, None), "C": (4, None), "D": (2, dtype), "delta_bias": (1, dtype)}
    wanted |= {"initial_state": (4, state_dtype), "log_decay": (4, None)}
    ready = frozenset(name for name, form in wanted.items() if _is_ready(name, tensors[TENSORS.index(name)], *form))
    return Form(options, dtype, state_dtype, ready)


def _is_ready(name: str, value: Tensor | None, n_axis: int, dtype: torch.dtype | None) -> bool:
    if value is None:
        return True
    is_dense = name not in ("A", "delta_bias", "initial_state") or value.is_contiguous()
    return value.ndim == n_axis and dtype in (None, value.dtype) and is_dense


class Kind(NamedTuple):
    """What of a tensor its check depends on."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


def _kind(name: str, value: Tensor | None) -> Kind:
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"`{name}` must be dense; got a tensor of layout {value.layout}: pass {name}.to_dense()")
    return Kind(name, value.dtype, value.shape, value.device)


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


def _skip(D: Tensor, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """D (head,) as (head, head_channel), in the memory it has."""
    wide = (D if D.dtype == dtype else D.to(dtype)).unsqueeze(1)
    return wide if rows[1] == 1 else wide.expand(rows)


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


def as_flag(flag: bool) -> bool:
    """`delta_softplus`, which no other value stands for."""
    if flag is not True and flag is not False:
        raise ValueError(f"`delta_softplus` must be True or False; got {type(flag).__name__}")
    return flag


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
    return {name: torch.empty(shape, dtype=dtype, device=a.x.device) for name, (shape, dtype) in emitted_as(a).items()}


def emitted_as(a: Arguments) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what was asked for but B and C."""
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
        name: ((a.x.shape[0], *a.kept, *tail), dtypes[name]) for name, tail in tails.items() if name in a.emit.variables
    }
