"""Arguments of `selective_scan`: right ones, of which some are changed; a clean result is naive's on plain copies."""

from typing import Any

import numpy as np
import torch
from harness import ODD, Fuzzer, Unclean, odd
from hypothesis import strategies as st

from mamba_probe.kernels.scan import EMITTABLE, Emit, selective_scan

FAMILIES = ("mamba", "mamba2", "s4d")
TENSORS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay")
DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64", "int32", "int64", "bool", "float8_e4m3fn")
OPTIONS = ("delta_softplus", "delta_limits", "discretization", "emit", "backend")
HUGE = 1e30

_size = st.integers(0, 5)
_change = st.one_of(
    st.tuples(st.just("shape"), st.sampled_from(TENSORS), st.lists(_size, max_size=5)),
    st.tuples(st.just("dtype"), st.sampled_from(TENSORS), st.sampled_from(DTYPES)),
    st.tuples(
        st.just("form"),
        st.sampled_from(TENSORS),
        st.sampled_from(["strided", "expanded", "flipped", "sparse", "meta", "grad", "numpy", "list", "axis", "conj"]),
    ),
    st.tuples(
        st.just("number"), st.sampled_from(TENSORS), st.sampled_from(["nan", "inf", "-inf", "huge", "zero", "tiny"])
    ),
    st.tuples(st.just("odd"), st.sampled_from((*TENSORS, *OPTIONS)), odd),
    st.tuples(
        st.just("emit"),
        st.sampled_from(["variables", "tokens", "channels", "dtype"]),
        st.one_of(odd, st.lists(st.integers(-2, 6), max_size=4), st.lists(st.sampled_from(EMITTABLE), max_size=3)),
    ),
)
CASES = st.fixed_dictionaries(
    {
        "family": st.sampled_from(FAMILIES),
        "sizes": st.tuples(*[st.integers(1, 5)] * 6),
        "optional": st.lists(st.sampled_from(TENSORS[5:]), unique=True),
        "softplus": st.booleans(),
        "limits": st.sampled_from([[0.0, float("inf")], [0.01, 0.5], [0.0, 0.0]]),
        "zoh": st.booleans(),
        "double": st.booleans(),
        "backend": st.sampled_from(["cpu", "cpu", "naive", "auto", "triton"]),
        "emit": st.none() | st.lists(st.sampled_from(EMITTABLE), unique=True, min_size=1, max_size=4),
        "changes": st.lists(_change, max_size=2),
    }
)


def arguments(case: Any) -> dict[str, Any]:
    """Right arguments, before any change."""
    batch, token, groups, per_group, channel, state = case["sizes"]
    family = case["family"]
    head, channel = groups * per_group, 1 if family != "mamba2" else channel
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if case["double"] else torch.float32
    wide = real.to_complex() if family == "s4d" else real

    def draw(*shape: int, dtype: torch.dtype = real) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    of_A = (head,) if family == "mamba2" else (head, state)
    B, C = (draw(*(() if family == "s4d" else (batch, token)), groups, state, dtype=wide) for _ in "BC")
    given: dict[str, Any] = {
        "x": draw(batch, token, head, channel),
        "delta": draw(batch, token, head).abs(),
        "A": -draw(*of_A, dtype=wide).abs().to(wide) - 0.1,
        "B": B,
        "C": C,
    }
    more = {
        "D": draw(head),
        "z": draw(batch, token, head, channel),
        "delta_bias": draw(head),
        "initial_state": draw(batch, head, channel, state, dtype=wide),
        "seq_idx": torch.arange(token).expand(batch, -1) // 2,
        "log_decay": -draw(batch, token, *of_A, dtype=wide).abs().to(wide),
    }
    given |= {name: more[name] for name in case["optional"]}
    return given | {
        "delta_softplus": case["softplus"],
        "delta_limits": tuple(case["limits"]),
        "backend": case["backend"],
        "discretization": "zoh" if case["zoh"] else "euler",
        "emit": case["emit"] and Emit(tuple(case["emit"])),
    }


def formed(value: torch.Tensor, form: str) -> Any:
    """The same numbers in another form, or one axis more."""
    if form == "strided":
        wide = value.new_zeros(*value.shape, 2)
        wide[..., 0] = value
        return wide[..., 0]
    made = {
        "expanded": lambda: value[..., :1].expand(value.shape),
        "flipped": lambda: value.mT.contiguous().mT,
        "sparse": value.to_sparse,
        "meta": lambda: value.to("meta"),
        "numpy": value.detach().numpy,
        "list": value.tolist,
        "axis": lambda: value[None],
        "conj": lambda: value.conj() if value.is_complex() else value,
        "grad": lambda: value.clone().requires_grad_() if value.is_floating_point() else value,
    }
    return made[form]()


def changed(given: dict[str, Any], change: Any) -> None:
    """Apply one change in place; one that does not apply changes nothing."""
    kind, name, what = change
    value = given.get(name)
    if kind == "odd":
        given[name] = ODD[what]()
    elif kind == "emit":
        given["emit"] = Emit(**{"variables": ("delta", "h"), name: ODD[what]() if isinstance(what, str) else what})
    elif not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_meta:
        return  # a second change finds nothing to change
    elif kind == "shape":
        given[name] = torch.ones(what, dtype=value.dtype)
    elif kind == "dtype":
        given[name] = value.real.to(getattr(torch, what)) if value.is_complex() else value.to(getattr(torch, what))
    elif kind == "form" and value.ndim > 1:
        given[name] = formed(value, what)
    elif (
        kind == "number" and value.numel() and name != "seq_idx" and value.dtype.is_floating_point | value.is_complex()
    ):
        numbers = {
            "nan": float("nan"),
            "inf": float("inf"),
            "-inf": -float("inf"),
            "huge": HUGE,
            "zero": 0.0,
            "tiny": 1e-42,
        }
        given[name] = value.clone()
        given[name].view(-1)[0] = numbers[what]


def run(case: Any) -> None:
    given = arguments(case)
    for change in case["changes"]:
        changed(given, change)
    result = selective_scan(**given)
    x, B = given["x"], given["B"]
    state = (x.shape[0], x.shape[2], x.shape[3], B.shape[-1])
    if result.y.shape != x.shape or result.y.dtype != x.dtype or tuple(result.last_state.shape) != state:
        raise Unclean(f"y {result.y.shape} {result.y.dtype}, last_state {result.last_state.shape}")
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    moderate = all(bool((v.abs() < 1e3).all()) for n, v in tensors.items() if v.dtype != torch.bool and n != "seq_idx")
    if moderate:
        compared(result, given, tensors)


def compared(result: Any, given: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Finite, and what the specification gives for plain copies of the same numbers."""
    plain = {
        name: value.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    other = "cpu" if given["backend"] == "naive" else "naive"
    expected = selective_scan(**given | plain | {"backend": other})
    both = {"y": (result.y, expected.y), "last_state": (result.last_state, expected.last_state)}
    for name in EMITTABLE:
        both[name] = getattr(result.emission, name), getattr(expected.emission, name)
    for name, (found, wanted) in both.items():
        if found is None:
            continue
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise Unclean(f"{name} is {found.shape} {found.dtype}, by {other} {wanted.shape} {wanted.dtype}")
        a, b = (np.asarray(t.detach().to(torch.complex128)) for t in (found, wanted))
        finite = np.isfinite(a)
        if name != "mass_distance" and not finite.all():
            raise Unclean(f"{name} is not finite, though its input is")
        scale = max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0)))
        bound = {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(found.dtype, 1e-4) * scale
        if (finite != np.isfinite(b)).any() or (np.abs(a - b)[finite] > bound).any():
            raise Unclean(f"{name} differs from {other}'s on plain copies")


FUZZER = Fuzzer("scan", CASES, run, long=6000, short=200)
