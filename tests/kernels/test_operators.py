"""The scan as an operator of torch: what a compiler sees of it, and that nothing changes by going through it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_probe.kernels.scan import Emit, operators, selective_scan

TOKENS, CHANNELS = (0, 2, 6), (3, 1)
CALLS = {  # family, features, what is emitted, backend
    "mamba": ("mamba", (), None, "cpu"),
    "mamba2": ("mamba2", (), None, "cpu"),
    "emission": ("mamba", ("seq_idx",), "all", "cpu"),
    "selection": ("mamba2", ("log_decay",), "selection", "cpu"),
    "s4d": ("mamba", ("complex", "constant", "zoh"), "all", "cpu"),
    "naive": ("mamba_heads", ("zoh",), "selection", "naive"),
}
EMISSIONS = {"tokens": TOKENS, "channels": CHANNELS, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def call(oracle: Any, case: str, token: int = 7) -> dict[str, Any]:
    family, features, emitted, backend = CALLS[case]
    arguments = oracle.featured(oracle.draw(family, 2, token, 2), features)
    emit = {None: Emit(), "all": Emit(oracle.EMITTED), "selection": Emit(oracle.EMITTED, TOKENS, CHANNELS)}[emitted]
    return arguments | {"emit": emit, "backend": backend}


def flat(arguments, train=False):
    """As the operator takes them."""
    emit = arguments.get("emit", Emit())
    tensors = [arguments.get(name) for name in operators.TENSORS]
    options = [arguments["delta_softplus"], *arguments["delta_limits"], arguments.get("discretization", "euler")]
    return (
        *tensors, *options, ",".join(emit.variables), emit.tokens, emit.channels, emit.dtype,
        arguments.get("backend", "cpu"), train,
    )  # fmt: skip


def with_grad(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All tensors require grad; their names."""
    changed = {
        name: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and name != "seq_idx" else value
        for name, value in arguments.items()
    }
    return changed, [name for name in changed if isinstance(changed[name], torch.Tensor) and name != "seq_idx"]


def gradients(oracle, scan, arguments):
    """Of one number that every answer enters."""
    given, names = with_grad(arguments)
    answers = oracle.by_name(scan(**given))
    whole = torch.stack([(value.abs().double() * (k + 1)).sum() for k, value in enumerate(answers.values())]).sum()
    found = torch.autograd.grad(whole, [given[name] for name in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("case", CALLS)
def test_torch_finds_nothing_wrong(oracle, case):
    arguments, _ = with_grad(call(oracle, case))
    found = torch.library.opcheck(torch.ops.mamba_probe.scan.default, flat(arguments))
    assert set(found.values()) == {"SUCCESS"}, found


def test_torch_finds_nothing_wrong_with_the_backward(oracle):
    arguments = call(oracle, "selection")
    answers = torch.ops.mamba_probe.scan.default(*flat(arguments))
    grads = [None, *map(torch.randn_like, answers[1:])]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    backward = torch.ops.mamba_probe.scan_backward.default
    found = torch.library.opcheck(backward, (grads, None, *flat(arguments), "x,A,C,D"), test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("features", [(), ("complex", "constant")])
def test_fake_answers_have_the_form_of_real_ones(oracle, family, features):
    arguments = oracle.featured(oracle.draw(family, 2, 7, 2), features)
    emits = [Emit((name,)) for name in oracle.EMITTED] + [Emit(oracle.EMITTED)]
    emits += [Emit(oracle.EMITTED, **{name: value}) for name, value in EMISSIONS.items() if name != "dtype"]
    emits += [] if features else [Emit(oracle.EMITTED, dtype=torch.bfloat16)]
    for emit in emits:
        given = flat(arguments | {"emit": emit})
        real = torch.ops.mamba_probe.scan.default(*given)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in given]
            fake = torch.ops.mamba_probe.scan.default(*faked)
        forms = [[(each.shape, each.dtype, each.stride()) for each in answers] for answers in (real, fake)]
        assert forms[0] == forms[1], emit


@pytest.mark.parametrize("case", CALLS)
def test_ten_lengths_are_two_compiles_without_a_break(oracle, case):
    counter = CompileCounter()
    compiled = torch.compile(selective_scan, fullgraph=True, backend=counter)
    for token in (7, 8, 11, 16, 17, 31, 64, 65, 100, 129):
        arguments = call(oracle, case, token)
        found, expected = (oracle.by_name(scan(**arguments)) for scan in (compiled, selective_scan))
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (name, token)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("case", ["mamba", "emission", "selection", "s4d"])
def test_gradients_through_the_operator_are_those_without(oracle, case):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan, fullgraph=True, backend=counter)
    for token in (7, 12, 9):
        arguments = call(oracle, case, token)
        expected, found = (gradients(oracle, scan, arguments) for scan in (selective_scan, compiled))
        for name, value in expected.items():
            assert name == "A" or value.abs().max() > 0, name  # log_decay stands in the place of A
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())
    assert counter.frame_count <= 2


def test_inductor_compiles_around_it(oracle):
    arguments = oracle.draw("mamba", 1, 9)

    def layer(x, **others):
        y, _, emission = selective_scan(x.sin(), **others, emit=Emit(("delta",)))
        assert emission.delta is not None
        return y.cos() + emission.delta[..., None]

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), layer(**arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["selection", "emission"])
def test_autocast_reaches_nothing_inside(oracle, case):
    arguments = call(oracle, case)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    plain = oracle.by_name(selective_scan(**arguments)), gradients(oracle, compiled, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        for scan in (selective_scan, compiled):
            found = oracle.by_name(scan(**arguments))
            assert all(torch.equal(found[name], value) for name, value in plain[0].items())
        found = gradients(oracle, compiled, arguments)
    assert all(torch.equal(found[name], value) for name, value in plain[1].items())


def test_two_threads_at_once(oracle):
    cases, ready = ["mamba", "selection"] * 2, Barrier(4)
    alone = [gradients(oracle, selective_scan, call(oracle, case)) for case in cases]

    def run(case):
        arguments = call(oracle, case)
        ready.wait()
        given, _ = with_grad(arguments)
        out, last, *_ = torch.ops.mamba_probe.scan.default(*flat(given))
        return [gradients(oracle, selective_scan, arguments) for _ in range(5)], (out, last)

    with ThreadPoolExecutor(4) as pool:
        for case, expected, (found, (out, last)) in zip(cases, alone, pool.map(run, cases), strict=True):
            single = selective_scan(**call(oracle, case))
            assert torch.equal(out, single.y)
            assert torch.equal(last, single.last_state)
            assert all(torch.equal(one[name], value) for one in found for name, value in expected.items())


def python(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)


def test_imported_twice_it_is_registered_once():
    code = """
import gc, importlib, sys, torch
import mamba_probe.kernels.scan as first
one = torch.ones(1, 3, 1, 1)
inputs = one.requires_grad_(), one[..., 0], -one[0, :1, 0], one, one
expected = first.selective_scan(*inputs).y
before = torch.ops.mamba_probe.scan.default
importlib.reload(first.operators)
for name in [name for name in sys.modules if name.startswith("mamba_probe")]:
    del sys.modules[name]
del first
gc.collect()
import mamba_probe.kernels.scan as second
assert torch.ops.mamba_probe.scan.default is before
compiled = torch.compile(second.selective_scan, fullgraph=True, backend="aot_eager")
found = compiled(*inputs, emit=second.Emit(("h",))).y
found.sum().backward()
print(torch.equal(found, expected), one.grad is not None)
"""
    done = python("-W", "ignore", "-c", code)
    assert done.stdout.strip() == "True True", done.stderr


def test_the_interpreted_kernels_through_the_operator(interpreted):
    assert interpreted("interpreted_operators.py") == ["equal", "fake", "equal", "refused"]


def test_wrong_input_is_named_while_traced(oracle):
    arguments = oracle.draw("mamba2", 2, 7, 2)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="eager")
    for change, message in (
        (
            {"delta": arguments["delta"][:, :5]},
            r"`delta` must have shape \(batch 2, token 7, head 4\); got \(2, 5, 4\)",
        ),
        ({"discretization": "zho"}, "unknown `discretization` 'zho'; did you mean 'zoh'"),
        ({"emit": Emit(("h",), tokens=[7])}, r"`emit.tokens` holds 7, but this call has 7 tokens"),
        ({"backend": "fused"}, "unknown `backend` 'fused'. Known: auto, naive, cpu, triton"),
        ({"backend": "triton"}, r'`x` is on cpu: use backend="cpu"'),
        ({"A": arguments["A"].double()}, "float64 is all or none: A are float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled(**arguments | change)


def test_called_by_itself_the_operator_raises_our_error(oracle):
    arguments = oracle.draw("mamba2", 2, 7, 2)
    with pytest.raises(ValueError, match=r"`delta` must have shape \(batch 2, token 7, head 4\)"):
        torch.ops.mamba_probe.scan.default(*flat(arguments | {"delta": arguments["x"]}))


def test_a_second_derivative_is_refused(oracle):
    given, _ = with_grad(oracle.draw("mamba", 1, 5))
    compiled = torch.compile(selective_scan, fullgraph=True, backend="eager")
    loss = compiled(**given).y.square().sum()
    with pytest.raises(ValueError, match=r'no second derivative .*use backend="cpu", outside of torch.compile'):
        torch.autograd.grad(loss, given["x"], create_graph=True)


def test_uncompiled_calls_go_straight_to_the_backend(oracle, monkeypatch):
    """The operator costs tens of microseconds; and plain torch has derivatives of any order and in forward mode."""
    monkeypatch.setattr(operators, "scan", None)
    given, _ = with_grad(oracle.draw("mamba", 1, 5))
    first = torch.autograd.grad(selective_scan(**given).y.square().sum(), given["x"], create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), given["A"])[0]
    assert second.abs().max() > 0
