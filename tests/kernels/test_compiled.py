"""The compiled loop of the cpu backend: against the closed form and the blocks, its compiles counted and shown."""

import pytest
import torch
from torch._dynamo.utils import counters

from mamba_probe.kernels.scan import Emit, compiled, cpu, cpu_compile, selective_scan

pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")  # torch's own
EMITTED = ("delta", "A_bar", "B_bar", "B", "C", "h", "y", "delta_cumsum", "energy")
CASES = {
    "plain": ("mamba", ()),
    "head_channels": ("mamba_heads", ()),
    "packed": ("mamba", ("seq_idx", "log_decay")),
    "s4d": ("mamba", ("complex", "constant", "zoh")),
    "complex": ("mamba_heads", ("complex", "log_decay", "seq_idx")),
}


def cases(*quick):
    """The cases named, and the others in the long run."""
    return [pytest.param(*CASES[name], id=name, marks=() if name in quick else pytest.mark.long) for name in CASES]


@pytest.fixture(autouse=True)
def cold(monkeypatch, tmp_path):
    """No compile is left from another test or run; kernels of four tokens, which compile in a few seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled._kernel.cache_clear()
    monkeypatch.setattr(compiled, "STEPS", 4)
    monkeypatch.setattr(compiled, "GRADIENT_STEPS", 3)


def by_name(result):
    found = {name: getattr(result.emission, name) for name in EMITTED}
    found |= {"out": result.y, "last_state": result.last_state}
    return {name: value for name, value in found.items() if value is not None}


def run(arguments, when="always", emit=None):
    with cpu_compile(when):
        return by_name(selective_scan(**arguments, emit=emit, backend="cpu"))


def held(oracle, arguments):
    """No bound is broken by what the loop answers; the rest of the emission is the blocks' own."""
    emit = Emit(("h", "y"))
    naive = oracle.by_name(selective_scan(**arguments, emit=emit, backend="naive"))
    return not oracle.violations(run(arguments, emit=emit), oracle.closed_form(**arguments), naive)


@pytest.mark.parametrize(("family", "features"), cases("plain"))
def test_the_closed_form(oracle, family, features):
    assert held(oracle, oracle.featured(oracle.draw(family, 2, 13, 2), features))


@pytest.mark.long
@pytest.mark.parametrize(("family", "features"), cases())
def test_the_closed_form_in_whole_kernels(oracle, monkeypatch, family, features):
    monkeypatch.undo()
    assert compiled.STEPS == 32
    assert held(oracle, oracle.featured(oracle.draw(family, 2, 77, 2), features))


def test_ten_lengths_are_two_compiles_at_most(oracle, capsys):
    """Whatever the strides of the inputs, and whether a gradient could be asked for."""
    before = counters["stats"]["unique_graphs"]
    for token in (1, 2, 3, 4, 5, 8, 11, 64, 99, 257):
        arguments = oracle.draw("mamba", 2, token)
        arguments["x"], arguments["B"] = (arguments[name].mT.contiguous().mT for name in ("x", "B"))
        with torch.set_grad_enabled(token % 2 == 0):
            found, blocks = (run(arguments, when)["out"] for when in ("always", "never"))
        torch.testing.assert_close(found, blocks, rtol=1e-5, atol=1e-5)
    n_compile = counters["stats"]["unique_graphs"] - before
    assert 1 <= n_compile <= 2
    assert capsys.readouterr().err.count("compiled the CPU scan in") == n_compile


def gradients(arguments, when, emit, names):
    """Of one number that every answer enters, each with weights of its own."""
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    found = run(arguments | dict(zip(names, leaves, strict=True)), when, emit)
    generator = torch.Generator().manual_seed(3)
    parts = (torch.view_as_real(value) if value.is_complex() else value for value in found.values())
    total = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def agree(one, other):
    return all((a - b).abs().max() <= 1e-10 * b.abs().max() for a, b in zip(one, other, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(("family", "features"), cases("plain"))
def test_gradients_are_the_blocks(oracle, capsys, family, features):
    """All at once; the blocks' own are held to finite differences."""
    arguments = oracle.cast(oracle.featured(oracle.draw(family, 2, 8, 2), features), torch.float64)
    names = [name for name, value in arguments.items() if torch.is_tensor(value) and name != "seq_idx"]
    asked = arguments, Emit(EMITTED), names
    one, other = (gradients(asked[0], when, *asked[1:]) for when in ("always", "never"))
    assert agree(one, other)
    assert "compiled the gradient of the CPU scan in" in capsys.readouterr().err
    for name in ("h", "energy", "A_bar"):
        alone = [gradients(arguments, when, Emit((name,), tokens=[0, 6]), names) for when in ("always", "never")]
        assert agree(*alone)


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("name", EMITTED)
def test_gradients_of_what_is_emitted(oracle, backend, name):
    """Each alone against finite differences; the scan's own outputs have no part."""
    drawn = oracle.cast(oracle.draw("mamba", 1, 3, shape=(2, 1, 2, False)), torch.float64)
    names = [key for key, value in drawn.items() if torch.is_tensor(value)]

    def call(*tensors):
        arguments = drawn | dict(zip(names, tensors, strict=True))
        return getattr(selective_scan(**arguments, emit=Emit((name,)), backend=backend).emission, name)

    assert torch.autograd.gradcheck(call, [drawn[key].requires_grad_() for key in names])


@pytest.mark.parametrize("only", ["x", "initial_state"])
def test_a_gradient_of_one_input(oracle, monkeypatch, only):
    monkeypatch.setattr(compiled, "_inductor", lambda graph, inputs: graph)
    arguments = oracle.cast(oracle.draw("mamba", 1, 8), torch.float64)
    assert agree(*(gradients(arguments, when, None, [only]) for when in ("always", "never")))


def test_many_shapes_are_no_limit(oracle, monkeypatch):
    """Dynamo gives up on a code object after eight compiles; here each shape has its own."""
    monkeypatch.setattr(compiled, "_inductor", lambda graph, inputs: graph)
    before = counters["stats"]["unique_graphs"]
    for head in range(2, 13):
        arguments = oracle.draw("mamba", 1, 5, shape=(head, 1, 3, False))
        torch.testing.assert_close(run(arguments)["out"], run(arguments, "never")["out"], rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - before == 11


def test_selection_and_dtype_are_the_blocks(oracle, monkeypatch):
    monkeypatch.setattr(compiled, "_inductor", lambda graph, inputs: graph)
    arguments = oracle.draw("mamba", 2, 11)
    emit = Emit(("h", "y", "energy", "A_bar"), tokens=[0, 5, 10], channels=[4, 1], dtype=torch.bfloat16)
    found, blocks = (run(arguments, when, emit) for when in ("always", "never"))
    assert found["h"].dtype == torch.bfloat16
    for name, value in found.items():
        torch.testing.assert_close(value.float(), blocks[name].float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("when", "family", "worth", "expected"),
    [
        ("auto", "mamba", 61, "blocked"),
        ("auto", "mamba", 60, "compiled"),
        ("auto", "mamba2", 0, "chunked"),
        ("never", "mamba", 0, "blocked"),
        ("always", "mamba", 61, "compiled"),
        ("always", "mamba2", 0, "chunked"),
    ],
)
def test_the_rule(oracle, monkeypatch, when, family, worth, expected):
    """2 tokens of 6 channels and 5 states are 60 updates."""
    seen, blocked = [], cpu._blocked
    monkeypatch.setattr(compiled, "WORTH", worth)
    monkeypatch.setattr(compiled, "step", lambda *asked: seen.append("compiled") or blocked(*asked))
    for name in ("blocked", "chunked"):
        step = getattr(cpu, f"_{name}")
        monkeypatch.setattr(cpu, f"_{name}", lambda *asked, name=name, step=step: seen.append(name) or step(*asked))
    run(oracle.draw(family, 1, 2), when)
    assert set(seen) == {expected}


def test_the_setting_is_restored():
    assert cpu_compile.when == "auto"
    with cpu_compile("never"), pytest.raises(ValueError, match="`when` must be one of auto, always, never; got 'yes'"):
        cpu_compile("yes")
    assert cpu_compile.when == "auto"


def test_no_compiler(oracle, monkeypatch):
    """On request it is an error; by itself it falls back, and says so."""
    arguments = oracle.draw("mamba", 1, 5, shape=(7, 1, 3, False))
    monkeypatch.setattr(compiled, "WORTH", 0)
    blocks = run(arguments, "never")["out"]
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        with pytest.raises(ValueError, match=r'cpu_compile\("always"\), but .*install one'):
            run(arguments)
        with pytest.warns(RuntimeWarning, match="runs uncompiled"):
            assert torch.equal(run(arguments, "auto")["out"], blocks)


def test_other_errors_are_not_caught(oracle, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("some other error")

    monkeypatch.setattr(compiled, "_inductor", broken)
    monkeypatch.setattr(compiled, "WORTH", 0)
    with pytest.raises(Exception, match="some other error"):
        run(oracle.draw("mamba", 1, 5), "auto")
