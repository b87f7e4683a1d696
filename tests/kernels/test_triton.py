"""The Triton backend without a GPU: its arithmetic through the interpreter, and how it is chosen and refused."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mamba_probe.kernels.scan import choose_backend, selective_scan


def python(*arguments, **environment):
    """A fresh interpreter, in which Triton was not imported yet; TRITON_INTERPRET stays out of this process."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("given", "cases"), [([], 40), pytest.param(["all"], 46, marks=pytest.mark.long)])
def test_the_interpreted_kernel_holds_the_bound(interpreted, given, cases):
    assert len(interpreted("interpreted.py", *given)) == cases


def test_the_kernels_compile_for_an_h200_without_spills(script):
    """Registers bound how many programs an SM holds; the stack is where they spill."""
    found = [json.loads(line) for line in script("resources.py")]
    fused = [one for one in found if one["case"].startswith("fused")]
    assert len(fused) == 7
    for one in fused:
        assert one["reg"] <= 168, one
        assert one["stack"] <= (32 if "A_bar" in one["case"] else 0), one
    assert max(one["shared"] for one in found) <= 113 * 1024, "two programs on an SM"


def test_importing_and_running_the_scan_leaves_triton_out():
    code = (
        "import sys, torch; import mamba_probe.kernels.scan as scan; one = torch.ones(1, 2, 1, 1);"
        "scan.selective_scan(one, one[..., 0], -one[0, :1, 0], one, one);"
        "print([name for name in sys.modules if name.startswith(('triton', 'transformers', 'matplotlib'))])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_cpu_tensors_are_refused_with_the_two_ways_out(oracle):
    arguments = oracle.draw("mamba", 1, 4)
    with pytest.raises(ValueError, match=r'`x` is on cpu: use backend="cpu", or set TRITON_INTERPRET=1'):
        selective_scan(**arguments, backend="triton")


def test_gradients_are_refused_by_name():
    code = (
        "import torch; from mamba_probe.kernels.scan import selective_scan; one = torch.ones(1, 2, 1, 1)\n"
        "from mamba_probe.kernels.scan import Emit\n"
        "inputs = one, one[..., 0], one[0, 0, :, 0], one, one.clone().requires_grad_(), torch.ones(1)\n"
        "found = selective_scan(*inputs, backend='triton', emit=Emit(('mass',))); print(found.y.detach())\n"
        "found.emission.mass.sum().backward()"
    )
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.stdout.startswith("tensor"), done.stderr
    assert 'ValueError: backend "triton" has no gradient of the emitted `mass`' in done.stderr
    assert 'use backend="cpu"' in done.stderr


def test_auto_chooses_by_device_and_never_naive(oracle, monkeypatch):
    assert choose_backend(torch.device("cpu")).name == "cpu"
    assert choose_backend("cuda:0").name == "triton"
    assert choose_backend("meta").name == "cpu"
    assert "cpu" in choose_backend("cpu").reason
    monkeypatch.setattr("mamba_probe.kernels.scan.naive.scan", None)
    arguments = oracle.draw("mamba", 1, 4)
    assert torch.equal(selective_scan(**arguments).y, selective_scan(**arguments, backend="cpu").y)


def test_a_missing_triton_is_named(oracle, monkeypatch):
    monkeypatch.setattr("mamba_probe.kernels.scan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'triton package, which is not installed: use backend="cpu"'):
        selective_scan(**oracle.draw("mamba", 1, 4), backend="triton")
