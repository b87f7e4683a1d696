"""Calls that are known, against the same calls the long way: a script for `interpret.py`.

With the argument "all", of every shape, and with every difference.

It imports what it needs when it runs, since pytest imports it too, in search of doctests.
"""

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mamba_probe.kernels.scan import Emit, arguments, operators, selective_scan

WHOLE = sys.argv[1:] == ["all"]
SHAPES = {"mamba": (2, 1, 2, False), "channels": (2, 2, 2, False), "mamba2": (2, 2, 2, True)}


def forget() -> None:
    arguments._forms.clear()
    operators._known.clear()


def drawn(kind: str, seed: int = 1, n_token: int = 3, **changes: Any) -> dict[str, Any]:
    """Of 16-bit x, z, B and C; D a number a head but where that would be copied for each channel."""
    from oracle import draw

    given = draw(None, 1, n_token, seed=seed, shape=SHAPES[kind]) | changes
    skip = given["D"].reshape(2, -1)
    given["D"] = skip.expand(2, 2).contiguous() if kind == "channels" else skip[:, 0].contiguous()
    given |= {name: given[name].bfloat16() for name in ("x", "delta", "z", "B", "C") if given.get(name) is not None}
    return {name: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for name, v in given.items()}


def call(given: dict[str, Any], used: str = "y", **more: Any) -> list[torch.Tensor]:
    """Outputs, and where any needs one the gradients of those, through what is `used`."""
    result = selective_scan(**given, backend="triton", **more)
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    if not (leaves and torch.is_grad_enabled()):
        return [result.y, result.last_state]
    parts = {"y": [result.y], "last": [result.last_state], "both": [result.y, result.last_state]}[used]
    upstream = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).reshape(part.shape) for part in parts]
    return [result.y, result.last_state, *torch.autograd.grad(parts, leaves, upstream)]


def known(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What `run` answers, where nothing may be checked anew."""
    with patch.object(operators, "formed", side_effect=AssertionError("anew")):
        import mamba_probe.kernels.scan as scan

        with patch.object(scan, "formed", side_effect=AssertionError("anew")):
            return run()


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(one, other)


def anew(given: dict[str, Any], **more: Any) -> list[torch.Tensor]:
    """The long way; what is known afterwards is what was before."""
    before = dict(operators._known)
    forget()
    found = call(given, **more)
    operators._known.clear()
    operators._known.update(before)
    return found


def trained(kind: str) -> None:
    """The first call is new, the second's backward is, the third is known; the tensors are others."""
    forget()
    first, second = drawn(kind), drawn(kind, seed=2)
    call(first)
    call(first)
    same(known(lambda: call(second)), anew(second))
    for used in ("last", "both"):  # the forward is known, the backward goes the long way
        same(call(second, used=used), anew(second, used=used))
    with torch.no_grad():
        call(first)
        same(known(lambda: call(second)), anew(second))
    print("held", flush=True)


def emitted(kind: str) -> None:
    """What is emitted, of every token and head; some of them, or mass, or with gradients: the long way."""
    forget()
    first, second = drawn(kind), drawn(kind, seed=2)
    every = Emit(("delta", "A_bar", "B", "C", "h", "delta_cumsum") if kind == "mamba" else ("delta", "C"))
    with torch.no_grad():
        expected = shown(second, every)
        operators._known.clear()
        shown(first, every)
        same(known(lambda: shown(second, every)), expected)
        for emit in (Emit(("delta",), tokens=(1,)), Emit(("delta", "mass"))) if kind == "mamba" else ():
            shown(second, emit)
            with pytest.raises(AssertionError, match="anew"):
                known(lambda emit=emit: shown(second, emit))
    if kind == "mamba":
        same(call(second, emit=every), anew(second, emit=every))
    print("held", flush=True)


def shown(given: dict[str, Any], emit: Emit) -> list[torch.Tensor]:
    """All that a call answers."""
    result = selective_scan(**given, backend="triton", emit=emit)
    return [result.y, result.last_state, *[v for v in vars(result.emission).values() if v is not None]]


def twice(kind: str) -> None:
    """One graph gone back through twice, and two graphs at once."""
    forget()
    given = drawn(kind)
    for _ in range(2):
        expected = call(given)[2:]
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor)]
    y, other = (selective_scan(**given, backend="triton").y for _ in range(2))
    above = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    for _ in range(2):
        same(list(torch.autograd.grad(y, leaves, above, retain_graph=True)), expected)
    same(list(torch.autograd.grad(other, leaves, above)), expected)
    spread = torch.autograd.grad(y, leaves, torch.ones((), dtype=y.dtype).expand(y.shape), retain_graph=True)
    same(list(torch.autograd.grad(y.sum(), leaves)), list(spread))
    print("held", flush=True)


def others() -> None:
    """Whatever differs is told apart."""
    forget()
    given = drawn("mamba")
    for _ in range(2):
        call(given)
    changed: list[dict[str, Any]] = [
        {name: given[name].detach()} for name in ("x", "A", "D", "delta_bias")
    ] + [{name: None} for name in ("D", "z", "delta_bias", "initial_state") if name in given]  # fmt: skip
    changed += [{"x": given["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()}]
    changed += [{"x": given["x"].detach().float().requires_grad_()}, {"A": torch.nn.Parameter(given["A"].detach())}]
    changed += [{"delta_softplus": not given["delta_softplus"]}, {"delta_limits": [0.0, 0.3]}]
    changed += [{"delta_limits": (0.0, torch.tensor(0.3))}, {"discretization": "zoh"}, {"emit": Emit(tokens=(1,))}]
    for change in changed if WHOLE else changed[::3]:
        for _ in range(2):
            same(call(given | change), anew(given | change))
    for _ in range(2):  # more than ALIKE were between
        call(given)
    same(known(lambda: call(given)), anew(given))
    assert all(len(alike) <= operators.ALIKE for alike in operators._known.values())
    print("held", flush=True)


def refused() -> None:
    """Wrong input and what is not supported, as by a call that is new."""
    forget()
    given = drawn("mamba")
    for _ in range(2):
        call(given)
    for change, message in (
        ({"delta": given["delta"][:, :2]}, "`delta` must have shape"),
        ({"x": None}, r"`x` must be a torch\.Tensor; got NoneType"),
        ({"B": given["B"].tolist()}, r"`B` must be a torch\.Tensor; got list"),
        ({"delta_limits": (1.0, 0.0)}, "low <= high"),
        ({"emit": ["h"]}, "`emit` must be an Emit; got list"),
    ):
        with pytest.raises(ValueError, match=message):
            call(given | change)
    with pytest.raises(RuntimeError, match="must override the setup_context"):
        torch.func.grad(lambda x: selective_scan(**given | {"x": x}, backend="triton").y.float().sum())(given["x"])
    y = selective_scan(**given, backend="triton").y
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(y.float().sum(), given["x"], create_graph=True)
    with torch.no_grad():
        given["x"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.float().sum(), given["B"])
    print("held", flush=True)


def swapped() -> None:
    """A tensor that has become another between forward and backward is found: the kernel would read behind its end."""
    forget()
    given = drawn("mamba")
    for _ in range(2):
        call(given)
    y = selective_scan(**given, backend="triton").y
    given["x"].data = given["x"].detach()[:, :2].clone()
    with pytest.raises(ValueError, match="`delta` must have shape"):
        torch.autograd.grad(y.float().sum(), given["B"])
    print("held", flush=True)


def contexts() -> None:
    """Autocast and inference mode, on and off again."""
    forget()
    given = drawn("mamba")
    expected = anew(given)
    for _ in range(3):
        same(call(given), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(call(given), expected)
        with torch.inference_mode():
            same(call(given), expected[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(known(lambda: call(given)), expected)
    y = selective_scan(**given, backend="triton").y
    assert y.requires_grad
    print("held", flush=True)


def held() -> None:
    """Nothing of a call is kept."""
    forget()
    given = drawn("mamba")
    for _ in range(3):
        call(given)
    alive = [weakref.ref(v) for v in given.values() if isinstance(v, torch.Tensor)]
    del given
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    print("held", flush=True)


def main() -> None:
    torch.use_deterministic_algorithms(True)  # what is made answers NaN: an output that is not written shows
    for kind in SHAPES if WHOLE else ("mamba2",):
        trained(kind)
        if WHOLE:
            emitted(kind)
            twice(kind)
    for check in (others, refused, swapped, contexts, held):
        check()


if __name__ == "__main__":
    main()
