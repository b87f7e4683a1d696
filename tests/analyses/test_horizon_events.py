"""Decay around events and the mass horizon: plain loops, the constructions' ideals, null ranges, mutations caught."""

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.memory_horizon.steps import needed_retention
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock

LENGTH, KEPT, SIDES = 64, 20, ("before", "at", "after")
BLOCKS = {
    "mamba1": lambda: MambaBlock(16, d_state=8),
    "mamba2": lambda: Mamba2Block(16, n_heads=8, d_state=8, n_groups=2),
    "s4d": lambda: S4DBlock(16, d_state=8),
}
NULL_RANGES = {
    "median_gain": (0.8, 1.25),
    "restricted_gain": (0.9, 1.15),
    "layer_gamma": (-0.03, 0.03),
    "mass_gain": (0.5, 2.0),
}
"""Fixed from 20 random models of each mixer (seeds 0 to 19), with room for one more range on either side."""


def model_of(mixer: str, seed: int, noise: float = 0.0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel([BLOCKS[mixer]()], vocab_size=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape)
    return model


def record(model: torch.nn.Module, n_rows: int = 3, length: int = LENGTH, seed: int = 0) -> xr.Dataset:
    ids = torch.randint(0, 64, (n_rows, length), generator=torch.Generator().manual_seed(seed))
    with mp.attach(model) as probe:
        return probe.record(ids)


def keep(profile: str, mixer: str = "mamba1"):
    construction = mp.constructions.keep_nth(
        n_tokens=8, length=LENGTH, n=KEPT, profile=profile, mixer=mixer, dtype=torch.float64
    )
    ids = np.random.default_rng(0).integers(0, 8, (2, LENGTH))
    with mp.attach(construction.model) as probe:
        return construction, probe.record(construction.inputs(ids))


def parts(trace: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """delta (batch, token, head) and A (head, state) of the first layer, float64."""
    delta, A = (trace[name].isel(layer=0).values for name in ("delta", "A"))
    A = A.real.astype(float)
    batch, token = trace.sizes["batch"], trace.sizes["token"]
    return np.broadcast_to(delta.astype(float), (batch, token, len(A))), A.reshape(len(A), -1)


@pytest.mark.parametrize("mixer", sorted(BLOCKS))
def test_decay_around_events_agrees_with_a_loop(mixer: str) -> None:
    trace, events, epsilon = record(model_of(mixer, 0, 0.2)), [5, 20, LENGTH - 1], 0.2
    result = memory_horizon.measure(trace, event_tokens=events, epsilon=epsilon).isel(layer=0)
    delta, A = parts(trace)
    head = trace["delta"].dims[-1]
    edges = np.linspace(0, 1, 21)
    sums, counts = np.zeros((3, *A.shape)), np.zeros(3)
    bins = np.zeros((len(A), 3, 20), dtype=int)
    for row, event in enumerate(events):
        for t in range(LENGTH):
            side = 0 if t < event else 1 if t == event else 2
            counts[side] += 1
            for i, n in np.ndindex(A.shape):
                decay = np.exp(A[i, n] * delta[row, t, i])
                sums[side, i, n] += decay
                bins[i, side, min(np.searchsorted(edges, decay, "right") - 1, 19)] += 1
    for side, name in enumerate(SIDES):
        np.testing.assert_allclose(result["mean_decay_event"].sel(event=name), sums[side] / counts[side], atol=1e-6)
    gamma = sums[2] / counts[2] - (sums[0] + sums[1]) / (counts[0] + counts[1])
    np.testing.assert_allclose(result["gamma"], gamma, atol=1e-6)
    np.testing.assert_allclose(result["layer_gamma"], gamma.mean(), atol=1e-6)
    np.testing.assert_array_equal(result["decay_count"].transpose(head, "event", "decay_bin"), bins)
    np.testing.assert_array_equal(result["layer_decay_count"], bins.sum(0))
    for row, event in enumerate(events):
        sigma = np.zeros(A.shape)
        for t in range(event + 1, LENGTH):
            sigma -= A * delta[row, t][:, None]
        np.testing.assert_allclose(result["sigma"].isel(batch=row), sigma, atol=1e-6)
        after = LENGTH - 1 - event
        mean = np.exp(-sigma / after) if after else np.full(A.shape, np.nan)
        np.testing.assert_allclose(result["geometric_decay_after"].isel(batch=row), mean, atol=1e-6)
        needed = (1 - epsilon) ** (1 / after) if after else np.nan
        np.testing.assert_allclose(result["needed_retention"].isel(batch=row), needed, rtol=1e-12)
    kept = (np.exp(-result["sigma"]) >= 1 - epsilon).mean().item()
    assert result["layer_retained_share"].item() == pytest.approx(kept, abs=1e-12)


def test_the_retention_that_is_needed() -> None:
    """n = 5 and epsilon = .1 at three lengths; and exactly that much in each step leaves 1 - epsilon."""
    steps = np.array([64, 512, 4096]) - 5.0
    needed = needed_retention(steps, 0.1)
    np.testing.assert_allclose(needed, [0.99822, 0.99979, 0.999974], atol=5e-6)
    np.testing.assert_allclose(needed**steps, 0.9)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("profile", ["ramp", "event"])
def test_constructions_have_their_ideal_signatures(profile: str, mixer: str) -> None:
    construction, trace = keep(profile, mixer)
    ideal = construction.signatures
    result = memory_horizon.measure(trace, event_tokens=KEPT, tokens=[KEPT - 1, KEPT])
    for side in SIDES:
        assert np.abs(result["mean_decay_event"].sel(event=side) - ideal[f"mean_decay_{side}"]).max() < 1e-12
    assert np.abs(result["gamma"] - ideal["gamma"]).max() < 1e-12
    assert result["sigma"].max() <= ideal["sigma_at_most"] * (1 + 1e-6)
    assert result["sigma"].min() >= ideal["sigma_at_most"] / 1.01
    assert result["layer_retained_share"].item() == 1
    assert (result["geometric_decay_after"] >= result["needed_retention"]).all()
    assert (result["token_forward_horizon"].sel(query_token=KEPT - 1) == ideal["horizon_before_n"]).all()
    assert (result["token_forward_horizon_at_least"].sel(query_token=KEPT) >= ideal["horizon_of_n_at_least"]).all()
    if profile == "ramp":
        counts = result["layer_decay_count"].isel(layer=0)
        assert counts.sel(event="before", decay_bin=0).item() == counts.sel(event="before").sum().item() > 0
        assert counts.sel(event="after").isel(decay_bin=-1).item() == counts.sel(event="after").sum().item() > 0
        assert abs(result["layer_null_shuffle_gamma"].item()) < 0.2


def null_values(mixer: str, seed: int) -> dict[str, float]:
    trace = record(model_of(mixer, seed), seed=seed)
    result = memory_horizon.measure(trace, event_tokens=LENGTH // 2, tokens=[16, 32, 63], mass=True, n_bootstrap=2)
    found = {
        "layer_gamma": result["layer_gamma"].item(),
        "median_gain": float(np.nanmedian(result["selectivity_gain"])),
    }
    for gain, name in (("restricted_gain", "forward_restricted_mean"), ("mass_gain", "mass_horizon")):
        null = name.replace("forward", "null_lti") if "forward" in name else f"null_lti_{name}"
        found[gain] = (result[f"layer_{name}"] / result[f"layer_{null}"]).item()
    return found


@pytest.mark.parametrize("seed", range(100, 105))
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_other_random_models_lie_in_the_null_range(mixer: str, seed: int) -> None:
    for name, value in null_values(mixer, seed).items():
        low, high = NULL_RANGES[name]
        assert low < value < high, (name, value)


@pytest.mark.long
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_the_null_ranges_are_those_of_twenty_random_models(mixer: str) -> None:
    values = [null_values(mixer, seed) for seed in range(20)]
    for name, (low, high) in NULL_RANGES.items():
        of = [value[name] for value in values]
        assert low < min(of) <= max(of) < high, (name, min(of), max(of))


def test_a_planted_memory_lies_outside_the_null_range() -> None:
    _, trace = keep("ramp")
    result = memory_horizon.measure(trace, event_tokens=KEPT)
    assert result["layer_gamma"].item() > 10 * NULL_RANGES["layer_gamma"][1]
    ratio = result["layer_forward_restricted_mean"] / result["layer_null_lti_restricted_mean"]
    assert ratio.item() > 10 * NULL_RANGES["restricted_gain"][1]


def mass_by_loops(trace: xr.Dataset, row: int, query: int, zoh: bool) -> np.ndarray:
    delta, _ = parts(trace)
    A, B, C = (trace[name].isel(layer=0).values.astype(complex) for name in ("A", "B", "C"))
    A = A.reshape(len(A), -1)
    found = np.zeros(len(A))
    for i in range(len(A)):
        weight, moved = 0.0, 0.0
        for s in range(query + 1):
            group = i if B.ndim == 2 else i // (len(A) // B.shape[-2])
            b, c = (B[i], C[i]) if B.ndim == 2 else (B[row, s, group], C[row, query, group])
            k = 0j
            for n in range(len(b)):
                a = A[i, n % A.shape[1]]
                write = (np.exp(a * delta[row, s, i]) - 1) / a if zoh else delta[row, s, i]
                k += c[n] * np.exp(a * delta[row, s + 1 : query + 1, i].sum()) * write * b[n]
            size = abs(k.real)
            weight, moved = weight + size, moved + (query - s) * size
        found[i] = moved / weight
    return found


@pytest.mark.parametrize("mixer", sorted(BLOCKS))
def test_mass_horizon_agrees_with_a_loop(mixer: str) -> None:
    trace = record(model_of(mixer, 1, 0.2), n_rows=2, length=24)
    result = memory_horizon.measure(trace, tokens=[0, 7, 23], mass=True)
    for row, (q, query) in product((0, 1), enumerate((0, 7, 23))):
        wanted = mass_by_loops(trace, row, query, trace.attrs["discretization"] == "zoh")
        np.testing.assert_allclose(result["mass_horizon"].values[0, row, q], wanted, rtol=1e-6, atol=1e-9)
    frozen = trace.copy()
    for name in ("delta", "B", "C"):
        if "token" in trace[name].dims:
            mean = trace[name].astype(float).mean("token").broadcast_like(trace[name])
            frozen[name] = mean.transpose(*trace[name].dims)
    again = memory_horizon.measure(frozen, tokens=[0, 7, 23], mass=True)
    np.testing.assert_allclose(again["mass_horizon"], result["null_lti_mass_horizon"], rtol=1e-6, atol=1e-9)


def test_mass_needs_queries_and_every_token() -> None:
    trace = record(model_of("mamba1", 0), length=24)
    with pytest.raises(ValueError, match=r"mass is measured at queries: .* tokens=\[...\]"):
        memory_horizon.measure(trace, mass=True)
    trace["delta_cumsum"] = trace["delta"].astype(float).cumsum("token").transpose(*trace["delta"].dims)
    with pytest.raises(ValueError, match="mass needs every token before a query, and those of row 0"):
        memory_horizon.measure(trace.isel(token=[0, 1, 5]), tokens=[5], mass=True)
    with pytest.raises(ValueError, match="C"):
        memory_horizon.measure(trace.drop_vars("C"), tokens=[5], mass=True)
    with pytest.raises(ValueError, match=r"epsilon is what may be lost of a write, above 0 and below 1; got 1\.0"):
        memory_horizon.measure(trace, epsilon=1.0)


@pytest.mark.parametrize("mutation", ["token", "padding", "bf16", "zoh"])
def test_mutations_are_caught(mutation: str) -> None:
    """What a wrong recording would change is seen: by one token, padding as a token, a rounded A_bar, another write."""
    if mutation == "zoh":
        trace = record(model_of("mamba1", 1, 0.2))
        right, wrong = (
            memory_horizon.measure(trace.assign_attrs(discretization=rule), tokens=[40], mass=True)
            for rule in ("euler", "zoh")
        )
        assert np.abs(right["mass_horizon"] - wrong["mass_horizon"]).max() > 1e-3
        xr.testing.assert_equal(right["forward_horizon"], wrong["forward_horizon"])  # zoh changes writes, not decay
        return
    _, trace = keep("ramp")
    right = memory_horizon.measure(trace, event_tokens=KEPT, tokens=[KEPT])
    if mutation == "token":
        moved = trace.assign(delta=trace["delta"].roll(token=1))
        wrong = memory_horizon.measure(moved, event_tokens=KEPT, tokens=[KEPT])
        assert wrong["token_forward_horizon"].max() == 1
        assert np.isinf(right["token_forward_horizon"]).all()
    elif mutation == "padding":
        delta = np.pad(trace["delta"].values, ((0, 0), (0, 0), (6, 0), (0, 0)), constant_values=0.01)
        position = np.pad(trace["position"].values, ((0, 0), (6, 0)), constant_values=-1)
        junk = xr.Dataset(
            {"delta": (trace["delta"].dims, delta), "A": trace["A"]},
            {"layer": trace["layer"], "channel": trace["channel"], "position": (("batch", "token"), position)},
            trace.attrs,
        ).assign_coords(valid=(("batch", "token"), position >= 0))
        names = ["token_forward_horizon", "gamma", "sigma", "forward_horizon", "decay_count"]
        kept = memory_horizon.measure(junk, event_tokens=KEPT, tokens=[KEPT])
        xr.testing.assert_equal(kept[names], right[names])
        everywhere = (("batch", "token"), np.tile(np.arange(LENGTH + 6), (2, 1)))
        dropped = junk.assign_coords(valid=xr.ones_like(junk["valid"]), position=everywhere)
        wrong = memory_horizon.measure(dropped, event_tokens=KEPT, tokens=[KEPT])
        assert wrong["token_forward_horizon"].max() == 1
        assert abs(wrong["layer_gamma"].item() - 1) > 0.1 > abs(right["layer_gamma"].item() - 1)
    else:
        slow = xr.full_like(trace["delta"], 1e-3)
        wrong, exact = (
            memory_horizon.measure(trace.assign(delta=delta), event_tokens=KEPT) for delta in (of_bf16(slow), slow)
        )
        assert exact["sigma"].min().item() == pytest.approx(43e-3, rel=1e-6)
        assert wrong["sigma"].max().item() == 0, "a decay of 1e-3 a step is lost in bf16"


def of_bf16(delta: xr.DataArray) -> xr.DataArray:
    """delta as a stored bf16 A_bar would give it back, A = -1."""
    rounded = torch.exp(-torch.tensor(delta.values)).bfloat16().double()
    return delta.copy(data=np.abs(np.log(rounded.numpy())).astype(delta.dtype))


def test_the_picture_of_an_event_shows_each_side_and_its_null() -> None:
    import matplotlib.pyplot as plt

    _, trace = keep("ramp")
    result = memory_horizon.measure(trace, event_tokens=KEPT)
    ax = memory_horizon.plot(result, kind="decay")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    steps = 2 * 10 * (LENGTH - 1 - KEPT)
    assert f"after the event: mean 1, {steps} steps" in labels
    assert any("null" in label and "Gamma" in label for label in labels)
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(3, 20)
    np.testing.assert_allclose(heights.sum(1), 1)
    assert heights[0, 0] == heights[1, 0] == heights[2, -1] == 1
    plt.close(ax.figure)
