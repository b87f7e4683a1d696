"""The Triton backend, compiled, at real sizes on a CUDA device; the oracle is the float64 naive scan there.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import pytest
import torch

from mamba_probe.kernels.scan import Emit, choose_backend, selective_scan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

NARROW = ("x", "delta", "B", "C", "z")
SIZES = {  # batch, token, group, (head, head_channel, state, whether A is a scalar a head)
    "mamba1_wide": (2, 2048, 1, (1536, 1, 16, False)),
    "mamba1_odd": (1, 4097, 1, (1500, 1, 16, False)),
    "mamba2_one_group": (1, 4096, 1, (80, 64, 128, True)),
    "mamba2_two_groups": (1, 4096, 2, (80, 64, 128, True)),
}


def arguments(oracle, size):
    batch, token, group, shape = SIZES[size]
    return oracle.draw(None, batch, token, group, shape=shape, device="cuda")


def scans(oracle, inputs, emit):
    double = oracle.by_name(selective_scan(**oracle.cast(inputs, torch.float64), emit=emit, backend="naive"))
    single = oracle.cast(inputs, torch.float32)
    naive = oracle.by_name(selective_scan(**single, emit=emit, backend="naive"))
    return double, naive


def test_a_cuda_device_gets_triton():
    assert choose_backend("cuda").name == "triton"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_holds_the_bound(oracle, size, dtype):
    inputs = oracle.cast(arguments(oracle, size), dtype, NARROW)
    emit = Emit(oracle.EMITTED, tokens=range(0, inputs["x"].shape[1], 61))
    exact, naive = scans(oracle, inputs, emit)
    found = selective_scan(**inputs, emit=emit)
    assert found.y.dtype == dtype
    assert found.last_state.dtype == torch.float32
    found = oracle.by_name(found)
    assert set(found) == {"out", "last_state", *oracle.EMITTED}
    print(size, dtype, *[{name: f"{value:.1e}" for name, value in oracle.errors(every, exact).items()}
                         for every in (found, naive)], sep="\n")  # fmt: skip
    out_bound = None if dtype == torch.float32 else torch.finfo(dtype).eps
    assert not oracle.violations(found, exact, naive, out_bound=out_bound)


@pytest.mark.parametrize("size", ["mamba1_odd", "mamba2_two_groups"])
def test_emission_is_the_selection_of_all_and_leaves_y(oracle, size):
    inputs = arguments(oracle, size)
    names = tuple(name for name in oracle.EMITTED if name != "h" or size == "mamba1_odd")  # 11 GB of h
    tokens, channels = (0, 63, 64, 1000, 4095), (41, 3, 79)
    full = oracle.by_name(selective_scan(**inputs, emit=Emit(names)))
    part = oracle.by_name(selective_scan(**inputs, emit=Emit(names, tokens=tokens, channels=channels)))
    bare = oracle.by_name(selective_scan(**inputs))
    assert set(bare) == {"out", "last_state"}
    for name in names:
        expected = full[name][:, list(tokens)]
        expected = expected if name in "BC" else expected[:, :, list(channels)]
        assert torch.equal(part[name], expected), name
    for other in (full, bare):
        assert (part["out"] - other["out"]).abs().max() <= 1e-6 * bare["out"].abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [1, 1027])
def test_split_scan_is_the_whole_scan(oracle, size, cut):
    inputs = arguments(oracle, size)
    whole = selective_scan(**inputs)
    first = selective_scan(**inputs | {name: inputs[name][:, :cut] for name in NARROW})
    rest = {name: inputs[name][:, cut:] for name in NARROW} | {"initial_state": first.last_state}
    second = selective_scan(**inputs | rest)
    y = torch.cat([first.y, second.y], 1)
    assert (y - whole.y).abs().max() <= 1e-6 * whole.y.abs().max()
    assert (second.last_state - whole.last_state).abs().max() <= 1e-6 * whole.last_state.abs().max()


@pytest.mark.parametrize("size", ["mamba1_wide", "mamba2_one_group"])
def test_long_memory(oracle, size):
    inputs = arguments(oracle, size)
    inputs["A"] = torch.full_like(inputs["A"], -1e-6)
    exact, naive = scans(oracle, inputs, None)
    found = oracle.by_name(selective_scan(**inputs))
    assert not oracle.violations(found, exact, naive)


@pytest.mark.parametrize("size", ["mamba1_odd", "mamba2_two_groups"])
def test_a_large_delta_resets(oracle, size):
    inputs = arguments(oracle, size) | {"delta_limits": (0.0, float("inf"))}
    inputs["delta"][:, 2000] = 1e4
    inputs["B"][:, 2000] = 0.0
    exact, naive = scans(oracle, inputs, None)
    assert not oracle.violations(oracle.by_name(selective_scan(**inputs)), exact, naive)
    after = inputs | {name: inputs[name][:, 2001:] for name in NARROW} | {"initial_state": None}
    tails = [values | {"out": values["out"][:, 2001:]} for values in (exact, naive)]
    assert not oracle.violations(oracle.by_name(selective_scan(**after)), *tails)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    "features", [("zoh",), ("seq_idx", "constant"), ("log_decay", "zoh"), ("log_decay", "seq_idx")], ids="+".join
)
def test_features_at_real_sizes(oracle, family, features):
    shape = (512, 1, 16, False) if family == "mamba" else (8, 64, 128, True)
    inputs = oracle.featured(oracle.draw(None, 1, 2000, 1, shape=shape, device="cuda"), features)
    emit = Emit(oracle.EMITTED, tokens=range(0, 2000, 97))
    exact, naive = scans(oracle, inputs, emit)
    assert not oracle.violations(oracle.by_name(selective_scan(**inputs, emit=emit)), exact, naive)


@pytest.mark.parametrize("token", [1, 63, 2000, 4097])
@pytest.mark.parametrize("state", [1, 2, 12, 16, 64, 256])
def test_any_length_and_state(oracle, token, state):
    inputs = oracle.draw(None, 1, token, 1, shape=(100, 1, state, False), device="cuda")
    emit = Emit(oracle.EMITTED, tokens=range(0, token, 61))
    exact, naive = scans(oracle, inputs, emit)
    assert not oracle.violations(oracle.by_name(selective_scan(**inputs, emit=emit)), exact, naive)


@pytest.mark.parametrize("size", ["mamba1_wide", "mamba2_one_group"])
def test_any_strides(oracle, size):
    """transformers' (batch, channel, token), what a split leaves, and sliced parameters."""
    inputs = arguments(oracle, size)
    expected = selective_scan(**inputs)
    for name in ("A", "delta_bias"):
        inputs[name] = torch.stack([inputs[name], torch.full_like(inputs[name], -7.0)], -1)[..., 0]
    for name in ("x", "delta", "z"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([inputs["B"], inputs["C"]], -1)
    inputs["B"], inputs["C"] = wide.split(inputs["B"].shape[-1], -1)
    found = selective_scan(**inputs)
    assert (found.y - expected.y).abs().max() <= 1e-6 * expected.y.abs().max()
    assert (found.last_state - expected.last_state).abs().max() <= 1e-6 * expected.last_state.abs().max()


def test_float64_and_small_sizes(oracle):
    for token in (1, 3, 63, 64, 65, 257):
        for family in oracle.SHAPES:
            inputs = oracle.cast(oracle.draw(family, 3, token, 2, device="cuda"), torch.float64)
            exact, _ = scans(oracle, inputs, Emit(oracle.EMITTED))
            found = oracle.by_name(selective_scan(**inputs, emit=Emit(oracle.EMITTED)))
            assert max(oracle.errors(found, exact).values()) < 1e-12, (family, token)


def test_the_largest_layer_runs(oracle):
    """(4, 4096, 5120, 16), bfloat16: Mamba-2.8B's layer."""
    inputs = oracle.draw(None, 4, 4096, shape=(5120, 1, 16, False), device="cuda")
    inputs = oracle.cast(inputs, torch.bfloat16, NARROW)
    exact, naive = scans(oracle, inputs, None)
    found = oracle.by_name(selective_scan(**inputs))
    assert not oracle.violations(found, exact, naive, out_bound=torch.finfo(torch.bfloat16).eps)
    times = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times[0].record()
    selective_scan(**inputs)
    times[1].record()
    torch.cuda.synchronize()
    print("ms", times[0].elapsed_time(times[1]))
    assert times[0].elapsed_time(times[1]) < 100


def test_a_gradient_is_the_cpu_backends_and_has_no_gradient(oracle):
    inputs = oracle.draw("mamba", 1, 40, device="cuda")
    x = inputs["x"].requires_grad_()
    found, expected = (
        torch.autograd.grad(selective_scan(**inputs, backend=backend).y.square().sum(), x)[0]
        for backend in ("triton", "cpu")
    )
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="has no second derivative"):
        torch.autograd.grad(selective_scan(**inputs).y.sum(), x, create_graph=True)


@pytest.mark.parametrize("size", ["mamba1_odd", "mamba2_two_groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mass_with_long_memory_and_a_reset(oracle, size, dtype):
    inputs = arguments(oracle, size) | {"delta_limits": (0.0, float("inf"))}
    inputs["A"][: len(inputs["A"]) // 2] = -1e-6
    inputs["delta"][:, 2000] = 1e4
    inputs = oracle.cast(inputs, dtype, NARROW)
    emit = Emit(("mass", "mass_distance"), tokens=(0, 1, 63, 1999, 2000, 2001, 4095))
    exact, naive = scans(oracle, inputs, emit)
    found = oracle.by_name(selective_scan(**inputs, emit=emit))
    del found["out"], found["last_state"]
    print(size, dtype, oracle.errors(found, exact))
    assert not oracle.violations(found, exact, naive)


@pytest.mark.parametrize("size", ["mamba1_odd", "mamba2_two_groups"])
def test_mass_writes_no_state_sized_tensor(oracle, size):
    inputs = arguments(oracle, size)
    peaks = []
    for names in ((), ("mass", "mass_distance")):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = selective_scan(**inputs, emit=Emit(names))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del found
    batch, token, head = inputs["delta"].shape
    one = 4 * batch * token * head
    assert peaks[1] - peaks[0] < 0.2 * one * inputs["B"].shape[-1]


@pytest.mark.parametrize("name", ["delta", "A", "x", "B"])
def test_nan_passes(oracle, name):
    inputs = oracle.draw("mamba", 1, 4, device="cuda")
    inputs[name].view(-1)[0] = float("nan")
    found = selective_scan(**inputs, emit=Emit(("delta", "A_bar")))
    assert found.y.isnan().any()
    assert found.emission.delta.isnan().any() == (name == "delta")
    assert found.emission.A_bar.isnan().any() == (name in ("delta", "A"))
