"""A probed model is the model: outputs, recordings, generation, restoration. All weights are perturbed."""

import copy

import numpy as np
import pytest
import torch
from cells import error, prompt, run

import mamba_probe as mp
from mamba_probe.mixers.takeover import rebind

VARIABLES = ("delta", "A", "A_bar", "B_bar", "B", "C", "x", "z", "y", "h", "out", "delta_cumsum")
GRID = [(1, False), *((length, padded) for length in (3, 64, 65, 200) for padded in (False, True))]


@pytest.mark.parametrize(("length", "padded"), GRID)
def test_recorded_tensors_match_an_independent_float64_recomputation(model, float64_mixer, length, padded):
    ids, mask = prompt(length, padded)
    inputs = {}
    for block in model.backbone.layers:
        block.mixer.register_forward_pre_hook(
            lambda m, args, kw: inputs.update({m.layer_idx: (args or (kw["hidden_states"],))[0]}), with_kwargs=True
        )
    with mp.attach(model) as probe:
        trace = probe.record(ids, mask, variables=VARIABLES)
    valid = np.ones(ids.shape, bool) if mask is None else mask.bool().numpy()
    assert (trace["valid"].values == valid).all()
    for block in model.backbone.layers:
        layer = block.mixer.layer_idx
        made = float64_mixer(block.mixer, inputs[layer].numpy(), None if mask is None else mask.numpy())
        for name, reference in made.items():
            recorded = trace[name].sel(layer=layer).values
            assert recorded.shape == reference.shape
            assert error(recorded, reference, valid) <= 2e-6, (layer, name)


@pytest.mark.parametrize(("length", "padded"), GRID)
def test_mixer_outputs_and_logits_match_the_untouched_model(model, float64_logits, known_wrong, length, padded):
    ids, mask = prompt(length, padded)
    valid = np.ones(ids.shape, bool) if mask is None else mask.bool().numpy()
    native = run(model, ids, mask)
    with mp.attach(model) as probe:
        probed, parity = run(model, ids, mask), probe.parity(ids, mask)
    exact = float64_logits(model, ids.numpy(), None if mask is None else mask.numpy())
    rounding = 3 if known_wrong(model) else 2  # 2.05e-6 on 5.16 at 200 tokens, its own error 0.98e-6
    assert error(probed, native, valid) <= max(2e-6, rounding * error(native, exact, valid))
    assert (parity["out_vs_native"] <= 2e-6).all()
    for name in ("out_vs_oracle", "native_vs_oracle"):  # the norm is the mixer's own, also where a release is wrong
        assert (parity[name] > 1e-3).all() if known_wrong(model) else (parity[name] <= 2e-6).all()
    assert (run(model, ids, mask) == native).all(), "detach restores the very bits"


def test_identities_hold_in_the_trace(model):
    ids, mask = prompt(65, padded=True)
    with mp.attach(model) as probe:
        trace, weights = probe.record(ids, mask, variables=VARIABLES), probe.weights()
    lazy = trace.drop_vars(["A_bar", "B_bar"]).probe
    for name in ("A_bar", "B_bar"):
        assert lazy._trace.probe.__getattribute__(name).chunks is not None, "lazy"
        np.testing.assert_allclose(getattr(lazy, name), trace[name], rtol=0, atol=2e-7 * float(abs(trace[name]).max()))
    y = (trace.probe.by_head("C") * trace["h"]).sum("state", skipna=False) + weights["D"] * trace["x"]
    difference = abs(y - trace["y"]).where(trace["valid"])
    assert float(difference.max()) <= 2e-6 * float(abs(trace["y"]).max())
    increments = trace["delta_cumsum"].diff("token") - trace["delta"].isel(token=slice(1, None))
    assert float(abs(increments).max()) <= 1e-5


def test_generate_gives_the_same_tokens_and_is_recorded_step_by_step(model):
    ids, mask = prompt(9, padded=True)
    model.generation_config.eos_token_id = None  # else it stops, or a token other than the prediction is taken
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    with mp.attach(model) as probe:
        with probe.recording(variables=["delta", "A", "h", "delta_cumsum"]) as recorder:
            produced = model.generate(ids, **options)
        whole = probe.record(
            produced[:, :-1],
            torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1),
            variables=["delta", "h", "delta_cumsum"],
        )
    assert (produced == expected).all()
    trace = recorder.dataset
    assert (trace["token_id"].values == produced[:, :-1].numpy()).all()
    assert trace["phase"].values[2].tolist() == ["prefill"] * 9 + ["decode"] * 5
    assert trace["position"].values[0].tolist() == [-1] * 7 + list(range(7))
    assert (trace["prediction"].values[:, 8:] == produced[:, 9:].numpy()).all()
    if trace.attrs["family"] == "mamba":  # Mamba-2 clamps delta in prefill and not in decoding, as the library does
        for name in ("delta", "h", "delta_cumsum"):
            assert error(trace[name].values, whole[name].values, ~np.isnan(whole[name].values)) <= 1e-5


@pytest.mark.parametrize("family", ["mamba2"])
def test_mamba2_decoding_leaves_delta_unclamped_as_the_library_does(build):
    model, low = build(time_step_limit=(0.4, 1.0)), 0.4
    ids, _ = prompt(9, padded=False)
    with mp.attach(model) as probe, probe.recording(variables=["delta"]) as recorder:
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    delta = recorder.dataset["delta"]
    assert float(delta.isel(token=slice(9)).min()) >= low - 1e-6
    assert float(delta.isel(token=slice(9, None)).min()) < low


def test_another_model_is_untouched_and_a_broken_call_leaves_nothing_behind(build):
    one, two = build(), build(seed=1)
    ids, _ = prompt(20, padded=False)
    before = run(one, ids, None), run(two, ids, None)
    forwards = type(one.backbone.layers[0].mixer).forward
    with mp.attach(one) as probe:
        assert (run(two, ids, None) == before[1]).all()
        outcomes = iter([None, RuntimeError("planned")])
        handle = one.backbone.layers[1].register_forward_pre_hook(lambda *_: _raise(next(outcomes)))
        with pytest.raises(RuntimeError, match="planned"), probe.recording(variables=["delta"]) as recorder:
            _twice(one, ids)
        handle.remove()
        assert recorder.dataset.sizes["batch"] == 3, "the whole call stays readable"
        assert probe.record(ids).sizes["batch"] == 3
    assert type(one.backbone.layers[0].mixer).forward is forwards
    assert "forward" not in one.backbone.layers[0].mixer.__dict__
    assert (run(one, ids, None) == before[0]).all()


def _raise(error):
    if error is not None:
        raise error


def _twice(model, ids):
    run(model, ids, None)
    run(model, ids, None)


def test_an_error_inside_the_block_detaches(model):
    ids, _ = prompt(5, padded=False)
    native = run(model, ids, None)
    with pytest.raises(KeyError), mp.attach(model):
        raise KeyError("user's own")
    assert (run(model, ids, None) == native).all()


def test_training_mode_reaches_the_scan_even_with_a_fused_kernel_installed(model, monkeypatch):
    """The library's short-cut, simulated: in train() without a cache it would answer instead of the scan."""
    ids, _ = prompt(12, padded=False)
    module = __import__(type(model.backbone.layers[0].mixer).__module__, fromlist=["x"])
    name = {"mamba": "mamba_inner_fn", "mamba2": "mamba2_split_conv1d_scan_combined"}[model.config.model_type]
    native = run(model, ids, None)
    monkeypatch.setattr(module, name, lambda *a, **k: torch.zeros(3, 12, 24))
    model.train()
    with mp.attach(model) as probe:
        trace = probe.record({"input_ids": ids, "use_cache": False}, variables=["delta", "out"])
        probed = model(ids, use_cache=False).logits
    assert error(probed.detach().numpy(), native, np.ones(ids.shape, bool)) <= 2e-6
    assert float(abs(trace["out"]).max()) > 0
    probed.sum().backward()
    assert model.backbone.layers[0].mixer.A_log.grad.abs().max() > 0


def test_bare_mixer_backbone_and_float64(model):
    mixer = copy.deepcopy(model.backbone.layers[1].mixer)
    hidden = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        native = mixer(hidden)
    with mp.attach(mixer) as probe:
        trace = probe.record(hidden, variables=["delta", "out"])
        assert "token_id" not in trace.coords
        assert "prediction" not in trace.coords
    assert error(trace["out"].isel(layer=0), native, np.ones((2, 11), bool)) <= 2e-6
    assert trace["layer"].values.tolist() == [1]
    with mp.attach(model.backbone) as probe:
        assert probe.record(torch.tensor([[1, 2, 3]])).sizes["layer"] == 2
    with mp.attach(model.double()) as probe:
        assert probe.record(torch.tensor([[1, 2, 3]]))["delta"].dtype == np.float64


def test_naive_backend_agrees_and_is_named(model):
    ids, _ = prompt(33, padded=False)
    with mp.attach(model, backend="naive") as probe:
        naive = probe.record(ids, variables=["y", "h"])
    with mp.attach(model) as probe:
        cpu = probe.record(ids, variables=["y", "h"])
    assert (naive.attrs["backend"], cpu.attrs["backend"]) == ("naive", "cpu")
    for name in ("y", "h"):
        assert error(naive[name], cpu[name], np.ones((2, 3), bool)) <= 2e-6


def test_rebind_names_what_an_unknown_release_lacks():
    def forward(x):
        return abs(x)

    assert rebind(forward, {"abs": lambda x: "ours"})(-1) == "ours"
    assert forward(-1) == 1
    with pytest.raises(ValueError, match=r"does not call a function scan_of_tomorrow by its plain name: put the rec"):
        rebind(forward, {"scan_of_tomorrow": abs})
    forward.__module__ = "transformers.models.tomorrow"
    with pytest.raises(ValueError, match=r"does not call scan_of_tomorrow.*release of transformers"):
        rebind(forward, {"scan_of_tomorrow": abs})
