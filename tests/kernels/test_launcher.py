"""Plans: what a call of a form that is known already does, and when it is asked anew what to launch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import knobs

from mamba_probe.kernels.scan import Emit, arguments, launcher, selective_scan
from mamba_probe.kernels.scan.arguments import TENSORS, formed

GRID = (3, 2, 1)


class Version:
    """Of a kernel, as Triton answers it; it notes what it is run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: Any = []

    def run(self, *given: Any) -> None:
        self.runs.append(given)


class Kernel:
    """As much of one as a plan calls, interpreted or not."""

    def __init__(self, is_compiled: bool = True) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.versions: list[Version] = []
        self.is_compiled = is_compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def ask(*given: Any, **options: Any) -> Version | None:
            self.asked.append((grid, given, options))
            if not self.is_compiled:
                return None
            self.versions.append(Version())
            return self.versions[-1]

        return ask


class Driver:
    def get_current_stream(self, device: int | None) -> str:
        return f"stream of {device}"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(arguments, "_forms", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def simple(kernel: Any) -> launcher.Plan:
    plan = launcher.Plan(torch.device("cpu"))
    out = plan.make("out", (2, 3), torch.float32)
    piece = plan.empty("piece", (5,), torch.bfloat16)
    other = plan.empty("other", (7, 2), torch.float64)
    rest = plan.part("rest", other, 3)
    plan.add(kernel, GRID, "x", None, "missing", out, piece, other, rest, 17, (4, 1), None, num_warps=2)
    return plan


def test_triton_is_asked_once_and_then_launched_by_addresses():
    kernel, x = Kernel(), torch.ones(4)
    plan = simple(kernel)
    first = launcher.start(plan, {"x": x, "missing": None, "unused": x})
    ((grid, given, options),) = kernel.asked
    assert grid == GRID
    assert options == {"num_warps": 2}
    assert given[0] is x
    assert given[1:3] == (None, None)
    assert given[3] is first["out"]
    assert [(t.shape, t.dtype) for t in given[4:6]] == [((5,), torch.bfloat16), ((7, 2), torch.float64)]
    assert given[5].data_ptr() - given[4].data_ptr() == launcher.ALIGNED
    assert given[6].data_ptr() - given[5].data_ptr() == 3 * 8
    assert given[6].shape == (7 * 2 - 3,)
    assert given[7:] == (17, (4, 1), None)
    assert not kernel.versions[0].runs

    made = launcher.start(plan, {"x": x, "missing": None, "unused": x})
    assert len(kernel.asked) == 1
    assert list(made) == ["out"]
    assert made["out"] is not first["out"]
    (run,) = kernel.versions[0].runs
    assert run[:9] == (*GRID, "stream of None", "function", "metadata", None, None, None)
    assert run[9:13] == (x.data_ptr(), None, None, made["out"].data_ptr())
    assert run[14] - run[13] == launcher.ALIGNED
    assert run[15] - run[14] == 3 * 8
    assert run[16:] == (17, (4, 1), None)


def test_what_a_launch_fills_is_made_after_the_launches_before_it(monkeypatch):
    """A device that waits for the first gets it sooner."""
    kernels, events, x = (Kernel(), Kernel()), [], torch.ones(4)
    plan = launcher.Plan(torch.device("cpu"))
    for i, kernel in enumerate(kernels):
        plan.add(kernel, GRID, "x", plan.make(f"out {i}", (2, 3), torch.float32))
    first = launcher.start(plan, {"x": x})
    make = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: events.append("made") or make(*a, **k))
    for kernel in kernels:
        kernel.versions[0].runs = SimpleNamespace(append=lambda given: events.append(given[-1]))
    second = launcher.start(plan, {"x": x})
    assert events == ["made", second["out 0"].data_ptr(), "made", second["out 1"].data_ptr()]
    assert [(name, t.shape, t.is_contiguous()) for name, t in second.items()] == [
        (name, t.shape, True) for name, t in first.items()
    ]


def test_another_alignment_is_another_version():
    kernel, x = Kernel(), torch.ones(9)
    plan = simple(kernel)
    for tensor in (x, x[1:], x[2:], x[4:], x[5:], x):
        launcher.start(plan, {"x": tensor, "missing": None})
    assert [given[0].data_ptr() - x.data_ptr() for _, given, _ in kernel.asked] == [0, 4, 8]
    runs = [[run[9] - x.data_ptr() for run in version.runs] for version in kernel.versions]
    assert runs == [[16, 0], [20], []]


def test_an_interpreted_kernel_is_given_tensors_every_time():
    kernel, x = Kernel(is_compiled=False), torch.ones(4)
    plan = simple(kernel)
    for _ in range(3):
        launcher.start(plan, {"x": x, "missing": None})
    assert [given[0] for _, given, _ in kernel.asked] == [x] * 3
    assert not plan.steps


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_asked_triton_to_be_told_of_launches_is(hook):
    kernel, x = Kernel(), torch.ones(4)
    plan, chain, told = simple(kernel), getattr(knobs.runtime, hook), lambda data: None
    for _ in range(2):
        launcher.start(plan, {"x": x, "missing": None})
    chain.add(told)
    try:
        launcher.start(plan, {"x": x, "missing": None})
    finally:
        chain.remove(told)
    assert len(kernel.asked) == 2
    assert sum(len(version.runs) for version in kernel.versions) == 1


def test_a_plan_is_made_once():
    made, plans = [], {}
    make = lambda: made.append(launcher.Plan(torch.device("cpu"))) or made[-1]  # noqa: E731
    assert launcher.planned(plans, "key", make) is launcher.planned(plans, "key", make)
    assert launcher.planned(None, "key", make) is not launcher.planned(None, "key", make)
    assert len(made) == 3


def call(oracle: Any, **changes: Any) -> Any:
    drawn = oracle.draw("mamba", 2, 6) | changes
    tensors = tuple(drawn.get(name) for name in TENSORS)
    options = drawn["delta_softplus"], drawn["delta_limits"], drawn.get("discretization", "euler"), drawn.get("emit")
    return formed(tensors, *options)


def test_like_calls_share_their_plans(oracle):
    a, plans = call(oracle)
    b, others = call(oracle)
    assert plans is others
    assert a is not b
    assert a.x is not b.x


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x.bfloat16()),
        ("x", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("B", lambda B: B.expand(-1, -1, 1, -1)[:, :1].expand(-1, 6, -1, -1)),
        ("D", lambda D: None),
        ("z", lambda z: z[..., :0].new_zeros(1).expand(z.shape)),
        ("delta_bias", lambda bias: bias.bfloat16()),
        ("delta_softplus", lambda softplus: not softplus),
        ("delta_limits", lambda limits: (0.0, 0.5)),
        ("discretization", lambda _: "zoh"),
        ("emit", lambda _: Emit(("delta",))),
        ("emit", lambda _: Emit(tokens=(0, 3))),
    ],
)
def test_others_do_not(oracle, name, change):
    drawn = oracle.draw("mamba", 2, 6)
    _, plans = call(oracle)
    _, others = call(oracle, **{name: change(drawn.get(name))})
    assert plans is not others


def test_a_known_form_is_brought_into_the_form_of_arguments(oracle):
    """The second call knows what to do; the first found it out."""
    drawn = oracle.draw(None, 2, 6, shape=(8, 1, 3, False))
    changes = {"A": torch.randn(3, 8).bfloat16().t(), "D": torch.randn(8).half()}
    changes |= {"delta_bias": torch.randn(16).half()[::2]}
    for _ in range(2):
        a, _ = call(oracle, **drawn | changes)
        assert (a.A.dtype, a.A.shape, a.A.is_contiguous()) == (torch.float32, (8, 3), True)
        assert (a.delta_bias.dtype, a.delta_bias.is_contiguous()) == (torch.float32, True)
        assert (a.D.dtype, a.D.shape) == (torch.float32, (8, 1))
        assert torch.equal(a.A, changes["A"].float())
        assert torch.equal(a.delta_bias, changes["delta_bias"].float())
        assert torch.equal(a.D[:, 0], changes["D"].float())


def test_wrong_input_is_refused_every_time(oracle):
    arguments_of = oracle.draw("mamba", 2, 6)
    for _ in range(2):
        with pytest.raises(ValueError, match="`delta` must have shape"):
            selective_scan(**arguments_of | {"delta": arguments_of["delta"][:, :5]})
        with pytest.raises(ValueError, match=r"`B` must be a torch\.Tensor; got list"):
            selective_scan(**arguments_of | {"B": arguments_of["B"].tolist()})
        with pytest.raises(ValueError, match="`emit` must be an Emit; got list"):
            selective_scan(**arguments_of | {"emit": ["h"]})
    selective_scan(**arguments_of)
    assert len(arguments._forms) == 1


def test_few_forms_are_remembered(oracle, monkeypatch):
    monkeypatch.setattr(arguments, "LIMIT", 3)
    drawn = oracle.draw("mamba", 1, 9)
    for n in range(1, 9):
        formed([drawn[name][:, :n] if name in ("x", "delta", "B", "C", "z") else drawn.get(name) for name in TENSORS],
               True, (0.0, 1.0), "euler", None)  # fmt: skip
        assert len(arguments._forms) <= 3


def test_a_plan_holds_nothing_of_the_call_that_made_it(interpreted):
    assert interpreted("interpreted_plans.py") == ["equal"] * 6


def test_of_another_order_of_names_the_addresses_are_the_same_arguments():
    """What is not given is None."""
    kernel, x = Kernel(), torch.ones(4)
    plan = simple(kernel)
    for names in (("x", "missing"), ("missing", "x"), ("x",)) * 2:
        made = launcher.run(plan, names, [x if name == "x" else None for name in names])
        assert len(made) == 1
    assert len(kernel.asked) == 3
    for version in kernel.versions:
        (run,) = version.runs
        assert run[9:12] == (x.data_ptr(), None, None)
        assert run[14] - run[13] == launcher.ALIGNED


@pytest.mark.parametrize(("given", "cases"), [([], 6), pytest.param(["all"], 14, marks=pytest.mark.long)])
def test_a_call_that_is_known_does_what_the_first_did(interpreted, given, cases):
    assert interpreted("interpreted_known.py", *given) == ["held"] * cases
