"""mass and mass_distance: against hidden attention, closed forms and theorems; `oracle` holds them to explicit sums.

mass_t[head] = sum over tokens s <= t and states n of |C_t A_bar_t .. A_bar_{s+1} B_bar_s|, mass_distance_t the mean of
t - s under these weights. Selection, features and lengths are those of the tests of all that is emitted.
"""

import json
import math

import pytest
import torch

from mamba_probe.analyses.common.attention import attention_row
from mamba_probe.kernels.scan import Emit, compiled, cpu, cpu_compile, selective_scan

NAMES = ("mass", "mass_distance")
FAMILIES = ("mamba", "mamba2")
TORCH = ("naive", "cpu")
families = pytest.mark.parametrize("family", FAMILIES)
backends = pytest.mark.parametrize("backend", TORCH)


def run(arguments, backend="cpu", **options):
    emission = selective_scan(**arguments, emit=Emit(NAMES, **options), backend=backend).emission
    return emission.mass, emission.mass_distance


def drawn(oracle, family, features=(), token=14, **changed):
    arguments = oracle.featured(oracle.draw(family, 2, token, 2), features)
    return oracle.cast(arguments | changed, torch.float64)


def attention(arguments, t):
    """(batch, source, head): hidden attention's weights of the query t, by the analyses' own code."""
    emit = Emit(("delta",))
    delta = selective_scan(**arguments, emit=emit, backend="naive").emission.delta.numpy()[:, : t + 1]
    elapsed = delta[:, ::-1].cumsum(1)[:, ::-1] - delta
    A = arguments["A"].numpy()
    A, B, C = A.reshape(len(A), -1), arguments["B"].numpy(), arguments["C"].numpy()
    groups = torch.arange(len(A)).numpy() // (len(A) // B.shape[2])
    zoh = arguments.get("discretization") == "zoh"
    rows = [attention_row(delta[b], elapsed[b], A, B[b, : t + 1], C[b, t], groups, zoh=zoh) for b in range(len(delta))]
    return torch.stack([torch.from_numpy(row) for row in rows])


def sums(weight):
    """mass and mass_distance of weights (batch, source, head)."""
    distance = torch.arange(weight.shape[1]).flip(0).double()
    mass = weight.abs().sum(1)
    return mass, torch.einsum("bsh,s->bh", weight.abs(), distance) / mass


@pytest.mark.parametrize("features", [(), ("zoh",)], ids=["euler", "zoh"])
@families
@backends
def test_one_state_is_hidden_attention(oracle, family, backend, features):
    arguments = drawn(oracle, family, features)
    arguments |= {name: arguments[name][..., :1] for name in ("B", "C", "initial_state")}
    arguments["A"] = arguments["A"] if family == "mamba2" else arguments["A"][:, :1]
    found = run(arguments, backend)
    for t in (0, 5, 13):
        for value, expected in zip(found, sums(attention(arguments, t)), strict=True):
            torch.testing.assert_close(value[:, t], expected, rtol=1e-12, atol=1e-12)


@families
@backends
def test_many_states_of_one_sign_are_hidden_attention_and_others_bound_it(oracle, family, backend):
    signed = drawn(oracle, family)
    alike = signed | {name: signed[name].abs() for name in "BC"}
    bound, distance = run(signed, backend)
    for value, expected in zip((bound, distance), run(alike, backend), strict=True):
        assert torch.equal(value, expected)
    exact = torch.stack([attention(alike, t).sum(1) for t in range(14)], dim=1)
    torch.testing.assert_close(bound, exact, rtol=1e-12, atol=0)
    below = torch.stack([attention(signed, t).abs().sum(1) for t in range(14)], dim=1)
    assert (below <= bound * (1 + 1e-12)).all()
    assert (below < 0.9 * bound).any()


@backends
def test_a_conjugate_pair_bounds_its_hidden_attention(oracle, backend):
    """And reaches it: at the source itself with real B and C both terms of the pair have one sign."""
    arguments = drawn(oracle, "mamba", ("complex", "zoh"))
    bound, _ = run(arguments, backend)
    below = torch.stack([attention(arguments, t).abs().sum(1) for t in range(14)], dim=1)
    assert (below <= bound * (1 + 1e-12)).all()
    one = {name: torch.ones_like(arguments[name]) for name in "BC"}
    euler = arguments | one | {"discretization": "euler"}
    torch.testing.assert_close(run(euler, backend)[0][:, 0], attention(euler, 0)[:, 0], rtol=1e-12, atol=0)


@families
@backends
def test_the_first_token_and_what_lies_before_it(oracle, family, backend):
    arguments = drawn(oracle, family)
    mass, distance = run(arguments, backend)
    emission = selective_scan(**arguments, emit=Emit(("B_bar", "C"), tokens=[0]), backend=backend).emission
    C = emission.C.repeat_interleave(emission.B_bar.shape[2] // 2, 2)
    torch.testing.assert_close(mass[:, 0], (C * emission.B_bar).abs().sum(-1)[:, 0], rtol=1e-14, atol=0)
    assert (distance[:, 0] == 0).all()
    for value, without in zip((mass, distance), run(arguments | {"initial_state": None}, backend), strict=True):
        assert torch.equal(value, without), "an initial state has no tokens"


@families
@backends
def test_packed_sequences_are_the_sequences_run_apart(oracle, monkeypatch, family, backend):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 5_000)
    arguments = drawn(oracle, family)
    packed = run(arguments | {"seq_idx": torch.tensor([1] * 9 + [0] * 5).expand(2, -1)}, backend)
    assert (packed[1][:, 9] == 0).all()
    for span in (slice(9), slice(9, None)):
        part = arguments | {name: arguments[name][:, span] for name in ("x", "delta", "B", "C", "z")}
        for whole, alone in zip(packed, run(part, backend), strict=True):
            torch.testing.assert_close(whole[:, span], alone, rtol=1e-13, atol=0)


@families
@backends
def test_constant_steps_are_a_geometric_series(oracle, monkeypatch, family, backend):
    """And without decay (log_decay 0) the mass grows evenly and lies half way back, however long the sequence."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 5_000)
    arguments = drawn(oracle, family, ("constant",), token=60)
    arguments |= {"delta": torch.zeros_like(arguments["delta"]), "delta_bias": None, "delta_softplus": False}
    arguments |= {"delta_limits": (0.5, 1.0), "A": torch.full_like(arguments["A"], -0.2)}
    mass, distance = run(arguments, backend)
    powers = math.exp(-0.1) ** torch.arange(60, dtype=torch.float64)
    torch.testing.assert_close(mass / mass[:, :1], powers.cumsum(0)[None, :, None].expand_as(mass))
    mean = (torch.arange(60) * powers).cumsum(0) / powers.cumsum(0)
    torch.testing.assert_close(distance, mean[None, :, None].expand_as(mass), rtol=1e-12, atol=0)
    kept = arguments | {"log_decay": torch.zeros(2, 60, *arguments["A"].shape, dtype=torch.float64)}
    mass, distance = run(kept, backend)
    torch.testing.assert_close(mass / mass[:, :1], torch.arange(1.0, 61)[None, :, None].expand_as(mass).double())
    torch.testing.assert_close(distance, torch.arange(60.0)[None, :, None].expand_as(mass).double() / 2)


@families
@backends
def test_where_nothing_is_written_there_is_no_distance(oracle, family, backend):
    arguments = drawn(oracle, family)
    arguments["B"][:, :4] = 0
    mass, distance = run(arguments, backend)
    assert (mass[:, :4] == 0).all()
    assert distance[:, :4].isnan().all()
    assert (mass[:, 4:] > 0).all()
    assert (distance[:, 4] == 0).all()


@pytest.mark.parametrize("name", ["delta", "B", "C"])
@families
@backends
def test_nan_stays_where_it_belongs(oracle, family, backend, name):
    arguments = drawn(oracle, family)
    arguments[name][0, 5] = math.nan
    bad = torch.zeros(2, 14, dtype=torch.bool)
    bad[0, 5 : 6 if name == "C" else None] = True
    for value in run(arguments, backend):
        assert torch.equal(value.isnan(), bad[:, :, None].expand_as(value))


@families
@backends
def test_a_negative_step_writes_too(oracle, family, backend):
    arguments = drawn(oracle, family) | {"delta_softplus": False, "delta_limits": (-math.inf, math.inf)}
    arguments["A"] = arguments["A"] / 20
    exact = oracle.closed_form(**arguments)
    assert (exact["delta"] < 0).any()
    assert max(oracle.errors(dict(zip(NAMES, run(arguments, backend), strict=True)), exact).values()) < 1e-12


@pytest.mark.parametrize("case", ["long memory", "reset"])
@families
def test_extremes_hold_the_bound(oracle, family, case):
    """Differences such as t m - (sum of s ...) would lose both."""
    arguments = oracle.draw(family, 1, 800) | {"delta_limits": (0.0, math.inf)}
    if case == "long memory":
        arguments["A"] = torch.full_like(arguments["A"], -1e-6)
    else:
        arguments["delta"][:, 400] = 1e4
    exact = oracle.closed_form(**arguments)
    naive, found = (dict(zip(NAMES, run(arguments, backend), strict=True)) for backend in TORCH)
    assert not oracle.violations(found, exact, naive)
    if case == "reset":
        assert (exact["mass_distance"][:, 400] < 1e-100).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", [(), ("complex", "zoh", "constant"), ("seq_idx", "log_decay")], ids="+".join)
@families
@backends
def test_gradients(oracle, monkeypatch, family, backend, features, name):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1)
    shape = 2, 1, 2, family == "mamba2"
    drawn = oracle.cast(oracle.featured(oracle.draw(None, 1, 3, 2, shape=shape), features), torch.float64)
    names = [key for key, value in drawn.items() if torch.is_tensor(value) and key != "seq_idx"]

    def call(*tensors):
        arguments = drawn | dict(zip(names, tensors, strict=True))
        emission = selective_scan(**arguments, emit=Emit((name,), tokens=[1, 2]), backend=backend).emission
        return getattr(emission, name)

    assert torch.autograd.gradcheck(call, [drawn[key].requires_grad_() for key in names])


def test_blocks_are_many_and_end_with_the_last_token_asked_for(oracle, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 50_000)
    spans, part = [], cpu._of_mass
    monkeypatch.setattr(cpu, "_of_mass", lambda a, delta, span: spans.append(span) or part(a, delta, span))
    for family in FAMILIES:
        spans.clear()
        arguments = oracle.draw(family, 2, 257)
        whole = run(arguments)
        assert len(spans) > 4
        spans.clear()
        chosen = run(arguments, tokens=[3, 150], channels=[2, 0])
        assert spans[-1].stop == 151
        for value, full in zip(chosen, whole, strict=True):
            torch.testing.assert_close(value, full[:, [3, 150]][:, :, [2, 0]], rtol=1e-6, atol=0)


def test_a_compiled_scan_answers_the_same(oracle, monkeypatch):
    monkeypatch.setattr(compiled, "_inductor", lambda graph, inputs: graph)
    monkeypatch.setattr(compiled, "STEPS", 4)
    compiled._kernel.cache_clear()
    answers = []
    for when in ("always", "never"):
        with cpu_compile(when):
            answers.append(run(oracle.draw("mamba", 2, 11)))
    compiled._kernel.cache_clear()
    assert all(map(torch.equal, *answers))


def test_the_interpreted_kernel_in_several_chunks_holds_the_bound(interpreted):
    assert len(interpreted("interpreted_mass.py")) == 12


def test_the_kernel_compiles_for_an_h200_without_spills(script):
    found = [json.loads(line) for line in script("resources.py", "mass")]
    assert len(found) == 8
    assert max(one["reg"] for one in found) <= 168, found
    assert max(one["stack"] for one in found) == 0, found
