"""The ideal signatures of keep_nth against what its recorded deltas say."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon
from mamba_probe.constructions import keep_nth

LENGTH = 64
PLACES = [0, 20, 63]


def build(mixer, profile, n, **more):
    return keep_nth(length=LENGTH, n=n, profile=profile, mixer=mixer, dtype=torch.float64, **more)


def recorded(construction):
    ids = np.random.default_rng(0).integers(0, 16, (2, LENGTH))
    with mp.attach(construction.model) as probe:
        return probe.record(construction.inputs(ids))


def horizon(rate, start):
    """Steps after `start` until exp(-sum of rate) is at most 1/e; infinite where the sequence ends before."""
    total = 0.0
    for k, step in enumerate(rate[start + 1 :], start=1):
        total += step
        if total >= 1:
            return k
    return np.inf


def measured(trace, n):
    """Signatures by name, each of every channel of every row: the extremes are compared."""
    delta = trace["delta"].values[0].astype(float)
    rates = delta.transpose(0, 2, 1).reshape(-1, LENGTH)  # A = -1
    decay, found = np.exp(-rates), {}
    if n:
        found["mean_decay_before"] = decay[:, :n].mean(1)
        found["horizon_before_n"] = np.array([horizon(rate, n - 1) for rate in rates])
    found["mean_decay_at"] = decay[:, n]
    if n < LENGTH - 1:
        found["mean_decay_after"] = decay[:, n + 1 :].mean(1)
        found["gamma"] = decay[:, n + 1 :].mean(1) - decay[:, : n + 1].mean(1)
    found["sigma_at_most"] = rates[:, n + 1 :].sum(1)
    found["horizon_of_n_at_least"] = np.array([horizon(rate, n) for rate in rates])
    return found


@pytest.mark.parametrize("n", PLACES)
@pytest.mark.parametrize("profile", ["ramp", "event"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_signatures_are_what_is_measured(mixer, profile, n):
    construction = build(mixer, profile, n)
    found, ideal = measured(recorded(construction), n), construction.signatures
    assert found.keys() == ideal.keys()
    for name, values in found.items():
        if name.endswith("_at_most"):
            assert values.max() <= ideal[name] * (1 + 1e-6)
            assert values.min() >= ideal[name] / 1.01
        elif name.endswith("_at_least"):
            assert np.isinf(values).all()
            assert ideal[name] == LENGTH - 1 - n
        else:
            assert np.abs(values - ideal[name]).max() < 1e-12, name


def test_the_noted_values():
    """Gamma 1 and Sigma 1.3e-14 for a ramp; for an event Gamma is next to 0, and only the decay at n tells."""
    ramp, event = (keep_nth(length=256, n=100, profile=profile).signatures for profile in ("ramp", "event"))
    assert ramp["gamma"] == 1
    assert ramp["sigma_at_most"] == pytest.approx(1.3e-14, rel=0.03)
    assert [event[f"mean_decay_{place}"] for place in ("before", "at", "after")] == [1, 0, 1]
    assert event["gamma"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("profile", ["ramp", "event"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_memory_horizon_measures_them(mixer, profile):
    construction = build(mixer, profile, 20)
    result = memory_horizon.measure(recorded(construction), tokens=[19, 20], event_tokens=20)
    for event in ("before", "at", "after"):
        got = result["mean_decay_event"].sel(event=event).values
        assert np.abs(got - construction.signatures[f"mean_decay_{event}"]).max() < 1e-12
    before, of_n = (result["token_forward_horizon"].sel(query_token=token).values for token in (19, 20))
    assert (before == construction.signatures["horizon_before_n"]).all()
    assert np.isinf(of_n).all()
    least = result["token_forward_horizon_at_least"].sel(query_token=20).values
    assert (least >= construction.signatures["horizon_of_n_at_least"]).all()


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_the_randomised_twin_has_none_of_them(mixer):
    twin = build(mixer, "ramp", 20).randomised(1)
    assert not twin.signatures
    found = measured(recorded(twin), 20)
    assert np.abs(found["gamma"]).max() < 0.6
    assert np.median(found["sigma_at_most"]) > 0.1


def test_what_a_small_beta_does_not_do_is_not_claimed():
    """At beta = 0.5 token n is not erased within a step, and decays itself; no horizon is stated."""
    assert not {"horizon_of_n_at_least", "horizon_before_n"} & build("mamba1", "ramp", 20, beta=0.5).signatures.keys()


def test_states_are_told():
    assert build("mamba2", "ramp", 20).states == ["delta of token n, in the channel of its id"]
    assert "ideal signatures: mean_decay_before 0, mean_decay_at 0" in build("mamba1", "ramp", 20).describe()
