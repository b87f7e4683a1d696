"""The Triton backward without a GPU: through the interpreter, and compiled for an H200."""

import json

import pytest
import torch

from mamba_probe.kernels.scan import gpu, launcher
from mamba_probe.kernels.scan.arguments import TENSORS, formed

NARROW = ("x", "delta", "B", "C", "z")


def test_interpreted_gradients_hold_the_bound(interpreted):
    assert len(interpreted("interpreted_backward.py")) == 16


@pytest.mark.long
def test_interpreted_gradients_of_every_pair_of_features(interpreted):
    assert len(interpreted("interpreted_backward.py", "all")) == 78


def test_the_backward_compiles_for_an_h200(script):
    """Two warps on each of an SM's four schedulers; what is spilled is constants of the loop."""
    found = [json.loads(line) for line in script("resources.py", "backward")]
    kernels = ["backward_kernel", "backward_kernel", "sums_kernel"]
    assert [(one["case"], one["kernel"]) for one in found] == [
        (f"backward {dtype}", kernel) for dtype in ("bf16", "fp32") for kernel in kernels
    ]
    for one in found:
        if one["kernel"] == "sums_kernel":  # twelve programs of four warps on an SM, at least
            assert (one["stack"], one["reg"] <= 40, one["shared"] <= 2048) == (0, True, True), one
            continue
        assert one["reg"] <= 255, one
        assert one["stack"] <= 96, one
        assert one["shared"] <= 16 * 1024, one


class Version:
    """Of a kernel, that does nothing."""

    function = packed_metadata = run = staticmethod(lambda *given: None)


class Driver:
    def get_current_stream(self, device):
        return 0


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """What torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "scalar"), [((8, 1), False), ((4, 3), False), ((4, 3), True)])
def test_the_host_makes_gradients_and_launches_and_nothing_else(oracle, monkeypatch, rows, scalar):
    """Of the inputs' own dtypes and sizes, each of its own memory, and one tensor for all that lies between."""
    drawn = oracle.draw(None, 2, 70, shape=(*rows, 4, scalar))
    given = oracle.cast(drawn, torch.bfloat16, NARROW) | {"D": torch.ones(rows)}
    tensors = tuple(given.get(name) for name in TENSORS)
    a, plans = formed(tensors, True, (0.0, 1.0), "euler", None)
    monkeypatch.setattr(launcher.Launch, "__call__", lambda self, tensors: Version())
    monkeypatch.setattr(launcher.triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(gpu, "check_device", lambda device: None)
    states = next(iter(gpu.empty_states(a)), None)
    call = lambda: gpu.backward(a, states, {"out": torch.ones_like(a.x)}, plans)  # noqa: E731
    call()
    with Counted() as counted:
        found = call()
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == len(found) == 9
    for name, value in found.items():
        assert (value.dtype, value.shape) == (given[name].dtype, given[name].shape), name
        assert value.is_contiguous(), name
    rest = [name for name in counted.names if name not in ("empty", "empty_strided")]
    assert rest == ["ones_like"], counted.names
    assert len(counted.names) - 1 == len(found) + 1
