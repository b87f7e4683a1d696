"""Complex A, constant B and C, zoh, seq_idx and log_decay, alone and together, against the closed form and theorems."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mamba_probe.kernels.scan import Emit, cpu, selective_scan

FAMILIES = ("mamba", "mamba2")
TORCH = ("naive", "cpu")
PER_TOKEN = ("x", "delta", "B", "C", "z", "seq_idx", "log_decay")
EACH = (
    ("complex",),
    ("constant",),
    ("zoh",),
    ("seq_idx",),
    ("log_decay",),
    ("complex", "constant", "zoh"),
    ("complex", "constant", "zoh", "seq_idx", "log_decay"),
)
families = pytest.mark.parametrize("family", FAMILIES)
backends = pytest.mark.parametrize("backend", TORCH)
features = pytest.mark.parametrize("features", EACH, ids="+".join)


def answer(oracle, arguments, backend, **options):
    emit = Emit(oracle.EMITTED, **options)
    return oracle.by_name(selective_scan(**arguments, emit=emit, backend=backend))


def cut(arguments, span):
    """The arguments of the tokens in `span`; what is constant stays."""
    tokens = arguments["x"].shape[1]
    return arguments | {
        name: arguments[name][:, span]
        for name in PER_TOKEN
        if name in arguments and arguments[name].ndim > 1 and arguments[name].shape[1] == tokens
    }


@pytest.mark.parametrize(("batch", "token", "group"), [(1, 1, 1), (2, 70, 2)])
@families
@features
@backends
def test_the_closed_form(oracle, monkeypatch, family, features, backend, batch, token, group):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 50_000)
    arguments = oracle.featured(oracle.draw(family, batch, token, group), features)
    exact = oracle.closed_form(**arguments)
    double = answer(oracle, oracle.cast(arguments, torch.float64), backend)
    assert set(double) == {"out", "last_state", *oracle.EMITTED}
    assert max(oracle.errors(double, exact).values()) < 1e-12
    assert {name for name, value in double.items() if value.is_complex()} == {
        name for name in ("A_bar", "B_bar", "B", "C", "h", "last_state") if "complex" in features
    }
    single = answer(oracle, arguments, backend)
    assert not oracle.violations(single, exact, answer(oracle, arguments, "naive"))
    assert {value.dtype for value in single.values()} <= {torch.float32, torch.complex64, torch.float64}


@features
def test_each_feature_counts(oracle, features):
    """What the closed form is given does change its answer: else the test above is one of the plain scan."""
    plain = oracle.draw("mamba", 2, 70, 2)
    part = oracle.closed_form(**oracle.featured(plain, features))["out"]
    assert (part - oracle.closed_form(**plain)["out"]).abs().max() > 1e-2


@families
@features
@backends
def test_emission_is_the_selection_of_all(oracle, monkeypatch, family, features, backend):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 50_000)
    arguments = oracle.featured(oracle.draw(family, 2, 50, 2), features)
    tokens, channels = (0, 7, 31, 49), (3, 0)
    full = answer(oracle, arguments, backend)
    part = answer(oracle, arguments, backend, tokens=tokens, channels=channels)
    assert max(oracle.errors(part, oracle.chosen(full, tokens, channels)).values()) <= 1e-6
    for name in oracle.EMITTED:
        assert part[name].untyped_storage().nbytes() == part[name].numel() * part[name].itemsize, name
        alone = selective_scan(**arguments, emit=Emit((name,), tokens, channels), backend=backend)
        torch.testing.assert_close(getattr(alone.emission, name), part[name], rtol=0, atol=1e-6)
    for name, value in full.items():
        value.fill_(7.0)  # aliases no input, constant B and C included
        assert name in full
    torch.testing.assert_close(answer(oracle, arguments, backend, tokens=tokens, channels=channels), part)


@pytest.mark.parametrize("at", [1, 23, 39])
@families
@features
@backends
def test_split_scan_is_the_whole_scan(oracle, family, features, backend, at):
    arguments = oracle.featured(oracle.draw(family, 2, 40, 2), features)
    if "seq_idx" in features:  # a cut between two sequences is the callers': the second call has no state to enter
        arguments["seq_idx"][:, at] = arguments["seq_idx"][:, at - 1]
    whole = selective_scan(**arguments, backend=backend)
    head = selective_scan(**cut(arguments, slice(at)), backend=backend)
    tail = selective_scan(**cut(arguments, slice(at, None)) | {"initial_state": head.last_state}, backend=backend)
    y = torch.cat([head.y, tail.y], 1)
    if backend == "naive":
        assert torch.equal(y, whole.y)
        assert torch.equal(tail.last_state, whole.last_state)
    for found, expected in ((y, whole.y), (tail.last_state, whole.last_state)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("others", [(), ("complex", "constant", "zoh", "log_decay")], ids=["alone", "together"])
@families
@backends
def test_packed_sequences_are_the_sequences_run_apart(oracle, family, backend, others):
    arguments = oracle.featured(oracle.draw(family, 2, 80, 2), others)
    edges = [0, 1, 4, 70, 80]
    numbers = torch.tensor([3, 0, 3, 9]).repeat_interleave(torch.tensor(edges).diff())
    packed = arguments | {"seq_idx": numbers.expand(2, -1)}
    found = answer(oracle, packed, backend)
    apart = []
    for start, stop in pairwise(edges):
        state = {} if start == 0 else {"initial_state": None}
        apart.append(answer(oracle, cut(arguments, slice(start, stop)) | state, backend))
    assert torch.equal(found["delta_cumsum"], found["delta"].double().cumsum(1))  # runs on over the sequences
    assert (found["A_bar"][:, edges[1:-1]] == 0).all()
    for name in ("out", "h", "y", "delta", "B_bar", "last_state"):
        joined = apart[-1][name] if name == "last_state" else torch.cat([part[name] for part in apart], 1)
        bound = 0.0 if backend == "naive" else 1e-6 * joined.abs().max().item()
        torch.testing.assert_close(found[name], joined, rtol=0, atol=bound)


@families
@backends
@pytest.mark.parametrize("others", [(), ("complex", "zoh", "seq_idx")], ids=["alone", "together"])
def test_log_decay_of_delta_A_changes_nothing(oracle, family, backend, others):
    arguments = oracle.featured(oracle.draw(family, 2, 70, 2), others)
    plain = answer(oracle, arguments, backend)
    A = arguments["A"]
    same = plain["delta"] * A if A.ndim == 1 else plain["delta"][..., None] * A
    found = answer(oracle, arguments | {"log_decay": same}, backend)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


@families
@backends
@pytest.mark.parametrize("others", [(), ("complex", "constant", "zoh")], ids=["alone", "together"])
def test_log_decay_zero_keeps_the_state(oracle, family, backend, others):
    """Nothing is forgotten: the state is the start plus the sum of all writes; B_bar is what it was."""
    arguments = oracle.cast(oracle.featured(oracle.draw(family, 2, 70, 2), others), torch.float64)
    A = arguments["A"]
    plain = answer(oracle, arguments, backend)
    found = answer(oracle, arguments | {"log_decay": torch.zeros((2, 70, *A.shape), dtype=A.dtype)}, backend)
    writes = plain["B_bar"][:, :, :, None] * arguments["x"][..., None]
    assert (found["A_bar"] == 1).all()
    assert torch.equal(found["B_bar"], plain["B_bar"])
    torch.testing.assert_close(found["h"], arguments["initial_state"][:, None] + writes.cumsum(1), rtol=0, atol=1e-12)


@families
@backends
def test_constant_is_the_same_at_every_token(oracle, family, backend):
    arguments = oracle.featured(oracle.draw(family, 2, 70, 2), ("constant",))
    repeated = arguments | {name: arguments[name].expand(2, 70, -1, -1).clone() for name in "BC"}
    found, expected = (answer(oracle, each, backend) for each in (arguments, repeated))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@features
@backends
@families
def test_gradients(oracle, monkeypatch, family, backend, features):
    monkeypatch.setattr(cpu, "LONGEST_CHUNK", 2)
    drawn = oracle.draw(family, 1, 3, 2, shape=(2, 1, 2, family == "mamba2"))
    arguments = oracle.cast(oracle.featured(drawn, features), torch.float64)
    if "seq_idx" in features:
        arguments["seq_idx"] = torch.tensor([[0, 0, 1]])
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name != "seq_idx"]
    inputs = [arguments[name].requires_grad_() for name in names]
    emit = Emit(("delta", "A_bar", "B_bar", "h", "y"), tokens=[0, 2])

    def call(*tensors):
        result = selective_scan(**arguments | dict(zip(names, tensors, strict=True)), emit=emit, backend=backend)
        return tuple(oracle.by_name(result).values())

    assert torch.autograd.gradcheck(call, inputs)


def write_scale(A):
    """B_bar of zoh for delta 1 and B 1, at A (state,)."""
    one = torch.ones(1, 1, 1, 1, dtype=A.real.dtype)
    B = torch.ones(1, len(A), dtype=A.dtype)
    emit = Emit(("B_bar",))
    result = selective_scan(one, one[..., 0], A[None], B, B, discretization="zoh", emit=emit, backend="naive")
    return result.emission.B_bar.flatten()


SIZES = [0.0, 1e-300, 1e-18, 1e-9, 1e-4, 2e-3, 0.01, 0.03, 0.1, 0.3, 0.49999, 0.5, 0.50001, 1.0, 3.0, 40.0]


@pytest.mark.parametrize("direction", [-1.0, 1j, -0.6 + 0.8j], ids=str)
@pytest.mark.parametrize("single", [False, True])
def test_phi1_keeps_its_digits(oracle, direction, single):
    A = torch.tensor([size * direction for size in SIZES])
    A = A.to(torch.complex64 if single else torch.complex128) if A.is_complex() else A.to(torch.float64)
    A = A.float() if single and not A.is_complex() else A
    exact = oracle.phi1(oracle.doubled(A).numpy())
    epsilon = torch.finfo(A.dtype).eps
    relative = np.abs(oracle.doubled(write_scale(A)).numpy() - exact) / np.abs(exact)
    assert relative.max() < 4 * epsilon


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_phi1_keeps_the_digits_of_its_derivative(kind):
    """d B_bar / d A is 1/2 + A/3 + A^2/8 + ... near 0, where the quotient rule loses everything."""
    A = torch.tensor([0.0, 1e-18, -1e-9, 1e-5], dtype=kind, requires_grad=True)
    (slope,) = torch.autograd.grad(write_scale(A).real.sum(), A)
    torch.testing.assert_close(slope.conj(), (1 / 2 + A / 3 + A**2 / 8).detach(), rtol=1e-14, atol=0)


def test_zoh_is_euler_for_a_state_that_never_decays(oracle):
    arguments = oracle.draw("mamba", 1, 9) | {"A": torch.zeros(6, 5)}
    zoh, euler = (selective_scan(**arguments, discretization=name) for name in ("zoh", "euler"))
    assert torch.equal(zoh.y, euler.y)


def test_triton_refuses_complex_a_by_name(oracle):
    arguments = oracle.featured(oracle.draw("mamba", 1, 4), ("complex",))
    with pytest.raises(ValueError, match='backend "triton" does not support complex A yet: use backend="cpu"'):
        selective_scan(**arguments, backend="triton")


def s4d(token, dtype=torch.float64) -> dict[str, Any]:
    """Constant complex A, B and C of four channels; delta one number a channel."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.exp(torch.linspace(math.log(0.01), math.log(0.5), 4))
    A = -torch.rand(4, 8, generator=generator) + 1j * math.pi * torch.arange(8)
    B, C = torch.randn(2, 4, 8, 2, generator=generator)
    return {
        "x": torch.randn(2, token, 4, 1, generator=generator).to(dtype),
        "delta": delta.to(dtype).expand(2, token, 4),
        "A": A.to(dtype.to_complex()),
        "B": torch.view_as_complex(B).to(dtype.to_complex()),
        "C": torch.view_as_complex(C).to(dtype.to_complex()),
        "D": torch.linspace(-1, 1, 4).to(dtype),
    }


@pytest.mark.parametrize("token", [1, 300])
@backends
def test_s4d_is_its_convolution(oracle, backend, token):
    """y = K * x + D x with K_k = 2 Re sum_n C_n exp(A_n delta k) B_bar_n, by FFT."""
    arguments = s4d(token)
    x, delta, A, B, C, D = (arguments[name].numpy() for name in ("x", "delta", "A", "B", "C", "D"))
    exponent = A * delta[0, 0][:, None]
    B_bar = np.expm1(exponent) / A * B
    powers = np.exp(exponent[:, :, None] * np.arange(token))
    kernel = 2 * np.einsum("hn,hnk,hn->kh", C, powers, B_bar).real
    padded = 2 * token
    product = np.fft.rfft(x[..., 0], padded, 1) * np.fft.rfft(kernel, padded, 0)
    y = np.fft.irfft(product, padded, 1)[:, :token] + D * x[..., 0]
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = selective_scan(**oracle.cast(arguments, dtype), discretization="zoh", backend=backend).y[..., 0]
        assert np.abs(found.numpy() - y).max() < bound * np.abs(y).max()


@backends
def test_a_piecewise_constant_input_sampled_twice_as_densely(backend):
    """Every input held for two tokens of half the step: zoh is exact and gives the same, euler is not and does not."""
    arguments = s4d(200)
    twice = {name: arguments[name].repeat_interleave(2, 1) for name in ("x", "delta")}
    dense = arguments | {"x": twice["x"], "delta": twice["delta"] / 2}
    off = {}
    for name in ("zoh", "euler"):
        coarse, fine = (selective_scan(**each, discretization=name, backend=backend) for each in (arguments, dense))
        off[name] = max(
            (fine.y[:, 1::2] - coarse.y).abs().max().item(),
            (fine.last_state - coarse.last_state).abs().max().item(),
        )
    assert off["zoh"] < 1e-12
    assert off["euler"] > 1e-2
