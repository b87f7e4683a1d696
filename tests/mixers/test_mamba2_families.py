"""Hybrids of transformers with Mamba-2 mixers, taken over: held to the library and to a float64 reference."""

import copy
import sys
from itertools import product

import mamba2_families as families
import numpy as np
import pytest
import torch
from cells import error, prompt, run, validity

import mamba_probe as mp

KINDS, CHUNK, TAPS = families.KINDS, families.CHUNK, families.TAPS
VARIABLES = ("delta", "B", "C", "x", "z", "h", "y", "out", "u")
LENGTHS = (1, TAPS - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def _grid():
    """Every cell; `make test` runs each kind at each length once, padding and groups taking turns."""
    for row, kind in enumerate(KINDS):
        for at, (length, padded, groups) in enumerate(product(LENGTHS, (False, True), (1, 2))):
            if padded and length == 1:
                continue  # a row of padding alone
            turn = 2 * padded + groups - 1
            sampled = turn == (at // 4 + row) % (2 if length == 1 else 4)
            yield pytest.param(kind, groups, length, padded, marks=() if sampled else pytest.mark.long)


def decodable(kind, ids, mask=None):
    """All rows, or the last alone where this release mixes those of single tokens."""
    kept = slice(-1, None) if families.mixes_single_tokens(kind) else slice(None)
    return ids[kept], None if mask is None else mask[kept]


def rightly_normed(kind):
    """Two groups, or one where this release norms two as one."""
    return families.build(kind, 1 if families.norms_as_one(kind) else 2)


def references(model, trace, valid, **options):
    """The float64 reference of each layer, on what the trace says that its mixer took."""
    spec = families.spec_of(model.config)
    for layer, mixer in families.mixers(model).items():
        u = trace["u"].sel(layer=layer).values.astype(np.float64)
        yield layer, families.reference(mixer, spec, u, valid, **options)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("kind", "groups", "length", "padded"), list(_grid()))
def test_recordings_outputs_and_logits(kind, groups, length, padded):
    model = families.build(kind, groups)
    ids, mask = prompt(length, padded)
    ids, mask = decodable(kind, ids, mask) if length == 1 else (ids, mask)
    valid, native = validity(ids, mask), run(model, ids, mask)
    with mp.attach(model) as probe:
        trace, parity = probe.record(ids, mask, variables=VARIABLES), probe.parity(ids, mask)
        probed = run(model, ids, mask)
    for layer, made in references(model, trace, valid):
        for name, exact in made.items():
            assert error(trace[name].sel(layer=layer), exact, valid) <= 2e-6, (layer, name)
    wrong = ("out_vs_oracle", "native_vs_oracle") if families.norms_as_one(kind, groups) else ()
    for name in ("out_vs_native", "out_vs_oracle", "native_vs_oracle", "delta", "B", "C"):
        assert (parity[name] > 1e-3).all() if name in wrong else (parity[name] <= 2e-6).all(), name
    exact = families.logits_in_float64(model, ids, mask)
    assert error(probed, native, valid) <= max(2e-6, 2 * error(native, exact, valid))
    assert (run(model, ids, mask) == native).all(), "detach restores the very bits"


def test_layers_have_the_models_own_numbers_and_others_are_left_alone(kind):
    model = families.build(kind)
    with mp.attach(model) as probe:
        assert list(probe.layers) == families.LAYERS.get(kind, [0, 1])
        assert sum("forward" in m.__dict__ for m in model.modules()) == len(probe.layers)
        assert probe.record(prompt(5, False)[0])["layer"].values.tolist() == list(probe.layers)


def test_generate_gives_the_same_tokens_and_decoding_never_clamps_delta(kind):
    model, (ids, mask) = families.build(kind), decodable(kind, *prompt(9, padded=True))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    with mp.attach(model) as probe, probe.recording(variables=VARIABLES) as recorder:
        produced = model.generate(ids, **options)
    assert (produced == expected).all()
    trace = recorder.dataset
    valid = trace["valid"].values
    assert trace["phase"].values[-1].tolist() == ["prefill"] * 9 + ["decode"] * 7
    for layer, made in references(model, trace, valid, clamped=9):
        for name, exact in made.items():
            assert error(trace[name].sel(layer=layer), exact, valid) <= 2e-6, (layer, name)
    low = families.spec_of(model.config).limits[0]
    delta = trace["delta"].values.swapaxes(1, 2)
    assert np.nanmin(delta[:, :9]) >= low - 1e-6 > np.nanmin(delta[:, 9:])


def test_a_continuation_starts_from_the_cached_state(kind):
    model, (ids, _) = families.build(kind), prompt(30, padded=False)

    def continued():
        with torch.no_grad():
            past = model(ids[:, :20], use_cache=True).past_key_values
            position = torch.arange(20, 30)[None]  # left to itself, BambaModel counts from 0 again
            return model(ids[:, 20:], past_key_values=past, position_ids=position, use_cache=True).logits.numpy()

    native = continued()
    with mp.attach(model) as probe:
        with probe.recording(variables=VARIABLES) as recorder:
            probed = continued()
        whole = probe.record(ids, variables=("h", "out"))
    assert error(probed, native) <= 1e-5
    for name in ("h", "out"):
        assert error(recorder.dataset[name], whole[name]) <= 1e-5
    for layer, made in references(model, recorder.dataset, np.ones(ids.shape, bool)):
        for name, exact in made.items():
            assert error(recorder.dataset[name].sel(layer=layer), exact) <= 2e-6, (layer, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_the_library(kind, dtype):
    model, (ids, mask) = rightly_normed(kind).to(dtype), prompt(3 * CHUNK + 5, padded=True)
    with mp.attach(model) as probe:
        parity = probe.parity(ids, mask)
    assert (parity["out_vs_oracle"] <= 2 * parity["native_vs_oracle"]).all()
    assert float(parity["native_vs_oracle"].max()) <= 0.1


@pytest.mark.parametrize("target", ["conv", "gate", "decay", "delta", "B", "C"])
def test_ablations_are_those_of_the_reference(kind, target):
    model, (ids, mask) = families.build(kind), prompt(CHUNK + 1, padded=True)
    valid = validity(ids, mask)
    with mp.attach(model) as probe, probe.edit(mp.ablate(target)):
        trace = probe.record(ids, mask, variables=VARIABLES)
    plain = dict(references(model, trace, valid))
    for layer, made in references(model, trace, valid, without=target):
        for name in ("x", "z", "h", "y", "out"):
            recorded = trace[name].sel(layer=layer).values[valid]
            assert np.abs(recorded - made[name][valid]).max() <= 3e-6 * np.abs(made[name][valid]).max(), (layer, name)
        assert error(made["out"], plain[layer]["out"], valid) > 1e-2


def test_gates_of_decoding_steps_are_noted_and_opened(kind):
    model, (ids, _) = families.build(kind), decodable(kind, *prompt(6, padded=False))
    with mp.attach(model) as probe, probe.edit(mp.ablate("gate")), probe.recording(variables=VARIABLES) as recorder:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    trace = recorder.dataset
    for layer, made in references(model, trace, trace["valid"].values, without="gate", clamped=6):
        for name in ("z", "y", "out"):
            assert error(trace[name].sel(layer=layer), made[name]) <= 3e-6, (layer, name)


def test_training_reaches_the_scan_with_the_fused_kernel_installed(kind, monkeypatch):
    """The library's short-cut, simulated: in train() without a cache it would answer instead of the scan."""
    model, (ids, _) = families.build(kind), prompt(12, padded=False)
    mixer = next(iter(families.mixers(model).values()))
    native = run(model, ids)
    module = sys.modules[type(mixer).__module__]
    monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *a, **k: torch.zeros(3, 12, 24))
    model.train()
    assert error(model(ids, use_cache=False).logits.detach(), native) > 1e-2, "the short-cut is taken"
    with mp.attach(model) as probe:
        trace = probe.record({"input_ids": ids, "use_cache": False}, variables=["delta", "out"])
        probed = model(ids, use_cache=False).logits
    assert error(probed.detach(), native) <= 1e-5
    assert float(abs(trace["out"]).max()) > 0
    probed.square().sum().backward()
    assert mixer.A_log.grad.abs().max() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_weights_act_on_the_mixers_input_and_on_the_last_norm(kind, bias):
    """Multipliers of Falcon-H1's projection and of the logits are in them, so no reader needs to know of any."""
    model, (ids, _) = families.build(kind, bias=bias), prompt(11, padded=False)
    with mp.attach(model) as probe:
        trace, weights = probe.record(ids, variables=VARIABLES), probe.weights()
    assert ("in_proj_bias_z" in weights) == ("out_proj_bias" in weights) == bias

    def projected(part):
        return trace["u"].dot(weights[f"in_proj_{part}"], dim="model") + weights.get(f"in_proj_bias_{part}", 0)

    def same(found, name):
        assert error(found.transpose(*trace[name].dims), trace[name]) <= 2e-6

    same(projected("z"), "z")
    delta = np.logaddexp(0, projected("dt") + weights["dt_bias"])
    same(delta.clip(*families.spec_of(model.config).limits), "delta")
    for part in ("x", "B", "C"):
        taps, rows = weights[f"conv_{part}"], projected(part)
        lags = [rows.shift(token=lag, fill_value=0) * taps.isel(lag=lag) for lag in range(TAPS)]
        summed = sum(lags) + weights[f"conv_bias_{part}"]
        same(summed / (1 + np.exp(-summed)), part)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.numpy()
    assert error(hidden @ weights["unembedding"].values.T, run(model, ids)) <= 2e-6
    (last,) = [m for m in model.model.children() if type(m).__name__.endswith("RMSNorm")]
    assert (weights["norm_f"].values == last.weight.detach().numpy()).all()


def test_copies_and_other_models_are_untouched(kind):
    one, two, (ids, _) = families.build(kind), families.build(kind, seed=1), prompt(20, padded=False)
    before = run(one, ids), run(two, ids)
    with mp.attach(one) as probe, probe.edit(mp.ablate("gate"), mp.ablate("conv")):
        assert error(run(one, ids), before[0]) > 1e-2
        assert (run(two, ids) == before[1]).all()
        twin = copy.deepcopy(one)
        assert (run(twin, ids) == before[0]).all()
    mp.detach(twin)
    with mp.attach(twin) as probe:
        assert error(probe.record(ids, variables=["delta"])["delta"], _delta(one, ids)) <= 2e-6
    assert (run(twin, ids) == before[0]).all()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (*one.modules(), *twin.modules()))


def _delta(model, ids):
    with mp.attach(model) as probe:
        return probe.record(ids, variables=["delta"])["delta"]


def test_a_release_whose_scan_is_wrong_shows_in_parity(kind, monkeypatch):
    """As releases up to 5.14 did in Zamba2 and Nemotron-H: states do not pass from chunk to chunk."""
    model, (ids, _) = rightly_normed(kind), prompt(3 * CHUNK + 5, padded=False)
    module = sys.modules[type(next(iter(families.mixers(model).values()))).__module__]
    right = module.mamba2_chunk_scan

    def forgetful(x, dt, A, B, C, chunk_size, **options):
        options["return_final_states"] = False
        pieces = zip(*(t.split(chunk_size, 1) for t in (x, dt, B, C)), strict=True)
        return torch.cat([right(x, dt, A, B, C, chunk_size, **options) for x, dt, B, C in pieces], 1)

    monkeypatch.setattr(module, "mamba2_chunk_scan", forgetful)
    with mp.attach(model) as probe:
        parity = probe.parity({"input_ids": ids, "use_cache": False})
    assert (parity["out_vs_oracle"] <= 2e-6).all()
    assert (parity["native_vs_oracle"] > 1e-3).all()
    assert (parity["out_vs_native"] > 1e-3).all()
    assert float(parity["logits_vs_native"]) > 1e-3


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_release_whose_norm_ignores_groups_shows_in_parity(kind):
    """As releases up to 5.22 did. The norm is the mixer's own: probe and library agree, and both leave the oracle."""
    model, (ids, _) = families.build(kind), prompt(CHUNK, padded=False)
    for mixer in families.mixers(model).values():
        if hasattr(mixer.norm, "group_size"):
            mixer.norm.group_size = mixer.intermediate_size
        else:
            mixer.norm.n_groups = 1
    with mp.attach(model) as probe:
        parity = probe.parity(ids)
    assert (parity["out_vs_native"] <= 2e-6).all()
    assert (parity["native_vs_oracle"] > 1e-3).all()
    assert (parity["out_vs_oracle"] > 1e-3).all()


def test_single_tokens_of_several_rows(kind):
    """Up to 5.22 Falcon-H1's norm drops the token axis, so that rows mix: the library's logits, and no recording."""
    model, (ids, _) = families.build(kind), prompt(1, padded=False)
    native = model(ids, use_cache=False).logits
    with mp.attach(model) as probe:
        assert error(model(ids, use_cache=False).logits.detach(), native.detach()) <= 2e-6
        if families.mixes_single_tokens(kind):
            assert native.shape == (3, 3, 61)
            with pytest.raises(ValueError, match=r"layer 0: the library's mixer made .* of \(3, 1, 24\), which mixes"):
                probe.record(ids)
        else:
            assert native.shape == (3, 1, 61)
            assert probe.record(ids, variables=["out"])["out"].shape == (len(probe.layers), 3, 1, 24)


def test_a_float64_model_and_a_bare_mixer(kind):
    model, (ids, mask) = rightly_normed(kind), prompt(CHUNK + 1, padded=True)
    mixer = copy.deepcopy(families.mixers(model)[families.LAYERS.get(kind, [0])[-1]])
    hidden = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        native = mixer(hidden)
    with mp.attach(mixer) as probe:
        trace = probe.record(hidden, variables=["out"])
    assert error(trace["out"].isel(layer=0), native) <= 2e-6
    model.set_experts_implementation("eager")  # the grouped one takes no float64
    with mp.attach(model.double()) as probe:
        assert probe.record(ids, mask)["delta"].dtype == np.float64
        assert float(probe.parity(ids, mask)["out_vs_oracle"].max()) <= 2e-6


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_compiled_graph_also_with_the_gate_opened(kind):
    torch._dynamo.reset()
    model, (ids, _) = families.build(kind), prompt(12, padded=False)
    with mp.attach(model) as probe, torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for edits in ((), (mp.ablate("gate"),)):
            with probe.edit(*edits):
                expected = model(ids, use_cache=False).logits
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
