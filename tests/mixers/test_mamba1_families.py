"""FalconMamba, Jamba and Zamba: a probed model is the model, and what is recorded is what float64 says."""

import copy
import sys

import mamba1_families as tiny
import numpy as np
import pytest
import torch
from cells import error, prompt, run, validity

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention, memory_horizon, recall_circuit, wavelet_alignment
from mamba_probe.analyses.common import Canonical

FAMILIES = tuple(tiny.BUILDERS)
VARIABLES = ("delta", "A", "A_bar", "B_bar", "B", "C", "x", "z", "y", "h", "u", "out", "delta_cumsum")
CONV, CHUNK = 4, 64
LENGTHS = (1, CONV - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
SAMPLE = [(1, False), (CONV - 1, True), (CHUNK + 1, True), (3 * CHUNK + 5, False)]
GRID = [(length, padded) for length in LENGTHS for padded in (False, True) if length > 1 or not padded]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def build(family):
    return tiny.BUILDERS[family]


@pytest.fixture
def model(build):
    return build()


def holds(model, length, padded):
    """Recorded tensors, mixer outputs and logits of one cell of the grid; more rows, a steadier largest error."""
    ids, mask = prompt(length, padded, batch=8)
    valid, native = validity(ids, mask), run(model, ids, mask)
    with mp.attach(model) as probe:
        trace, probed = probe.record(ids, mask, variables=VARIABLES), run(model, ids, mask)
        parity = probe.parity(ids, mask)
    assert (run(model, ids, mask) == native).all(), "detach restores the very bits"
    for layer, mixer in tiny.mixers(model).items():
        u = np.nan_to_num(trace["u"].sel(layer=layer).values)
        made = tiny.reference_mixer(mixer, u, None if mask is None else mask.numpy())
        for name, reference in made.items():
            recorded = trace[name].sel(layer=layer).values
            assert recorded.shape == reference.shape
            assert error(recorded, reference, valid) <= 2e-6, (layer, name)
    for name in ("out_vs_native", "out_vs_oracle", "native_vs_oracle", "delta", "B", "C"):
        assert float(parity[name].max()) <= 2e-6, name
    exact = tiny.reference_logits(model, ids, mask)
    assert error(probed, native, valid) <= max(2e-6, 2 * error(native, exact, valid))
    assert error(probed, exact, valid) <= max(2e-6, 2 * error(native, exact, valid))


@pytest.mark.parametrize(("length", "padded"), SAMPLE)
def test_recorded_tensors_outputs_and_logits_hold(model, length, padded):
    holds(model, length, padded)


@pytest.mark.long
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("length", "padded"), GRID)
def test_the_whole_grid_holds(build, length, padded, seed, bias):
    holds(build(seed, bias=bias), length, padded)


@pytest.mark.parametrize("n_heads", [1, 4])
def test_zamba_of_other_numbers_of_heads_with_biases(n_heads):
    holds(tiny.zamba(bias=True, n_mamba_heads=n_heads), 9, padded=True)


def test_layers_are_found_by_class_under_their_own_numbers(family, model):
    *_, last = numbers = list(tiny.mixers(model))
    assert numbers == tiny.LAYERS[family]
    with mp.attach(model) as probe:
        assert list(probe.layers) == numbers
        trace = probe.record(torch.tensor([[1, 2, 3]]), layers=[last], variables=["u"])
        with torch.no_grad():
            handle = tiny.mixers(model)[last].in_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
            caught = []
            model(torch.tensor([[1, 2, 3]]))
            handle.remove()
    assert trace["layer"].values.tolist() == [last]
    assert (trace["u"].values[0] == caught[0].numpy()).all()
    lie = {"falcon": ("num_hidden_layers", 1), "jamba": ("attn_layer_period", 2), "zamba": ("layers_block_type", [])}
    setattr(model.config, *lie[family])
    with mp.attach(model) as probe:
        assert list(probe.layers) == numbers, "whatever the configuration says"


def test_generate_gives_the_same_tokens_and_records_one_sequence(model):
    ids, mask = prompt(9, padded=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, **options)
    with mp.attach(model) as probe:
        with probe.recording(variables=["delta", "h", "y"]) as recorder:
            produced = model.generate(ids, attention_mask=mask, **options)
        continued = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
        whole = probe.record(produced[:, :-1], continued, variables=["delta", "h", "y"])
    assert (produced == expected).all()
    trace = recorder.dataset
    assert trace["phase"].values[2].tolist() == ["prefill"] * 9 + ["decode"] * 5
    assert (trace["prediction"].values[:, 8:] == produced[:, 9:].numpy()).all()
    for name in ("delta", "h", "y"):
        first = {"layer": 0}  # later layers differ by what attention and the norms make of rounding
        kept = ~np.isnan(whole[name].isel(first).values)
        assert error(trace[name].isel(first).values, whole[name].isel(first).values, kept) <= 1e-5


def test_continuation_by_several_tokens_drops_the_state_as_the_library_does(model):
    ids, _ = prompt(13, padded=False)

    def twice():
        with torch.no_grad():
            first = model(ids[:, :9], use_cache=True)
            cache = {name: getattr(first, name) for name in ("cache_params", "past_key_values") if hasattr(first, name)}
            return model(ids[:, 9:], **cache, use_cache=True).logits.numpy()

    native, whole = twice(), run(model, ids, None)[:, 9:]
    assert error(native, whole) > 1e-4, "transformers drops the state: if not, this release is mended, and we lag"
    with mp.attach(model) as probe:
        assert error(twice(), native) <= 2e-5
        with (
            pytest.raises(ValueError, match=r"continues a cached sequence by 4 tokens.*drops the cached state"),
            probe.recording(variables=["delta"]),
        ):
            twice()


def test_reordered_rows_are_followed(model):
    ids, _ = prompt(9, padded=False)
    model.generation_config.eos_token_id = None
    with mp.attach(model) as probe:
        with probe.recording(variables=["delta", "h"]) as recorder:
            produced = model.generate(ids, num_beams=4, max_new_tokens=8, do_sample=False, pad_token_id=0)
        whole = probe.record(produced[:, :-1], variables=["delta", "h"])
    trace = recorder.dataset
    assert (trace["parent_row"] != trace["prompt_id"]).any()
    for name in ("delta", "h"):
        assert error(trace.probe.unrolled(produced)[name], whole[name]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_the_library(model, dtype):
    model.to(dtype)
    ids, mask = prompt(CHUNK + 1, padded=True)
    with mp.attach(model) as probe:
        parity = probe.parity(ids, mask)
        trace = probe.record(ids, mask, variables=["u", "out", "delta"])
    assert trace["delta"].dtype == np.float32
    valid = validity(ids, mask)
    for layer, mixer in tiny.mixers(model).items():
        exact = tiny.reference_mixer(mixer, np.nan_to_num(trace["u"].sel(layer=layer).values), mask.numpy())
        native = float(parity["native_vs_oracle"].sel(layer=layer))
        assert error(trace["out"].sel(layer=layer).values, exact["out"], valid) <= 2 * native
        assert float(parity["out_vs_oracle"].sel(layer=layer)) <= 2 * native
        assert mixer.out_proj.weight.dtype == dtype


def test_autocast_errs_at_most_twice_as_much_as_the_library(model):
    ids, mask = prompt(40, padded=True)
    with mp.attach(model) as probe, torch.autocast("cpu", torch.bfloat16):
        parity = probe.parity(ids, mask)
    native = parity["native_vs_oracle"]
    assert float(native.min()) > 1e-4, "autocast acts"
    assert (parity["out_vs_oracle"] <= 2 * native).all()


def test_float64_and_the_naive_backend(model):
    ids, mask = prompt(20, padded=True)
    with mp.attach(model, backend="naive") as probe:
        assert float(probe.parity(ids, mask)["out_vs_oracle"].max()) <= 2e-6
    with mp.attach(model.double()) as probe:
        assert probe.record(ids)["delta"].dtype == np.float64
        assert float(probe.parity(ids, mask)["out_vs_native"].max()) <= 2e-6


def test_bare_mixer_and_backbone(family, model):
    *_, (layer, mixer) = tiny.mixers(model).items()
    hidden = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        native = mixer(hidden)
    with mp.attach(mixer) as probe:
        trace = probe.record(hidden, variables=["delta", "out"])
        assert float(probe.parity(hidden)["out_vs_oracle"].max()) <= 2e-6
    assert trace["layer"].values.tolist() == [layer]
    assert error(trace["out"].isel(layer=0), native) <= 2e-6
    backbone = model.backbone if family == "falcon" else model.model
    with mp.attach(backbone) as probe:
        assert probe.record(torch.tensor([[1, 2, 3]]))["layer"].values.tolist() == tiny.LAYERS[family]


def test_training_mode_reaches_the_scan_with_a_fused_kernel_installed(model, monkeypatch):
    """The library's short-cuts and kernels, simulated: were one of them still called, the answer would be zero."""
    ids, _ = prompt(12, padded=False)
    module = sys.modules[type(next(iter(tiny.mixers(model).values()))).__module__]
    native = run(model, ids, None, use_cache=False)
    if hasattr(module, "mamba_inner_fn"):
        monkeypatch.setattr(module, "mamba_inner_fn", lambda *a, **k: torch.zeros(3, 12, 24))
    monkeypatch.setattr(module, "mamba_selective_scan", lambda x, *a, **k: torch.zeros_like(x))
    model.train()
    with mp.attach(model) as probe:
        trace = probe.record({"input_ids": ids, "use_cache": False}, variables=["out"])
        logits = model(ids, use_cache=False).logits
        assert error(logits.detach(), native) <= 2e-5
        assert float(abs(trace["out"]).max()) > 0
        logits.square().mean().backward()
    reached = {name: p.grad for m in tiny.mixers(model).values() for name, p in m.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in reached.values())


def test_gradients_are_the_librarys(model):
    ids, mask = prompt(17, padded=True)

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    native = gradients()
    with mp.attach(model):
        probed = gradients()
    assert native.keys() == probed.keys()
    assert max(error(probed[name], native[name]) for name in native if native[name].abs().max() > 0) <= 1e-3
    together = (torch.cat([g[name].flatten() for name in native]) for g in (probed, native))
    assert error(*together) <= 2e-5


@pytest.mark.long
def test_one_graph_serves_every_length(family, build):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = build(**({"num_experts": 1} if family == "jamba" else {})), CompileCounterWithBackend("aot_eager")
    with mp.attach(model), torch.no_grad():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for length in (12, 7, 17):
            ids, _ = prompt(length, padded=False)
            expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


def test_another_model_a_copy_and_a_broken_call_are_left_alone(build):
    one, two = build(), build(1)
    ids, mask = prompt(20, padded=True)
    before = run(one, ids, mask), run(two, ids, mask)
    with mp.attach(one) as probe:
        assert (run(two, ids, mask) == before[1]).all()
        copied = copy.deepcopy(one)
        with probe.edit(mp.ablate("C")):
            assert (run(copied, ids, mask) == before[0]).all(), "a copy is not probed"
            assert not np.allclose(run(one, ids, mask), before[0], equal_nan=True)
        mp.detach(copied)
        with mp.attach(copied) as other:
            assert other.record(ids, mask).sizes["batch"] == 3
        last = list(tiny.mixers(one).values())[-1]
        handle = last.out_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("planned")))
        with pytest.raises(RuntimeError, match="planned"):
            probe.record(ids, mask)
        handle.remove()
        assert probe.record(ids, mask).sizes["batch"] == 3
    assert all("forward" not in mixer.__dict__ for mixer in tiny.mixers(one).values())
    assert (run(one, ids, mask) == before[0]).all()


# -- edits ---------------------------------------------------------------------------------------------------------


def test_freezing_at_executed_values_changes_nothing_and_at_the_mean_holds_it(model):
    ids, mask = prompt(30, padded=True)
    native, layer = run(model, ids, mask)[mask.bool()], 2 if 2 in tiny.mixers(model) else 1
    with mp.attach(model) as probe:
        trace = probe.record(ids, mask, layers=[layer])
        for name in ("delta", "B", "C"):
            executed = trace[name].isel(layer=0).fillna(0.0).values
            with probe.edit(mp.freeze(name, layer, value=torch.tensor(executed))):
                np.testing.assert_allclose(run(model, ids, mask)[mask.bool()], native, atol=2e-5 * abs(native).max())
            with probe.edit(mp.freeze(name, layer)):
                frozen = probe.record(ids, mask, layers=[layer])[name].isel(layer=0, batch=0).values[7:]
            np.testing.assert_allclose(frozen, np.broadcast_to(executed[0, 7:].mean(0), frozen.shape), rtol=2e-5)
            shape = ", ".join(map(str, trace[name].isel(layer=0).shape))
            with (
                pytest.raises(ValueError, match=rf"broadcasts to \(batch, token, ...\) = \({shape}\)"),
                probe.edit(mp.freeze(name, layer, value=torch.ones(5))),
            ):
                run(model, ids, mask)


def test_ablated_parts_are_gone(family, model, build):
    ids, mask = prompt(30, padded=True)
    identity, timeless = build(), build()
    with torch.no_grad():
        for mixer in tiny.mixers(identity).values():
            mixer.conv1d.weight.zero_()[:, 0, -1] = 1.0
            mixer.conv1d.bias.zero_()
        for mixer in tiny.mixers(timeless).values():
            mixer.A_log.fill_(-80.0)
    expected = run(identity, ids, mask)[mask.bool()]
    close = {"atol": 2e-5 * np.abs(expected).max(), "rtol": 0}
    with mp.attach(model) as probe:
        skip = probe.weights()["D"]
        with probe.edit(mp.ablate("conv")):
            np.testing.assert_allclose(run(model, ids, mask)[mask.bool()], expected, **close)
        with probe.edit(mp.ablate("decay")):
            probed = probe.record(ids, mask, variables=["A_bar", "out"])
            with mp.attach(timeless) as other:
                expected = other.record(ids, mask, variables=["out"])
            assert float(probed["A_bar"].min()) == 1
            assert float(abs(probed["out"] - expected["out"]).max()) <= 2e-5 * float(abs(expected["out"]).max())
        for name in ("C", "B", "delta"):
            with probe.edit(mp.ablate(name)):
                trace = probe.record(ids, mask, variables=["x", "y", "h"])
            assert float(abs(trace["y"] - skip * trace["x"]).max()) <= 1e-5
            assert (float(abs(trace["h"]).max()) == 0) == (name != "C")
        with probe.edit(mp.ablate("gate")):
            trace = probe.record(ids, mask, variables=["y", "z", "out"])
    for layer, mixer in tiny.mixers(model).items():
        expected = trace["y"].sel(layer=layer).values @ mixer.out_proj.weight.detach().double().numpy().T
        assert error(trace["out"].sel(layer=layer), expected, mask.bool().numpy()) <= 1e-5
    assert np.nanstd(trace["z"].values) > 0.1, "z is recorded as the model made it"


# -- what is read of it --------------------------------------------------------------------------------------------


def up_to_scale(recorded, predicted):
    """Largest distance of the direction of what was recorded from that of what is predicted, over the last axis."""
    unit = [a / np.sqrt((a**2).sum(-1, keepdims=True)) for a in (recorded, predicted)]
    return np.abs(unit[0] - unit[1]).max()


def test_weights_give_back_what_was_recorded(family, model):
    ids, _ = prompt(12, padded=False)
    with mp.attach(model) as probe:
        trace, weights = probe.record(ids, variables=VARIABLES).astype(np.float64), probe.weights().astype(np.float64)
    for i in range(len(trace["layer"])):
        t, w = ({name: a.values for name, a in data.isel(layer=i).items()} for data in (trace, weights))
        assert error(t["u"] @ w["in_proj_z"].T, t["z"]) <= 2e-6
        pre = np.pad(t["u"] @ w["in_proj_x"].T, ((0, 0), (CONV - 1, 0), (0, 0)))
        pre = sum(pre[:, CONV - 1 - lag :][:, :12] * w["conv"][:, lag] for lag in range(CONV)) + w["conv_bias"]
        assert error(tiny.silu(pre), t["x"]) <= 2e-6
        assert error((t["y"] * tiny.silu(t["z"])) @ w["out_proj"].T, t["out"]) <= 2e-6
        low = inverse_softplus(t["delta"]) - w["dt_bias"]
        if family == "zamba":
            x = t["x"].reshape(3, 12, 3, 16)
            dt = np.einsum("bthp,hrp->bthr", x, w["x_proj_dt_by_head"])
            delta = np.einsum("bthr,hpr->bthp", dt, w["dt_proj"].reshape(3, 16, 3)).reshape(3, 12, 48)
            assert error(low, delta) <= 1e-4
            for name in "BC":
                assert error(np.einsum("bthp,hnp->bthn", x, w[f"x_proj_{name}_by_head"]), t[name]) <= 2e-6
        else:
            for name in "BC":
                assert up_to_scale(t[name][:, :, 0], t["x"] @ w[f"x_proj_{name}"].T) <= 2e-6
            assert up_to_scale(low, t["x"] @ w["x_proj_dt"].T @ w["dt_proj"].T) <= 1e-3
        if family == "jamba":
            for name in "BC":
                unweighted = t["x"] @ (w[f"x_proj_{name}"] / w[f"norm_{name}"][:, None]).T
                assert error(tiny.rms(unweighted, 1e-3) * w[f"norm_{name}"], t[name][:, :, 0]) <= 2e-6


def inverse_softplus(delta):
    return delta + np.log(-np.expm1(-delta))


def test_zamba_channels_are_where_the_documentation_says():
    model, ids = tiny.zamba(), torch.tensor([[1, 2, 3, 4, 5]])
    with mp.attach(model) as probe:
        before = probe.record(ids, variables=("x", "z", "B", "delta", "A"), layers=[0])
        mixer = tiny.mixers(model)[0]
        with torch.no_grad():
            mixer.in_proj.weight[2 * 21] += 1.0  # x of channel 21: head 1 of three, head_channel 5
            mixer.A_log[1, 5] += 1.0
        after = probe.record(ids, variables=("x", "z", "B", "delta", "A"), layers=[0])
    changed = abs(after - before).max(("layer", "batch", "token")) > 1e-7
    assert np.flatnonzero(changed["x"]).tolist() == [21]
    assert not changed["z"].any()
    assert np.flatnonzero(changed["B"].any("state")).tolist() == [1]
    assert np.flatnonzero(changed["delta"]).tolist() == list(range(16, 32))
    assert np.flatnonzero(changed["A"].any("state")).tolist() == [21]
    assert before.attrs["n_groups"] == 3
    assert "4 layers 0..3: mamba: 48 channels in 3 groups, state 8" in repr(probe)


def test_chosen_channels_and_tokens_are_those_of_the_whole(model):
    ids, mask = prompt(20, padded=True)
    channels, tokens = [2, 17, 18, 30], [3, 4, 11]
    with mp.attach(model) as probe:
        whole = probe.record(ids, mask, variables=VARIABLES)
        part = probe.record(ids, mask, variables=VARIABLES, channels=channels, tokens=tokens)
        few = probe.record(ids, mask, variables=("delta", "C"), channels=[40])
    for name in VARIABLES:
        indexers = {"token": tokens, "channel": channels}
        expected = whole[name].isel({dim: index for dim, index in indexers.items() if dim in whole[name].dims})
        np.testing.assert_array_equal(part[name].values, expected.values)
    np.testing.assert_array_equal(few["delta"].values, whole["delta"].values[..., [40]])
    np.testing.assert_array_equal(few["C"].values, whole["C"].values)
    np.testing.assert_allclose(part.drop_vars("B_bar").probe.B_bar.values, part["B_bar"].values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[pytest.mark.long] * (each != "zamba")) for each in FAMILIES], indirect=True
)
def test_analyses_take_the_traces(family, model):
    ids, _ = prompt(40, padded=False)
    with mp.attach(model) as probe:
        trace, weights = probe.record(ids, variables=VARIABLES), probe.weights()
    n_groups = 3 if family == "zamba" else 1
    assert Canonical(trace).groups().tolist() == np.arange(n_groups).repeat(48 // n_groups).tolist()
    horizon, aligned = memory_horizon.measure(trace), wavelet_alignment.measure(trace)
    assert horizon.sizes["channel"] == aligned.sizes["kernel"] == 48
    attention = hidden_attention.measure(trace, weights=weights)
    assert attention.sizes["layer"] == len(tiny.LAYERS[family])


def test_recall_reads_what_gives_b_and_c_and_refuses_by_name_what_is_not_there(family, model):
    task = mp.tasks.mqar(batch=4, length=32, n_pairs=3, vocab=60, seed=1)
    with mp.attach(model) as probe:
        trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
    if family == "zamba":
        with pytest.raises(ValueError, match=r"weights lack x_proj_B, x_proj_C; they hold .*'x_proj_B_by_head'"):
            recall_circuit.measure(trace, weights=weights)
    else:
        result = recall_circuit.measure(trace, weights=weights)
        assert result.sizes["layer"] == len(tiny.LAYERS[family])
