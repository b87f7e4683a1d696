"""The three kernels against loops, autograd and finite differences in float64; and mutations, each of which shows."""

import numpy as np
import pytest
import pywt
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import lti_limits, wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import kernels
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock

BLOCKS = {
    "mamba1": lambda: MambaBlock(6, d_inner=5, d_state=3),
    "mamba2": lambda: Mamba2Block(6, d_inner=12, n_heads=4, d_state=3, n_groups=2),
    "s4d": lambda: S4DBlock(6, d_inner=5, d_state=3),
}
QUERY, WINDOW, LEVEL = 20, 16, 2
TOLERANCE = 1e-6


def perturbed(kind, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel([BLOCKS[kind](), BLOCKS[kind]()], vocab_size=31).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def prompt(length=24):
    ids = torch.randint(1, 31, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.fixture(params=sorted(BLOCKS))
def recorded(request):
    ids, mask = prompt()
    with mp.attach(perturbed(request.param)) as probe:
        return probe.record(ids, mask)


def by_autograd(trace, layer, row, kind):
    """(head, token): d y_t / d x_s of the recurrence in loops, with delta, B and C as constants."""
    here = trace.isel(layer=layer)
    valid = here["valid"].values[row]
    head = here["delta"].dims[-1]
    constant = trace.attrs["family"] == "s4d"

    def of(name):
        array = here[name]
        values = array.values[None].repeat(valid.sum(), 0) if constant else array.values[row][valid]
        return torch.as_tensor(values.astype(np.promote_types(values.dtype, np.float64)))

    delta = of("delta")
    A = torch.as_tensor(here["A"].values.astype(np.complex128))
    A = A[:, None] if A.ndim == 1 else A
    x = torch.zeros(QUERY + 1, trace.sizes[head], dtype=torch.float64, requires_grad=True)
    y = []
    for h in range(trace.sizes[head]):
        group = h if constant else h // (trace.sizes[head] // trace.sizes["group"])
        state = torch.zeros((A if kind == "write" else of("B")).shape[-1], dtype=torch.complex128)
        for t in range(QUERY + 1):
            B, C = (
                (torch.ones_like(state), torch.ones_like(state))
                if kind == "write"
                else (of("B")[t, group], of("C")[t, group])
            )
            write = (torch.exp(delta[t, h] * A[h]) - 1) / A[h]
            write = write if trace.attrs["discretization"] == "zoh" else delta[t, h]
            state = torch.exp(delta[t, h] * A[h]) * state + write * B * x[t, h]
        y.append((C * state).sum().real * (2 if constant else 1))
    (slope,) = torch.autograd.grad(sum(y), x)
    return slope.numpy().T


def by_hand(kernel):
    """Statistics of kernels (kernel, window) from their definitions, one kernel at a time."""
    rows = []
    for one in kernel:
        unit = one / np.sqrt(sum(value**2 for value in one))
        bands = pywt.wavedec(unit, "haar", mode="periodization", level=4)
        energy = np.concatenate(bands) ** 2
        spectrum = np.array([abs(sum(unit * np.exp(-2j * np.pi * f * np.arange(WINDOW) / WINDOW))) ** 2 / WINDOW
                             for f in range(WINDOW)])  # fmt: skip
        rows.append({
            "best_cosine": max(np.abs(band).max() for band in bands[1:]),
            "scaling_cosine": abs(bands[0][0]),
            "capture": sum(np.sum(band**2) for band in bands[: LEVEL + 1]),
            "wavelet_capture": sum(np.sum(band**2) for band in bands[1 : LEVEL + 1]),
            "effective_rank": np.exp(-sum(p * np.log(p) for p in energy if p > 0)),
            "dft_effective_rank": np.exp(-sum(p * np.log(p) for p in spectrum if p > 0)),
            "discontinuity_index": max(abs(one[i + 1] - one[i]) for i in range(WINDOW - 1)) / (max(one) - min(one)),
            "lti_order": float(lti_limits.core.lti_order(one)),  # a Hankel matrix turned round has the same rank
        })  # fmt: skip
    basis = np.linalg.qr(kernel.T)[0]
    steps = np.kron(np.eye(4), np.ones(4)) / 2
    residual = np.linalg.norm(steps.T - basis @ basis.T @ steps.T) ** 2 / 4
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} | {"capture_residual": residual}


def worst(result, layer, row, kernel):
    """Largest difference between a result and `by_hand`, relative where above 1."""
    here = result.isel(layer=layer, batch=row, query_token=0)
    found = by_hand(kernel)
    return max(np.max(np.abs(here[name].values - want) / np.maximum(1, np.abs(want))) for name, want in found.items())


def disagreement(trace, reference, kind, **options):
    """Largest difference over layers and rows, measured on `trace`, by hand on `reference`."""
    result = wavelet_alignment.measure(trace, kernel=kind, query_tokens=[QUERY], level=LEVEL, **options)
    return max(
        worst(result, layer, row, by_autograd(reference, layer, row, kind)[:, -WINDOW:])
        for layer, row in np.ndindex(2, 2)
    )


@pytest.mark.parametrize("kind", ["write", "mixer"])
def test_frozen_kernels_agree_with_autograd_through_the_recurrence(recorded, kind):
    assert disagreement(recorded, recorded, kind) < TOLERANCE


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_block_kernels_agree_with_finite_differences(kind):
    torch.manual_seed(0)
    block = BLOCKS[kind]().double().eval()
    u = torch.randn(2, 24, 6, dtype=torch.float64)
    direction, rows = np.array([1.0, -1, 2, 0, 0.5, 1]), np.random.default_rng(0).standard_normal((3, 6))
    with mp.attach(block) as probe:
        trace = probe.record(u)
        jacobian = probe.jacobian(u, layer=0, query_tokens=[QUERY], read_out=rows, direction=direction)
    slope = np.zeros((2, 3, QUERY + 1))
    with torch.no_grad():
        for s in range(QUERY + 1):
            moved = torch.zeros_like(u)
            moved[:, s] = 1e-5 * torch.as_tensor(direction)
            change = (block(u + moved) - block(u - moved))[:, QUERY].numpy() / 2e-5
            slope[:, :, s] = change @ rows.T
    result = wavelet_alignment.measure(trace, kernel="block", jacobian=jacobian, level=LEVEL)
    for row in range(2):
        assert worst(result, 0, row, slope[row][:, -WINDOW:]) < TOLERANCE
    assert result.attrs["estimator"].startswith("block kernels d out_t / d u_s, selection moving")
    assert not [name for name in result.data_vars if "null" in name]
    assert "baseline=" in result.attrs["null"]


def test_a_block_has_its_twin_beside_it():
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        with mp.attach(BLOCKS["mamba1"]().double()) as probe:
            u = torch.randn(2, 24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            found.append(probe.jacobian(u, layer=0, query_tokens=[QUERY, 22], direction=np.ones(6)))
    both = wavelet_alignment.measure(None, kernel="block", jacobian=found[0], baseline=found[1])
    own = wavelet_alignment.measure(None, kernel="block", jacobian=found[1])
    np.testing.assert_array_equal(both.layer_baseline_best_cosine, own.layer_best_cosine)
    assert both.query_token.values.tolist() == [QUERY, 22]
    part = wavelet_alignment.measure(None, kernel="block", jacobian=found[0], query_tokens=[22])
    np.testing.assert_array_equal(part.best_cosine[:, :, 0], both.best_cosine[:, :, 1])


def test_every_result_names_its_kernel(recorded):
    for kind in ("write", "mixer"):
        result = wavelet_alignment.measure(recorded, kernel=kind)
        assert result.attrs["kernel_name"] == kind
        assert result.attrs["kernel"] == f"{kind}, one a {recorded['delta'].dims[-1]}"
        assert result.attrs["estimator"].startswith(f"{kind} kernels")


def test_a_trace_of_delta_and_A_has_write_kernels_alone(recorded):
    bare = recorded.drop_vars(["B", "C"])
    whole, part = (wavelet_alignment.measure(trace, kernel="write") for trace in (recorded, bare))
    xr.testing.assert_identical(whole, part)
    with pytest.raises(ValueError, match="lacks `B`"):
        wavelet_alignment.measure(bare)


def test_a_time_invariant_layer_is_its_own_null():
    ids, mask = prompt()
    with mp.attach(perturbed("s4d")) as probe:
        result = wavelet_alignment.measure(probe.record(ids, mask))
    for name in ("best_cosine", "effective_rank", "capture", "discontinuity_index", "lti_order"):
        for null in ("null_", "null_shuffle_"):
            np.testing.assert_allclose(result[f"layer_{null}{name}"], result[f"layer_{name}"], rtol=1e-9)


# Mutations: of what comes in, and of how it is computed. Each must show far above the tolerance.


@pytest.fixture
def mamba1():
    ids, mask = prompt()
    with mp.attach(perturbed("mamba1")) as probe:
        return probe.record(ids, mask)


def test_swapping_B_and_C_shows(mamba1):
    swapped = mamba1.rename({"B": "C", "C": "B"})
    assert disagreement(swapped, mamba1, "mixer") > 1e-3
    assert disagreement(swapped, mamba1, "write") < TOLERANCE, "which has neither"


def test_zoh_for_euler_shows(mamba1):
    assert disagreement(mamba1.assign_attrs(discretization="zoh"), mamba1, "mixer") > 1e-3


def test_shifting_delta_by_one_token_shows(mamba1, monkeypatch):
    steps = kernels.TraceKernels._steps
    monkeypatch.setattr(kernels.TraceKernels, "_steps", lambda self, *where: np.roll(steps(self, *where), 1, axis=0))
    assert disagreement(mamba1, mamba1, "write") > 1e-3


def test_shifting_B_by_one_token_shows(mamba1, monkeypatch):
    load = kernels.Canonical.load

    def shifted(self, wanted, *where, **which):
        return np.roll(load(self, wanted, *where, **which), wanted == "B", axis=0)

    monkeypatch.setattr(kernels.Canonical, "load", shifted)
    assert disagreement(mamba1, mamba1, "mixer") > 1e-3


def test_decay_of_the_written_token_itself_shows(mamba1, monkeypatch):
    """exp(A sum over r = s .. t) in place of r = s + 1 .. t."""

    def late(self):
        return self.delta, np.cumsum(self.delta, axis=1) - self.delta

    monkeypatch.setattr(kernels._Block, "real", property(late))
    assert disagreement(mamba1, mamba1, "write") > 1e-3


def test_dropping_the_padding_mask_shows(mamba1):
    unmasked = mamba1.assign_coords(
        valid=(("batch", "token"), np.ones((2, 24), bool)), position=(("batch", "token"), [np.arange(24)] * 2)
    )
    with pytest.raises(ValueError, match="NaN or infinite in layer 0, row 0, at valid token 0"):
        wavelet_alignment.measure(unmasked)
    filled = unmasked.fillna(1.0)  # and where padding holds numbers, another token is asked
    assert disagreement(filled, mamba1, "mixer") > 1e-3


def test_bf16_decay_in_place_of_delta_shows(mamba1, monkeypatch):
    honest = kernels.attention_row

    def rounded(delta, elapsed, A, *rest):
        """exp(A Cum) as the product of steps exp(delta A), each rounded to bf16."""
        step = -np.diff(elapsed, axis=0)
        assert A.shape[1] == 1
        one = torch.as_tensor(np.exp(step * A[:, 0])).to(torch.bfloat16).double().numpy()
        decay = np.concatenate([np.cumprod(one[::-1], axis=0)[::-1], np.ones((1, len(A)))])
        return honest(delta, np.log(np.maximum(decay, 1e-300)) / A[:, 0], A, *rest)

    slow = mamba1.isel(state=[0]).assign(A=mamba1["A"].isel(state=[0]) * 0 - 2e-3)
    assert disagreement(slow, slow, "mixer") < TOLERANCE
    monkeypatch.setattr(kernels, "attention_row", rounded)
    assert disagreement(slow, slow, "mixer") > 1e-5
    monkeypatch.undo()
    constant = slow.assign(delta=slow["delta"] * 0 + 0.5)  # exp(-.001) is 1 in bf16: nothing is forgotten
    fades = wavelet_alignment.measure(constant, kernel="write").layer_scaling_cosine
    monkeypatch.setattr(kernels, "attention_row", rounded)
    never = wavelet_alignment.measure(constant, kernel="write").layer_scaling_cosine
    assert (1 - fades > 1e-6).all()
    np.testing.assert_allclose(never, 1, atol=1e-12)


def jacobian(**options):
    with mp.attach(BLOCKS["mamba1"]()) as probe:
        return probe.jacobian(torch.zeros(1, 24, 6), layer=0, **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"jacobian": "norms"}, "norms, which have no sign and so no wavelets: pass direction="),
        ({"jacobian": "sources"}, r"needs probe.jacobian\(..., query_tokens=..., direction=...\)"),
        ({"jacobian": "signed", "read_out": np.ones((1, 6))}, "goes to probe.jacobian"),
        ({"jacobian": "signed", "query_tokens": [5]}, r"query_tokens \[5\] are not in the jacobian, which has \[20\]"),
        ({"jacobian": "signed", "trace": "another"}, "of different models"),
        ({}, "measured from jacobian="),
    ],
)
def test_jacobians_it_cannot_use_are_refused(arguments, text, mamba1):
    along = np.ones(6)
    known = {
        "norms": lambda: jacobian(query_tokens=[20]),
        "sources": lambda: jacobian(source_tokens=[2], direction=along),
        "signed": lambda: jacobian(query_tokens=[20], direction=along),
    }
    arguments = dict(arguments)
    if "jacobian" in arguments:
        arguments["jacobian"] = known[arguments["jacobian"]]()
    trace = mamba1 if arguments.pop("trace", None) else None
    with pytest.raises(ValueError, match=text):
        wavelet_alignment.measure(trace, kernel="block", **arguments)
    with pytest.raises(ValueError, match="kernel 'write' is measured from a trace; got None"):
        wavelet_alignment.measure(None, kernel="write")
