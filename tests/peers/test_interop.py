"""The page's examples as they stand, and recording and editing through nnsight and TransformerLens against without."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

import mamba_probe as mp
from mamba_probe.mixers import find_mixers

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"
IDS = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(0))
VARIABLES = ("delta", "B", "C", "x", "z", "y", "h", "out")
FREEZE = mp.freeze("delta", layer=0)
HALF = [("blocks.0.mixer.hook_delta", lambda delta, hook: delta / 2)]
SCAN = {"mamba": "mamba_selective_scan_0", "mamba2": "mamba2_chunk_scan_0"}


@pytest.fixture
def names(tmp_path, request):
    """What the page's block holds at its end. nnsight reads the source of a trace, so that it must be a file."""
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[request.param]
    script = tmp_path / "block.py"
    script.write_text(block)
    return runpy.run_path(str(script))


@pytest.mark.parametrize("names", [0], indirect=True)
def test_the_nnsight_block_of_the_page(names):
    untouched = mp.load("zoo:mqar-mamba1")
    with mp.attach(untouched) as probe:
        alone = probe.record(names["task"], variables=("delta", "B", "y", "out"))
        with probe.edit(FREEZE):
            frozen = probe.record(names["task"], variables=("out",))
    for name in ("delta", "B", "y"):
        np.testing.assert_array_equal(names["trace"][name], alone[name])
    np.testing.assert_array_equal(names["mixed"].detach(), alone["out"][0])
    np.testing.assert_array_equal(names["frozen"].detach(), frozen["out"][0])
    assert abs(frozen["out"] - alone["out"]).max() > 0.1 * abs(alone["out"]).max()
    assert not names["rewritten"]["B"].any()
    assert alone["B"].any()


@pytest.mark.parametrize("names", [1], indirect=True)
def test_the_transformer_lens_block_of_the_page(names):
    untouched = mp.load("zoo:mqar-mamba1")
    with mp.attach(untouched) as probe:
        alone = probe.record(names["task"], variables=("delta", "A_bar", "h", "out"))
        with probe.edit(mp.ablate("gate", layer=0)):
            opened = probe.record(names["task"], variables=("out",))
        zeros = {"inputs_embeds": torch.zeros(2, 64, untouched.config.hidden_size)}
        unfed = probe.record(zeros, variables=("delta",))
    for name in ("delta", "A_bar", "h"):
        np.testing.assert_array_equal(names["trace"][name], alone[name])
    np.testing.assert_array_equal(names["cache"]["blocks.0.hook_mixer_out"].detach(), alone["out"][0])
    np.testing.assert_array_equal(names["opened_cache"]["blocks.0.hook_mixer_out"].detach(), opened["out"][0])
    assert abs(opened["out"] - alone["out"]).max() > 0.1 * abs(alone["out"]).max()
    np.testing.assert_array_equal(names["unfed"]["delta"], unfed["delta"])
    silent = {f"blocks.0.mixer.{hook}" for hook in ("hook_conv", "hook_dt_proj", "hook_ssm_dt")}
    assert silent <= set(names["bridge"].hook_dict)
    assert not silent & set(names["cache"])


@pytest.fixture
def alone(build):
    """What a probe sees and does where neither library is."""
    model = build()
    logits = model(IDS).logits.detach()
    with mp.attach(model) as probe:
        trace, weights, cache = probe.record(IDS, variables=VARIABLES), probe.weights(), probe.run_with_cache(IDS)[1]
        with probe.edit(FREEZE):
            edited = model(IDS).logits.detach()
        hooked = probe.run_with_hooks(IDS, fwd_hooks=HALF).detach()
    assert (edited - logits).abs().max() > 1e-3
    assert (hooked - logits).abs().max() > 1e-3
    return {"logits": logits, "trace": trace, "weights": weights, "cache": cache, "edited": edited, "hooked": hooked}


def agree(trace, alone):
    for name in VARIABLES:
        np.testing.assert_array_equal(trace[name], alone["trace"][name])
    np.testing.assert_array_equal(trace["token_id"], IDS)
    np.testing.assert_array_equal(trace["prediction"], alone["trace"]["prediction"])


def restored(model, alone):
    """Whether nothing of ours is left."""
    taken = [adapter.tap for adapter in find_mixers(model) if adapter.tap is not None]
    dicts = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    ours = [hook for hooks in dicts for hook in hooks.values() if hook.__module__.startswith("mamba_probe")]
    return not taken and not ours and torch.equal(model(IDS).logits, alone["logits"])


def attached_then_wrapped(model):
    probe = mp.attach(model)
    return probe, NNsight(model)


def wrapped_then_attached(model):
    traced = NNsight(model)
    return mp.attach(traced), traced


def read_by_source_then_attached(model):
    traced = NNsight(model)
    assert "in_proj" in str(traced.backbone.layers[0].mixer.source)
    return mp.attach(model), traced


def attached_again(model):
    traced = NNsight(model)
    mp.attach(traced).detach()
    return mp.attach(model), traced


ORDERS = (attached_then_wrapped, wrapped_then_attached, read_by_source_then_attached, attached_again)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_through_nnsight_in_any_order(build, alone, order):
    model = build()
    probe, traced = order(model)
    with probe.recording(variables=VARIABLES) as recorder, traced.trace(IDS):
        read = traced.backbone.layers[1].mixer.output.save()
    agree(recorder.dataset, alone)
    np.testing.assert_array_equal(read.detach(), recorder.dataset["out"].sel(layer=1))
    agree(probe.record(IDS, variables=VARIABLES), alone)
    with probe.edit(FREEZE), traced.trace(IDS):
        output = traced.output.save()
    assert torch.equal(output.logits, alone["edited"])
    with probe.hooks(fwd_hooks=HALF), traced.trace(IDS):
        output = traced.output.save()
    assert torch.equal(output.logits, alone["hooked"])
    probe.detach()
    assert restored(model, alone)
    with traced.trace(IDS):
        output = traced.output.save()
    assert torch.equal(output.logits, alone["logits"])


def test_the_source_that_nnsight_shows_is_what_our_scan_is_given(build, alone, family):
    traced = NNsight(build())
    with mp.attach(traced), traced.trace(IDS):
        inputs = getattr(traced.backbone.layers[1].mixer.source, SCAN[family]).inputs.save()
    x, _delta, A, B, C = (tensor.detach() for tensor in inputs[0])
    if family == "mamba":
        x, B, C = x.transpose(1, 2), B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None]
    for name, given in {"x": x, "B": B, "C": C}.items():
        np.testing.assert_array_equal(given, alone["trace"][name].sel(layer=1))
    assert torch.isfinite(A).all()


def test_what_nnsight_changes_in_one_layer_the_next_records(build, alone):
    traced = NNsight(build())
    with mp.attach(traced) as probe:
        with probe.recording(variables=["u"]) as recorder, traced.trace(IDS):
            traced.backbone.layers[0].output[:] = 0
        assert not recorder.dataset["u"].sel(layer=1).any()
        assert recorder.dataset["u"].sel(layer=0).any()


def words():
    special = {"eos_token": "<end>", "bos_token": "<begin>", "unk_token": "<unknown>"}
    vocab = dict(zip([*special.values(), *(f"w{number}" for number in range(3, 61))], range(61), strict=True))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", **special)


def test_generating_and_padding_by_nnsight(build):
    model, hold = build(), mp.freeze("delta", layer=0, value=0.5)
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with mp.attach(model) as probe:
        with probe.edit(hold), probe.recording(variables=["delta", "h"]) as recorder:
            model.generate(prompt, **options)
        expected = recorder.dataset
        traced = TransformersModel(model, tokenizer=words(), task="text-generation")
        held, listening = probe.edit(hold), probe.recording(variables=["delta", "h"])
        with held, listening as recorder, traced.generate("w5 w6 w7 w8", **options):
            traced.lm_head.output.save()
        for name in ("delta", "h", "token_id", "phase"):
            np.testing.assert_array_equal(recorder.dataset[name], expected[name])
        assert (recorder.dataset["delta"].sel(layer=0) == 0.5).all()
        assert recorder.dataset["phase"].values[0].tolist() == ["prefill"] * 4 + ["decode"] * 3
        with probe.recording(variables=["delta"]) as recorder, traced.trace() as tracer:
            with tracer.invoke("w5 w6 w7 w8"):
                traced.lm_head.output.save()
            with tracer.invoke("w9 w10 w11"):
                traced.lm_head.output.save()
        assert recorder.dataset["valid"].sum("token").values.tolist() == [4, 3]


def bridged(model):
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@pytest.mark.parametrize("first", ["bridge", "probe"])
def test_through_transformer_lens_in_either_order(build, alone, first):
    model = build()
    if first == "bridge":
        bridge = bridged(model)
        probe = mp.attach(bridge)
    else:
        probe = mp.attach(model)
        bridge = bridged(model)
    with probe.recording(variables=VARIABLES) as recorder:
        _logits, cache = bridge.run_with_cache(IDS)
    agree(recorder.dataset, alone)
    agree(probe.record(IDS, variables=VARIABLES), alone)
    for layer in (0, 1):
        for hook in ("hook_mixer_out", "mixer.hook_ssm_out"):
            np.testing.assert_array_equal(
                cache[f"blocks.{layer}.{hook}"].detach(), recorder.dataset["out"].sel(layer=layer)
            )
    with probe.edit(FREEZE):
        assert torch.equal(bridge(IDS), alone["edited"])
    with probe.hooks(fwd_hooks=HALF):
        assert torch.equal(bridge(IDS), alone["hooked"])
    probe.detach()
    assert restored(model, alone)


def test_names_that_transformer_lens_has_too_mean_the_same(build, alone, family):
    bridge = bridged(build())
    _logits, theirs = bridge.run_with_cache(IDS)
    with mp.attach(bridge) as probe:
        _logits, through_the_bridge = probe.run_with_cache(IDS)
    known = ["hook_resid_pre", "hook_mixer_in", "hook_mixer_out", "hook_resid_post"]
    known += ["mixer.hook_in_proj", "mixer.hook_ssm_out", *(["mixer.hook_x_proj"] if family == "mamba" else [])]
    shared = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in known}
    assert set(alone["cache"]) & set(theirs) == shared
    assert list(through_the_bridge) == list(alone["cache"])
    for name, ours in alone["cache"].items():
        assert torch.equal(ours, through_the_bridge[name]), name
        if name in theirs:
            assert torch.allclose(ours, theirs[name], rtol=0, atol=1e-5 * theirs[name].abs().max().item()), name


def test_weights_and_parity_are_read_through_the_bridge(build, alone):
    with mp.attach(bridged(build())) as probe:
        weights = probe.weights()
        assert set(weights) == set(alone["weights"])
        for name in weights:
            np.testing.assert_allclose(weights[name], alone["weights"][name], rtol=0, atol=1e-6)
        assert probe.parity(IDS)["out_vs_oracle"].max() < 2e-6


def test_a_booted_bridge_and_its_tokenizer(build, tmp_path):
    build().save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path))
    with mp.attach(bridge) as probe, probe.recording() as recorder:
        bridge.run_with_cache("w5 w6 w7")
        bridge.generate(torch.tensor([[9, 10]]), max_new_tokens=3, do_sample=False, verbose=False)
    assert recorder.dataset["token_id"].values[0, :4].tolist() == [1, 5, 6, 7]
    assert recorder.dataset["phase"].values[1].tolist() == ["prefill"] * 2 + ["decode"] * 2


def test_what_the_page_says_does_not_work(build):
    bridge = bridged(build())
    bridge.blocks[0].mixer.eager_scan = True
    probe = mp.attach(bridge)
    with pytest.raises(ValueError, match=r"layer\(s\) 0 did not run"), probe.recording():
        bridge.run_with_cache(IDS, use_cache=False)
    probe.detach()
    traced = NNsight(build())
    with mp.attach(traced) as probe:
        with pytest.raises(ValueError, match=r"layer\(s\) 0 did not run"), probe.recording(), traced.trace(IDS):
            traced.backbone.layers[0].mixer.skip(torch.zeros(2, 12, 24))
        with probe.recording(layers=[0]) as recorder, traced.trace(IDS) as tracer:
            traced.backbone.layers[0].output.save()
            tracer.stop()
        assert recorder.dataset["layer"].values.tolist() == [0]


def test_what_is_no_torch_model_is_refused():
    with pytest.raises(ValueError, match="attach takes a live torch module; got dict"):
        mp.attach({})


def test_a_model_that_nnsight_has_not_loaded_is_refused(build, tmp_path):
    build().save_pretrained(tmp_path)
    options = {"tokenizer": words(), "task": "text-generation"}
    with pytest.raises(ValueError, match=r"on the meta device.*load the weights"):
        mp.attach(TransformersModel(str(tmp_path), **options))
    assert mp.attach(TransformersModel(str(tmp_path), dispatch=True, **options)).attached
