"""Triton's kernels through the operator and its backward, interpreted: a script for `interpret.py`."""

import re
from typing import Any

import pytest
import torch
from oracle import by_name, draw
from torch._subclasses.fake_tensor import FakeTensorMode

from mamba_probe.kernels.scan import Emit, selective_scan


def gradients(scan, arguments, backend="triton", **options):
    given = {name: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    names = [name for name in given if isinstance(given[name], torch.Tensor)]
    answers = by_name(scan(**given, backend=backend, **options)).values()
    whole = torch.stack([(value * (k + 1)).sum() for k, value in enumerate(answers)]).sum()
    return dict(zip(names, torch.autograd.grad(whole, [given[name] for name in names]), strict=True))


def refused(scan, arguments, message, **options):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        gradients(scan, arguments, **options)
    print("refused", flush=True)


def faked_states(arguments):
    """Shape of the states that are saved for a sequence 26 times as long."""
    from mamba_probe.kernels.scan.arguments import check
    from mamba_probe.kernels.scan.gpu import empty_states

    nothing = {"seq_idx": None, "log_decay": None, "discretization": "euler", "emit": None}
    with FakeTensorMode() as mode:
        faked: dict[str, Any] = {
            name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()
        }
        long = {name: torch.cat([faked[name]] * 26, 1) for name in ("x", "delta", "B", "C", "z")}
        (states,) = empty_states(check(**faked | long, **nothing))
        return states.shape


def main():
    arguments = draw(None, 1, 5, shape=(3, 1, 2, False))
    emit = Emit(("delta", "B", "h", "y"), tokens=(0, 3), channels=(2, 0))
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    found, plain = (gradients(selective_scan, arguments, emit=given) for given in (emit, None))
    with torch.autocast("cpu", torch.bfloat16):
        again = gradients(compiled, arguments, emit=emit)
    for name, value in found.items():
        assert torch.equal(value, again[name]), name
        assert value.shape == arguments[name].shape, name
    assert not torch.equal(found["B"], plain["B"])
    print("equal", flush=True)
    assert faked_states(arguments) == (1, 2, 3, 1, 2), "those before tokens 64 and 128 of 130"
    print("fake", flush=True)
    two = draw("mamba2", 1, 5)
    found, expected = (gradients(selective_scan, two, backend) for backend in ("triton", "cpu"))
    for name, value in gradients(compiled, two).items():
        assert torch.equal(value, found[name]), name
        assert (value - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    print("equal", flush=True)
    refused(selective_scan, arguments, "no gradient of the emitted `mass`", emit=Emit(("mass",)))


if __name__ == "__main__":
    main()
