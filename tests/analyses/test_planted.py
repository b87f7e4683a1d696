"""Planted answers, recovered through load -> attach -> record -> measure, and absent on the randomised twins."""

import numpy as np
import pytest

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon, recall_circuit, wavelet_alignment

LENGTH, KEPT = 128, 50


def loaded(construction, folder):
    """The construction as a user gets it: from a directory."""
    return mp.load(construction.save(folder / construction.name.split(",")[0]))


@pytest.fixture(params=["planted", "twin"])
def planted(request):
    return request.param == "planted"


def of(construction, planted):
    return construction if planted else construction.randomised(seed=3)


def test_haar_kernels_are_the_wavelets(planted, tmp_path):
    construction = mp.constructions.haar(length=LENGTH, levels=3)
    signal = np.random.default_rng(0).standard_normal((3, LENGTH))
    with mp.attach(loaded(of(construction, planted), tmp_path)) as probe:
        trace = probe.record(construction.inputs(signal))
    result = wavelet_alignment.measure(trace, read_out=construction.read_out)
    cosine, smallest = result["best_cosine"].isel(kernel=slice(1, None)), result["principal_cosine"].min().item()
    if planted:
        np.testing.assert_allclose(cosine, 1.0, atol=1e-6)
        assert smallest > 1 - 1e-6
        assert result["layer_wavelet_capture"].item() == pytest.approx(7 / 8, abs=1e-6)
        assert result["layer_null_best_cosine"].item() < 1e-6, "nothing of it is left once time-invariant"
    else:
        assert cosine.max().item() < 0.8
        assert smallest < 0.1
        assert result["layer_best_cosine"].item() < 0.65


def test_keep_nth_forgets_until_n_and_keeps_after(planted, tmp_path):
    construction = mp.constructions.keep_nth(n_tokens=16, length=LENGTH, n=KEPT)
    tokens = np.random.default_rng(0).integers(0, 16, (3, LENGTH))
    with mp.attach(loaded(of(construction, planted), tmp_path)) as probe:
        trace = probe.record(construction.inputs(tokens))
    result = memory_horizon.measure(trace, tokens=[10, KEPT - 1, KEPT], event_tokens=KEPT)
    before, at, after = result["mean_decay_event"].mean(["channel", "state"]).values[0]
    horizons = result["token_forward_horizon"]
    if planted:
        assert (before, at) == pytest.approx((0.0, 0.0), abs=1e-12)
        assert after == pytest.approx(1.0, abs=1e-12)
        assert (horizons.isel(query_token=[0, 1]) == 1).all()
        assert np.isinf(horizons.isel(query_token=2)).all(), "censored, and marked so"
        assert result["layer_lti_horizon"].max().item() < 0.01
    else:
        assert abs(after - before) < 0.05
        assert abs(at - before) < 0.05
        reached = horizons.where(np.isfinite(horizons)).median("query_token")
        assert reached.max() > 3


def test_mqar_circuit_is_found_where_it_is(planted):
    model = mp.load("zoo:mqar-mamba1")
    twin = mp.constructions.mqar(n_keys=128, n_values=128).randomised(seed=3).model
    task = mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=77)
    recorded = []
    for subject in (model, twin):
        with mp.attach(subject) as probe:
            trace = probe.record(task, variables=("delta", "A", "B", "C", "x", "z", "out"))
            edits = probe.intervene(task, [mp.ablate("conv"), mp.ablate("gate")])
            recorded.append((trace, probe.weights(), edits))
    (trace, weights, edits), (twin_trace, twin_weights, twin_edits) = recorded
    if planted:
        result = recall_circuit.measure(
            trace, weights=weights, interventions=edits, baseline=(twin_trace, twin_weights)
        )
        ideal = ["S1", "S3", "S5", "S6", "S7", "S9", "S10_rel", "S10_C0"]
        np.testing.assert_allclose(result["value"].sel(signature=ideal), 1.0, atol=1e-5)
        assert result["offset"].item() == 0
        assert result["identity_error"].max().item() < 1e-5
        near_chance = result["baseline"].sel(signature=["S1", "S3", "S6"]).values.ravel()
        assert (near_chance < [0.3, 0.12, 0.3]).all()
        share = result["causal_share"].sel(intervention="ablate(conv)").item()
        assert share == pytest.approx(1.0, abs=0.05)
        assert result["causal_share"].sel(intervention="ablate(gate)").item() == 0.0
    else:
        result = recall_circuit.measure(twin_trace, weights=twin_weights, interventions=twin_edits)
        assert not bool(result["solved"])
        assert result["value"].isnull().all()
        assert "no circuit" in result.attrs["verdict"]
