"""The scan's operators on a CUDA device: inductor, CUDA graphs, autocast. Never skips; run with `pytest -m gpu`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mamba_probe.kernels.scan import Emit, operators, selective_scan

pytestmark = pytest.mark.gpu

SHAPES = {"mamba": (256, 1, 16, False), "mamba2": (8, 64, 128, True)}
NARROW = ("x", "delta", "B", "C", "z")


@pytest.fixture(autouse=True)
def _cuda():
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    torch._dynamo.reset()
    yield
    torch.cuda.empty_cache()


def arguments(oracle, family, token=300):
    drawn = oracle.draw(None, 2, token, shape=SHAPES[family], device="cuda")
    return oracle.cast(drawn, torch.bfloat16, NARROW)


def gradients(oracle, scan, given, **options):
    """Of all answers, and the answers."""
    given = {name: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    answers = oracle.by_name(scan(**given, **options))
    whole = torch.stack([(value.float() * (k + 1)).sum() for k, value in enumerate(answers.values())]).sum()
    tensors = {name: v for name, v in given.items() if isinstance(v, torch.Tensor)}
    found = torch.autograd.grad(whole, list(tensors.values()), materialize_grads=True)
    return answers | {f"d_{name}": value for name, value in zip(tensors, found, strict=True)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def leaves(given):
    return [value for value in given.values() if isinstance(value, torch.Tensor)]


def captured(run):
    """A graph of `run`, and what it answers with."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


def differentiated(given):
    """y, and what goes back from it alone."""
    y = selective_scan(**given).y
    return [
        y,
        *torch.autograd.grad(y, leaves(given), torch.linspace(-1, 2, y.numel(), device="cuda").to(y).view(y.shape)),
    ]


@pytest.mark.parametrize("family", SHAPES)
def test_a_known_call_answers_what_the_first_did(oracle, family):
    """At another alignment and under autocast, too."""
    operators._known.clear()
    given = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in arguments(oracle, family).items()}
    first, _, third = (differentiated(given) for _ in range(3))
    ((known,),) = operators._known.values()
    assert known.backwards
    x = given["x"].detach()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x).requires_grad_()
    moved = [differentiated(given | {"x": shifted}) for _ in range(3)]  # another version of the kernels: its own bits
    assert all(torch.equal(one, other) for each in moved for one, other in zip(each, moved[0], strict=True))
    for one, other in zip(moved[0], first, strict=True):  # one rounding to bf16, either way
        assert (one - other).abs().max() <= 2**-7 * other.abs().max()
    found = [third]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found += [differentiated(given) for _ in range(3)]
    for each in found:
        assert all(torch.equal(one, other) for one, other in zip(each, first, strict=True))


@pytest.mark.parametrize("family", SHAPES)
def test_a_known_call_emits_what_the_first_did(oracle, family):
    operators._known.clear()
    given = arguments(oracle, family)
    for names in (("delta", "B", "C"), ("delta", "A_bar", "h", "y")):
        found = [selective_scan(**given, emit=Emit(names)) for _ in range(3)]
        ((known,),) = operators._known.values()
        assert known.emitted == tuple(name for name in names if name not in "BC")
        operators._known.clear()
        for each in found[1:]:
            assert torch.equal(each.y, found[0].y)
            assert torch.equal(each.last_state, found[0].last_state)
            for name in names:
                assert torch.equal(getattr(each.emission, name), getattr(found[0].emission, name)), name


@pytest.mark.parametrize("family", SHAPES)
def test_a_known_call_is_captured(oracle, family):
    """Leaves of its own: those that went back on another stream tie the engine to that."""
    drawn = arguments(oracle, family)

    def run():
        return differentiated({k: v.detach().requires_grad_() if torch.is_tensor(v) else v for k, v in drawn.items()})

    operators._known.clear()
    first, _ = run(), run()
    graph, found = captured(run)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True))


@pytest.mark.parametrize("family", SHAPES)
def test_inductor_with_ten_lengths(oracle, family):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(selective_scan, fullgraph=True, backend=counter)
    emit = Emit(("delta", "h"), channels=(3, 1))
    for token in (300, 64, 65, 100, 128, 129, 500, 777, 1000, 1024):
        given = arguments(oracle, family, token)
        assert_equal(*(oracle.by_name(scan(**given, emit=emit)) for scan in (compiled, selective_scan)))
    assert counter.frame_count <= 2


def test_inductor_goes_back_through_it(oracle):
    compiled = torch.compile(selective_scan, fullgraph=True)
    for token in (300, 65, 777):
        given = arguments(oracle, "mamba", token)
        emit = Emit(("delta", "y"))
        assert_equal(*(gradients(oracle, scan, given, emit=emit) for scan in (compiled, selective_scan)))


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    "emit", [None, Emit(("delta", "A_bar", "mass")), Emit(("h", "y"), (0, 7, 250), (5, 2))], ids=str
)
def test_a_graph_captures_it(oracle, family, emit):
    given = arguments(oracle, family)
    replayed(given, lambda: oracle.by_name(selective_scan(**given, emit=emit)))


def test_a_graph_captures_forward_and_backward(oracle):
    given = arguments(oracle, "mamba")
    emit = Emit(("delta", "y"))
    replayed(given, lambda: gradients(oracle, selective_scan, given, emit=emit))


def replayed(given, run):
    """A captured `run` answers for new values in the same memory as a call of its own does."""
    graph, found = captured(run)
    graph.replay()
    before = found["out"].clone()
    for name in ("x", "delta", "B", "C"):
        given[name].copy_(torch.randn_like(given[name]))
    expected = run()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(found, expected)
    assert not torch.equal(before, found["out"])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own begin with one
def test_reduce_overhead_keeps_its_answers(oracle):
    compiled = torch.compile(selective_scan, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        given = arguments(oracle, "mamba") | {"x": torch.randn(2, 300, 256, 1, device="cuda").bfloat16() * (seed + 1)}
        torch.compiler.cudagraph_mark_step_begin()
        found = oracle.by_name(compiled(**given, emit=Emit(("delta", "h"), tokens=(3, 299))))
        assert_equal(found, oracle.by_name(selective_scan(**given, emit=Emit(("delta", "h"), tokens=(3, 299)))))


def test_gradients_under_autocast_are_those_without(oracle):
    given = arguments(oracle, "mamba")
    expected = gradients(oracle, selective_scan, given)
    compiled = torch.compile(selective_scan, fullgraph=True)
    with torch.autocast("cuda", torch.float16):
        for scan in (selective_scan, compiled):
            assert_equal(gradients(oracle, scan, given), expected)


def test_the_current_device_need_not_be_the_tensors(oracle):
    given = arguments(oracle, "mamba")
    last = torch.cuda.device_count() - 1
    moved = {name: v.to(f"cuda:{last}") if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    expected, found = (gradients(oracle, selective_scan, each) for each in (given, moved))
    assert_equal({name: value.to("cuda:0") for name, value in found.items()}, expected)
