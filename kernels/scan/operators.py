"""The scan as operators of torch, which a compiler sees whole: it neither looks inside nor unrolls the tokens.

`mamba_probe::scan` takes what `selective_scan` takes, flat, and answers with a list: the output, the last state, what
is emitted, in the order of `EMITTABLE` (but B and C, which are inputs and selected outside), and, for `train`, the
states that the backward begins from. `mamba_probe::scan_backward` gives the gradients that are wanted.

Checks, casts and the choice of a kernel are inside, and in the fake kernels too, which know sizes as symbols: wrong
input is answered while a model is traced, and no length is compiled in. The backend triton goes back by its own
kernels, from saved states; the gradient of the others is autograd's, of a scan that runs again. There is no second one.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from mamba_probe.kernels.emission import EMITTABLE, Emission, Emit
from mamba_probe.kernels.scan.arguments import LIMIT, TENSORS, Arguments, as_emit, as_limits, buffers, formed

__all__ = ["again", "direct", "needs_grad", "remember", "scan"]

ARGUMENTS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial_state, Tensor? seq_idx, Tensor? log_decay, bool delta_softplus, float low, float high,"
    " str discretization, str variables, int[]? tokens, int[]? channels, ScalarType? dtype, str backend, bool train"
)
N_OPTION = 10
"""How many of them are options; the last two are `backend` and `train`."""

NOTHING = Emission()
"""Emitted, for calls that ask for nothing."""

ALIKE = 4
"""Kinds of tensors that are remembered for the same options, the last ones."""

_known: dict[Hashable, tuple[Any, ...]] = {}
"""Calls on triton that may be made again without a question (`known`), by their options and what was given."""

LAZY = ("Conjugate", "Negative", "ADInplaceOrView", "AutogradFunctionality")
"""Dispatch keys that may be excluded where an operator runs. Within a compiled graph, torch forgets a conj() inside of
one, and under a dispatch mode it differentiates nothing there."""


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient flows through a call with these arguments."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def scan(
    tensors: Sequence[Tensor | None],
    delta_softplus: bool,
    delta_limits: tuple[float, float],
    discretization: str,
    emit: Emit | None,
    backend: str,
) -> tuple[Tensor, Tensor, Emission]:
    """A scan by its operator; `tensors` as in `TENSORS`, `backend` by its name, never "auto"."""
    emit = as_emit(emit)
    options = (
        delta_softplus, *as_limits(delta_limits), discretization,
        ",".join(emit.variables), emit.tokens, emit.channels, emit.dtype,
        backend, backend == "triton" and needs_grad(tensors),
    )  # fmt: skip
    out, last, *rest = torch.ops.mamba_probe.scan.default(*tensors, *options)
    found = dict(zip(_emitted(emit), rest, strict=False))
    return out, last, Emission(**found, **_inputs(tensors, emit))


def direct(
    gpu: Any, tensors: Sequence[Tensor | None], options: tuple[Any, ...], a: Arguments, plans: dict[Hashable, Any]
) -> tuple[Tensor, Tensor, Emission]:
    """The same on triton, for a call outside of any compiler; `options`, a and plans are `formed`'s."""
    names = _emitted(a.emit)
    out, last, *rest = _Direct.apply((a, plans, gpu, options, names), *tensors)
    if not a.emit.variables:
        return out, last, NOTHING
    return out, last, Emission(**dict(zip(names, rest, strict=True)), **_inputs(tensors, a.emit))


def again(key: Hashable, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Emission] | None:
    """A scan on triton as one before, by its `key`: options, and which tensors are `given`; None where none is like."""
    try:
        alike = _known.get(key, ())
    except TypeError:  # limits in a list
        return None
    for known in alike:
        if known.is_like(*given):
            saves = known.needs_grad and torch.is_grad_enabled()
            if saves not in known.forwards:
                return None
            if saves:
                return *_again(known, *given), NOTHING
            out, last, *filled = known.forward(given, False)
            return out, last, known.emission(filled, given)
    return None


def remember(
    key: Hashable, tensors: Sequence[Tensor | None], options: tuple[Any, ...], a: Arguments, plans: dict[Hashable, Any]
) -> None:
    """How a call on triton went, for `again`; `options`, a and plans are `formed`'s."""
    gpu, limits = _module("triton"), options[1]
    given = {name: tensor for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    if torch._C._are_functorch_transforms_active() or any(map(is_functorch_wrapped_tensor, given.values())):
        return
    if type(limits) is not tuple or not {*map(type, limits)} <= {int, float} or not gpu.is_plain(tensors, a):
        return  # a tensor, as a limit, may change
    if a.emit.variables and needs_grad(tensors):
        return
    alike = _known.get(key, ())
    known = next((known for known in alike if known.is_like(*given.values())), None)
    if known is None:
        known = gpu.Known(tuple(given), tuple(given.values()), options)
        if len(_known) >= LIMIT:
            _known.clear()
        _known[key] = (known, *alike[: ALIKE - 1])
    known.keep_forward(a, plans, needs_grad(tensors))


def _inputs(tensors: Sequence[Tensor | None], emit: Emit) -> dict[str, Tensor]:
    """B and C where they are emitted, at the tokens asked for."""
    found = {}
    for name in {"B", "C"}.intersection(emit.variables):
        x, value = tensors[0], tensors[TENSORS.index(name)]
        assert x is not None
        assert value is not None
        every = value if value.ndim == 4 else value.expand(*x.shape[:2], -1, -1)
        found[name] = every.clone() if emit.tokens is None else every[:, list(emit.tokens)]
    return found


def _emitted(emit: Emit) -> list[str]:
    """Names of what the operator emits, in order."""
    if not emit.variables:
        return []
    return [name for name in EMITTABLE if name in emit.variables and name not in ("B", "C")]


def _checked(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Arguments, dict[Hashable, Any]]:
    """The arguments of the operators as the backends take them, and what these keep (`formed`)."""
    softplus, low, high, discretization, variables, tokens, channels, dtype, _, _ = options
    return formed(tensors, softplus, (low, high), discretization, _emit(variables, tokens, channels, dtype))


def _emit(variables: str, tokens: Sequence[int] | None, channels: Sequence[int] | None, dtype: Any) -> Emit:
    """What the operator is to emit: without B and C."""
    return _known_emit(variables, tokens and tuple(tokens), channels and tuple(channels), dtype)


@lru_cache(maxsize=64)
def _known_emit(variables: str, tokens: Sequence[int] | None, channels: Sequence[int] | None, dtype: Any) -> Emit:
    names = (name for name in variables.split(",") if name not in ("", "B", "C"))
    return Emit(tuple(names), tokens, channels, dtype)


def _module(name: str) -> Any:
    from mamba_probe.kernels.scan import backend_module  # which imports this module

    return backend_module(name)


def _uncast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off: it would reach inside an operator, and a backward wherever that is called."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _whole_torch() -> ExitStack:
    """Torch as it is outside of compiled graphs and dispatch modes (see `LAZY`)."""
    stack = ExitStack()
    for key in LAZY:
        stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
    return stack


def _forward(*arguments: Any) -> list[Tensor]:
    """mamba_probe::scan."""
    (a, plans), (backend, train) = _checked(arguments[:-N_OPTION], arguments[-N_OPTION:]), arguments[-2:]
    with _uncast(a.x), torch.no_grad(), _whole_torch() if a.A.is_complex() else nullcontext():
        module = _module(backend)
        states = module.empty_states(a) if train else []
        out, last, emission = module.scan(a, *states, plans=plans) if backend == "triton" else module.scan(a)
    return [out, *(each.contiguous() for each in (last, *(vars(emission)[name] for name in _emitted(a.emit)))), *states]


def _fake_forward(*arguments: Any) -> list[Tensor]:
    (a, _), (*_, backend, train) = _checked(arguments[:-N_OPTION], arguments[-N_OPTION:]), arguments
    module = _module(backend)
    if backend == "triton":
        module.check_arguments(a)
    emitted = buffers(a)
    last = a.x.new_empty(a.state_shape, dtype=a.state_dtype)
    states = module.empty_states(a) if train else []
    return [a.x.new_empty(a.x.shape), last, *(emitted[name] for name in _emitted(a.emit)), *states]


def _backward(grads: list[Tensor | None], states: Tensor | None, *arguments: Any) -> list[Tensor]:
    """mamba_probe::scan_backward."""
    tensors, options, wanted = arguments[: len(TENSORS)], arguments[len(TENSORS) : -1], arguments[-1]
    given: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
    names = wanted.split(",")
    with _uncast(tensors[0]):
        if options[-2] == "triton":
            a, plans = _checked(tensors, options)
            upstream = dict(zip(("out", "last_state", *_emitted(a.emit)), grads, strict=False))
            found = _module("triton").backward(a, states, upstream, plans)
            return [_as(given[name], found[name]) for name in names]
        return _autograd(grads, given, names, options)


def _as(given: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the form of what was given: a D (head,) came to be one number a channel."""
    if gradient.shape != given.shape:
        is_shared = given.ndim == 1 and gradient.numel() > given.numel()
        gradient = gradient.sum(1) if is_shared else gradient.view(given.shape)
    return gradient if gradient.dtype == given.dtype else gradient.to(given.dtype)


def _autograd(
    grads: list[Tensor | None], given: dict[str, Any], names: Sequence[str], options: Sequence[Any]
) -> list[Tensor]:
    """The gradients of a backend in plain torch, run again."""
    with _whole_torch():
        with torch.enable_grad():
            given = given | {name: given[name].detach().requires_grad_() for name in names}
            a, _ = _checked(tuple(given.values()), options)
            out, last, emission = _module(options[-2]).scan(a)
            answers = (out, last, *(vars(emission)[name] for name in _emitted(a.emit)))
        pairs = [pair for pair in zip(answers, grads, strict=True) if pair[1] is not None and pair[0].requires_grad]
        outputs, above = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [given[name] for name in names], above, materialize_grads=True)
        # each its own memory: a gradient may be one of `grads`, or of another's
        return [gradient.resolve_conj().clone(memory_format=torch.contiguous_format) for gradient in found]


def _fake_backward(_grads: Any, _states: Any, *arguments: Any) -> list[Tensor]:
    given = dict(zip(TENSORS, arguments, strict=False))
    return [given[name].new_empty(given[name].shape) for name in arguments[-1].split(",")]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.options = inputs[:-N_OPTION], inputs[-N_OPTION:]
    n_answer = 2 + len(_emitted(_emit(*ctx.options[4:8])))
    states = output[n_answer] if len(output) > n_answer else None
    if states is not None:
        ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    _refuse_second()
    *tensors, states = ctx.saved_tensors
    wanted = [name for name, needed in zip(TENSORS, ctx.needs_input_grad, strict=False) if needed]
    operator = torch.ops.mamba_probe.scan_backward.default
    found = operator(list(grads), states, *tensors, *ctx.options, ",".join(wanted))
    return (*map(dict(zip(wanted, found, strict=True)).get, TENSORS), *[None] * N_OPTION)


def _refuse_second() -> None:
    if torch.is_grad_enabled():
        raise ValueError(
            'this scan has no second derivative (`create_graph=True`): use backend="cpu", outside of torch.compile'
        )


class _Direct(torch.autograd.Function):
    """Both operators for triton, without torch's dispatcher, which calls Python four times for a gradient."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        a, plans, *ctx.call = call
        gpu, _, names = ctx.call
        with _uncast(a.x):
            states = next(iter(gpu.empty_states(a)), None)
            out, last, emitted = gpu.fill(a, states, plans)
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return out, last, *map(emitted.get, names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second()
        *tensors, states = ctx.saved_tensors
        gpu, options, names = ctx.call
        found = _found(gpu, options, tensors, states, dict(zip(("out", "last_state", *names), grads, strict=True)))[0]
        needed = zip(ctx.needs_input_grad[1:], TENSORS, strict=True)
        return (None, *[found[name] if is_needed else None for is_needed, name in needed])


class _Again(torch.autograd.Function):
    """`_Direct`, of a call that is known."""

    @staticmethod
    def forward(ctx: Any, known: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        out, last, *states = known.forward(given, True)
        ctx.save_for_backward(*given, *states)
        ctx.set_materialize_grads(False)
        ctx.known = known
        return out, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second()
        known, saved, (out, last_state) = ctx.known, ctx.saved_tensors, grads
        is_plain = out is not None and last_state is None
        gradients = known.backward(saved, out) if is_plain else None
        if gradients is not None:
            return None, *gradients
        n = len(known.names)
        states = saved[n] if len(saved) > n else None
        upstream = {"out": out, "last_state": last_state}
        found, a, plans = _found(_module("triton"), known.options, known.every(saved[:n]), states, upstream)
        if is_plain and known.is_like(*saved[:n]):
            known.keep_backward(a, plans, out, states is not None)
        needed = zip(ctx.needs_input_grad[1:], known.names, strict=True)
        return (None, *[found[name] if is_needed else None for is_needed, name in needed])


_again = super(torch.autograd.Function, _Again).apply  # pyright: ignore[reportAttributeAccessIssue]
"""As Function.apply where no functorch transform is active and no argument is functorch's, as of no known call; what
else that does is to look for these, at the time of a launch."""


def _found(
    gpu: Any, options: tuple[Any, ...], tensors: Sequence[Any], states: Tensor | None, upstream: dict[str, Any]
) -> tuple[dict[str, Tensor], Arguments, dict[Hashable, Any]]:
    """Gradients by name, each in the form of what was given, and what `formed` says of the call."""
    with _uncast(tensors[0]):
        a, plans = formed(tensors, *options)
        found = gpu.backward(a, states, upstream, plans)
        for name in _odd(plans, tensors, found):
            found[name] = _as(tensors[TENSORS.index(name)], found[name])
    return found, a, plans


def _odd(plans: dict[Hashable, Any], tensors: Sequence[Tensor | None], found: dict[str, Tensor]) -> list[str]:
    """Gradients in another form than what was given; which they are depends on the form of a call alone."""
    odd = plans.get(_odd)
    if odd is None:
        given: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        forms = {name: ((t := given[name]).shape, t.dtype) for name in found}
        odd = plans[_odd] = [name for name, value in found.items() if (value.shape, value.dtype) != forms[name]]
    return odd


def _register() -> None:
    """Once a process, and for good, whatever becomes of this module: torch keeps what these calls register.

    The backward is registered below autograd's keys and without a formula, so that autograd works inside of it.
    """
    if hasattr(torch.ops.mamba_probe, "scan_backward"):
        return
    backward = f"(Tensor?[] grads, Tensor? states, {ARGUMENTS}, str wanted) -> Tensor[]"
    for name, schema, kernel, fake in (
        ("mamba_probe::scan", f"({ARGUMENTS}) -> Tensor[]", _forward, _fake_forward),
        ("mamba_probe::scan_backward", backward, _backward, _fake_backward),
    ):
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", kernel)
        torch.library.register_fake(name, fake)
    torch.library.register_autograd("mamba_probe::scan", _gradients, setup_context=_save)


_register()
