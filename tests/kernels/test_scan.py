"""The torch backends against a closed form that shares no code with them, and against theorems of the recurrence."""

import math

import pytest
import torch

from mamba_probe.kernels.scan import Emit, cpu, selective_scan

FAMILIES = ("mamba", "mamba2", "mamba_heads")
LENGTHS = (1, 3, 63, 64, 65, 257)
LAYOUTS = ((1, 1), (2, 2), (3, 1))  # batch, group
TORCH = ("naive", "cpu")
BLOCKS = pytest.mark.parametrize("block_bytes", [cpu.BLOCK_BYTES, 50_000], ids=["one_block", "many_blocks"])


@pytest.fixture
def nan_in_empty():
    """torch.empty answers NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token", LENGTHS)
@pytest.mark.parametrize(("batch", "group"), LAYOUTS)
def test_naive_is_the_closed_form(oracle, family, token, batch, group):
    arguments = oracle.cast(oracle.draw(family, batch, token, group), torch.float64)
    result = oracle.by_name(selective_scan(**arguments, emit=Emit(oracle.EMITTED), backend="naive"))
    assert set(result) == {"out", "last_state", *oracle.EMITTED}
    assert max(oracle.errors(result, oracle.closed_form(**arguments)).values()) < 1e-12


@BLOCKS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("token", LENGTHS)
@pytest.mark.parametrize(("batch", "group"), LAYOUTS)
def test_cpu_holds_the_bound(oracle, monkeypatch, nan_in_empty, family, token, batch, group, block_bytes):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    arguments = oracle.draw(family, batch, token, group)
    exact = oracle.closed_form(**arguments)
    emit = Emit(oracle.EMITTED)
    naive, found = (oracle.by_name(selective_scan(**arguments, emit=emit, backend=name)) for name in TORCH)
    assert not oracle.violations(found, exact, naive)
    double = selective_scan(**oracle.cast(arguments, torch.float64), emit=emit, backend="cpu")
    assert max(oracle.errors(oracle.by_name(double), exact).values()) < 1e-12


def test_many_blocks_are_many(oracle, monkeypatch):
    """The small budget of these tests does split the work; else the test above tests one block."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 50_000)
    lengths = []
    for name in ("_blocked", "_chunked"):
        step = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda h, block, step=step: lengths.append(block.x.shape[1]) or step(h, block))
    for family in FAMILIES:
        lengths.clear()
        selective_scan(**oracle.draw(family, 3, 257), backend="cpu")
        assert len(lengths) > 4
        assert sum(lengths) == 257


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", TORCH)
def test_nothing_optional(oracle, family, backend):
    arguments = oracle.draw(family, 2, 20, 2)
    plain = {name: arguments[name] for name in ("x", "delta", "A", "B", "C")}
    plain["delta"] = plain["delta"] + 2  # partly negative: the default limits clamp these at zero
    result = oracle.by_name(selective_scan(**plain, backend=backend))
    assert set(result) == {"out", "last_state"}
    assert max(oracle.errors(result, oracle.closed_form(**plain)).values()) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [1, 5, 64, 69])
@pytest.mark.parametrize("backend", TORCH)
def test_split_scan_is_the_whole_scan(oracle, family, cut, backend):
    arguments = oracle.draw(family, 2, 70, 2)
    whole = selective_scan(**arguments, backend=backend)
    per_token = ("x", "delta", "B", "C", "z")
    first = arguments | {name: arguments[name][:, :cut].contiguous() for name in per_token}
    head = selective_scan(**first, backend=backend)
    second = arguments | {name: arguments[name][:, cut:] for name in per_token} | {"initial_state": head.last_state}
    tail = selective_scan(**second, backend=backend)
    y = torch.cat([head.y, tail.y], 1)
    if backend == "naive":
        assert torch.equal(y, whole.y)
        assert torch.equal(tail.last_state, whole.last_state)
    torch.testing.assert_close(y, whole.y, rtol=0, atol=1e-6 * whole.y.abs().max().item())
    torch.testing.assert_close(
        tail.last_state, whole.last_state, rtol=0, atol=1e-6 * whole.last_state.abs().max().item()
    )


@BLOCKS
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", TORCH)
def test_emission_is_the_selection_of_all_and_leaves_y(oracle, monkeypatch, family, backend, block_bytes):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    arguments = oracle.draw(family, 2, 200, 2)
    tokens, channels = (0, 63, 64, 130, 199), (3, 0)
    full = oracle.by_name(selective_scan(**arguments, emit=Emit(oracle.EMITTED), backend=backend))
    emit = Emit(oracle.EMITTED, tokens=tokens, channels=channels)
    part = oracle.by_name(selective_scan(**arguments, emit=emit, backend=backend))
    bare = oracle.by_name(selective_scan(**arguments, backend=backend))
    assert set(bare) == {"out", "last_state"}
    for other in (full, bare):
        assert (part["out"] - other["out"]).abs().max() <= 1e-6 * bare["out"].abs().max()
    assert max(oracle.errors(part, oracle.chosen(full, tokens, channels)).values()) <= 1e-6
    for name in oracle.EMITTED:
        assert part[name].untyped_storage().nbytes() == part[name].numel() * part[name].itemsize, name


@pytest.mark.parametrize("name", ["delta", "A_bar", "B_bar", "B", "C", "h", "y", "delta_cumsum"])
@pytest.mark.parametrize("backend", TORCH)
def test_each_variable_alone(oracle, name, backend):
    arguments = oracle.draw("mamba2", 1, 5)
    result = oracle.by_name(selective_scan(**arguments, emit=Emit((name,)), backend=backend))
    assert set(result) == {"out", "last_state", name}
    assert oracle.errors(result, oracle.closed_form(**arguments))[name] < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_of_h_comes_back_from_every_eighth(oracle, family):
    arguments = oracle.draw(family, 2, 41)
    whole = selective_scan(**arguments, emit=Emit(("h",)), backend="cpu").emission.h
    kept = selective_scan(**arguments, emit=Emit(("h",), tokens=range(7, 41, 8)), backend="cpu").emission.h
    part = {name: arguments[name][:, 24:31] for name in ("x", "delta", "B", "C", "z")} | {"initial_state": kept[:, 2]}
    again = selective_scan(**arguments | part, emit=Emit(("h",)), backend="cpu").emission.h
    assert (again - whole[:, 24:31]).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_rounds_what_has_a_state_axis(oracle, backend, dtype):
    arguments, states = oracle.draw("mamba", 1, 9), ("A_bar", "B_bar", "h")
    whole, narrow = (
        oracle.by_name(selective_scan(**arguments, emit=Emit(oracle.EMITTED, dtype=of), backend=backend))
        for of in (None, dtype)
    )
    for name, value in narrow.items():
        assert torch.equal(value, whole[name].to(dtype) if name in states else whole[name]), name


def test_a_wrong_dtype_is_refused(oracle):
    with pytest.raises(ValueError, match=r"`dtype` of an emission must be None or one of torch.float32"):
        Emit(("h",), dtype=torch.float64)
    arguments = oracle.featured(oracle.draw("mamba", 1, 4), ("complex",))
    with pytest.raises(ValueError, match=r"`emit.dtype` is torch.bfloat16, but `A` is complex"):
        selective_scan(**arguments, emit=Emit(("h",), dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", TORCH)
def test_emission_aliases_no_input(oracle, backend):
    arguments = oracle.draw("mamba", 1, 4)
    arguments |= {"delta_softplus": False, "delta_bias": None, "delta_limits": (-math.inf, math.inf)}
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for value in oracle.by_name(selective_scan(**arguments, emit=Emit(oracle.EMITTED), backend=backend)).values():
        value.fill_(7.0)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", TORCH)
def test_narrow_inputs_are_widened_exactly(oracle, family, dtype, backend):
    arguments = oracle.cast(oracle.draw(family, 2, 65, 2), dtype, ("x", "delta", "B", "C", "z"))
    exact = oracle.closed_form(**oracle.cast(arguments, torch.float64))
    result = selective_scan(**arguments, emit=Emit(oracle.EMITTED), backend=backend)
    assert result.y.dtype == dtype
    assert result.last_state.dtype == torch.float32
    assert result.emission.B.dtype == dtype
    naive = selective_scan(**oracle.cast(arguments, torch.float32), emit=Emit(oracle.EMITTED), backend="naive")
    rounding = torch.finfo(dtype).eps
    assert not oracle.violations(oracle.by_name(result), exact, oracle.by_name(naive), out_bound=rounding)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_memory(oracle, family):
    """A = -1e-6: what costs a sequential float32 scan most."""
    arguments = oracle.draw(family, 1, 1500) | {"initial_state": None}
    arguments["A"] = torch.full_like(arguments["A"], -1e-6)
    naive, found = (oracle.by_name(selective_scan(**arguments, backend=name)) for name in TORCH)
    assert not oracle.violations(found, oracle.closed_form(**arguments), naive)


@pytest.mark.parametrize("backend", TORCH)
def test_a_large_delta_resets(oracle, backend):
    """delta = 1e4 with B = 0 forgets everything: what follows is a fresh scan; differences of cumsums lose digits."""
    arguments = oracle.draw("mamba2", 2, 100) | {"delta_limits": (0.0, math.inf), "A": -torch.linspace(0.5, 1.5, 4)}
    arguments["delta"][:, 70] = 1e4
    arguments["B"][:, 70] = 0.0
    per_token = ("x", "delta", "B", "C", "z")
    fresh = arguments | {name: arguments[name][:, 71:] for name in per_token} | {"initial_state": None}
    whole = selective_scan(**arguments, backend=backend)
    exact = oracle.closed_form(**oracle.cast(fresh, torch.float64) | {"initial_state": None})
    found = {"out": whole.y[:, 71:], "last_state": whole.last_state}
    assert max(oracle.errors(found, exact).values()) < 1e-6


def test_softplus_is_the_identity_above_twenty():
    raw = torch.tensor([20.5, 20.0, -30.0], dtype=torch.float64)
    one = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    for backend in TORCH:
        result = selective_scan(
            one,
            raw[None, :, None],
            -one[0, :1, 0],
            one,
            one,
            delta_softplus=True,
            emit=Emit(("delta",)),
            backend=backend,
        )
        delta = result.emission.delta.flatten()
        assert delta[0] == 20.5
        assert delta[1] == pytest.approx(20 + math.log1p(math.exp(-20)), rel=1e-15)
        assert delta[2] == pytest.approx(math.exp(-30), rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", TORCH)
def test_gradients(oracle, monkeypatch, family, backend):
    """Plain autograd through y, the last state and what is emitted, against finite differences in float64."""
    monkeypatch.setattr(cpu, "LONGEST_CHUNK", 2)
    arguments = oracle.cast(oracle.draw(family, 1, 3, 2, shape=(2, 1, 2, family == "mamba2")), torch.float64)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    inputs = [arguments[name].requires_grad_() for name in names]
    emit = Emit(("delta", "A_bar", "h", "y"), tokens=[0, 2])

    def call(*tensors):
        result = selective_scan(**arguments | dict(zip(names, tensors, strict=True)), emit=emit, backend=backend)
        return tuple(oracle.by_name(result).values())

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("name", ["x", "delta", "A", "B", "z"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", TORCH)
def test_nan_passes(oracle, backend, family, name):
    arguments = oracle.draw(family, 1, 4)
    arguments[name].view(-1)[0] = math.nan
    result = selective_scan(**arguments, emit=Emit(("delta", "A_bar")), backend=backend)
    assert result.y.isnan().any()
    assert result.emission.delta.isnan().any() == (name == "delta")
    assert result.emission.A_bar.isnan().any() == (name in ("delta", "A"))


def test_autocast_changes_nothing(oracle):
    arguments = oracle.draw("mamba2", 1, 65)
    plain = selective_scan(**arguments, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = selective_scan(**arguments, backend="cpu")
    assert torch.equal(plain.y, cast.y)


@pytest.mark.parametrize("backend", TORCH)
def test_transformers_mamba(oracle, backend):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    a = oracle.draw("mamba", 2, 65) | {"delta_limits": (0.0, math.inf), "initial_state": None}
    x, z, B, C = (tensor.squeeze(axis).mT for tensor, axis in ((a["x"], 3), (a["z"], 3), (a["B"], 2), (a["C"], 2)))
    theirs, state = mamba_selective_scan(
        x, a["delta"].mT, a["A"], B, C, D=a["D"], z=z, delta_bias=a["delta_bias"], delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    ours = selective_scan(**a, backend=backend)
    torch.testing.assert_close(ours.y[..., 0].mT, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())
    torch.testing.assert_close(ours.last_state[:, :, 0], state, rtol=0, atol=1e-6 * state.abs().max().item())


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("backend", TORCH)
def test_transformers_mamba2(oracle, backend, group):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    a = oracle.draw("mamba2", 2, 65, group) | {"z": None}
    a["D"] = a["D"][:, 0]
    theirs, state = mamba2_chunk_scan(
        a["x"], a["delta"], a["A"], a["B"], a["C"], 16, D=a["D"], dt_bias=a["delta_bias"], dt_softplus=True,
        dt_limit=a["delta_limits"], initial_states=a["initial_state"], return_final_states=True,
    )  # fmt: skip
    ours = selective_scan(**a, backend=backend)
    torch.testing.assert_close(ours.y, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())
    torch.testing.assert_close(ours.last_state, state, rtol=0, atol=2e-6 * state.abs().max().item())
