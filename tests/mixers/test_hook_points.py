"""Hook points of transformers' ten classes: every name that is listed fires, and stands where its name says."""

import copy
from typing import Any

import mamba1_families
import mamba2_families
import numpy as np
import pytest
import torch
from cells import error, prompt, validity
from torch import nn
from two_ways import KINDS
from two_ways_oracle import built, ids_of

import mamba_probe as mp

FAMILIES = ("mamba", "mamba2", "falcon", "jamba", "zamba", "bamba", "zamba2", "granite", "nemotron_h", "falcon_h1")
IDS, _mask = prompt(9, padded=True)
MASK: Any = _mask
VALID: Any = validity(IDS, MASK)
WITHIN = ("ssm_dt", "delta", "A_bar", "B", "C", "ssm_input", "skip", "ssm_output", "B_bar", "h")


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def live(name, every_family):
    return every_family[name]()


def mixers(model) -> dict[int, Any]:
    """By layer number: name of the module, and the mixer."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Module) and "A_log" in m._parameters}
    return {int(m.layer_idx): (name, m) for name, m in found.items()}


def noted(model, modules):
    """What torch's own hooks see: (first input, output) of each module in one run."""
    seen = {}

    def note(key):
        def hook(_module, args, kwargs, out):
            given = args[0] if args else kwargs["hidden_states"]
            seen[key] = given, out[0] if isinstance(out, tuple) else out

        return hook

    handles = [module.register_forward_hook(note(key), with_kwargs=True) for key, module in modules.items()]
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    for handle in handles:
        handle.remove()
    return seen


def quantities(name, model, mixer, u, float64_mixer):
    """The scan's, in float64, from the mixer's input and weights."""
    exact = copy.deepcopy(mixer).double()
    u = u.double().numpy()
    if name in ("mamba", "mamba2"):
        made = float64_mixer(exact, u, MASK.numpy())
    elif name in mamba1_families.BUILDERS:
        made = mamba1_families.reference_mixer(exact, u, MASK.numpy())
    else:
        made = mamba2_families.reference(exact, mamba2_families.spec_of(model.config), u, MASK.bool().numpy())
    delta, A = made["delta"], -np.exp(exact.A_log.detach().numpy())
    made["A_bar"] = np.exp(delta * A if A.ndim == 1 else delta[..., None] * A)
    per_head = np.repeat(made["B"], delta.shape[2] // made["B"].shape[2], 2)
    return made | {
        "B_bar": delta[..., None] * per_head,
        "ssm_input": made["x"],
        "skip": made["z"],
        "ssm_output": made["y"],
    }


def test_every_listed_name_fires_and_stands_where_it_says(name, live, float64_mixer):
    modules = {}
    for layer, (path, mixer) in mixers(live).items():
        around = {"block": live.get_submodule(path.rpartition(".")[0]), "mixer": mixer, "in_proj": mixer.in_proj}
        if isinstance(getattr(mixer, "x_proj", None), nn.Module):
            around["x_proj"] = mixer.x_proj
        modules |= {(layer, part): module for part, module in around.items()}
        base = getattr(live, "backbone", None) or live.model
        modules[layer, "whole block"] = base.layers[layer]
    seen = noted(live, modules)
    with mp.attach(live) as probe, torch.no_grad():
        names, unhooked = probe.hook_names(), live(IDS, attention_mask=MASK).logits
        logits, cache = probe.run_with_cache(IDS, MASK)
        assert torch.equal(live(IDS, attention_mask=MASK).logits, unhooked)
    assert torch.equal(logits, unhooked)
    assert list(cache) == names
    expected = {layer: {} for layer in mixers(live)}
    for layer, (_, mixer) in mixers(live).items():
        (given, out), (into, made) = seen[layer, "whole block"], seen[layer, "mixer"]
        expected[layer] |= {"hook_resid_pre": given, "hook_resid_post": out, "hook_mixer_in": into}
        expected[layer] |= {"hook_mixer_out": made, "mixer.hook_ssm_out": made}
        for part in ("in_proj", "x_proj"):
            if (layer, part) in seen:
                expected[layer][f"mixer.hook_{part}"] = seen[layer, part][1]
        if name != "zamba":
            found = quantities(name, live, mixer, into, float64_mixer)
            for quantity in WITHIN[1:]:
                expected[layer][f"mixer.hook_{quantity}"] = found[quantity]
            expected[layer]["mixer.hook_ssm_dt"] = before_softplus(
                found["delta"], cache[f"blocks.{layer}.mixer.hook_ssm_dt"]
            )
    assert set(names) == {f"blocks.{layer}.{place}" for layer, at in expected.items() for place in at}
    for each in names:
        _, layer, place = each.split(".", 2)
        right = np.asarray(expected[int(layer)][place])
        assert error(cache[each], right.reshape(cache[each].shape), VALID) <= 1e-5, each


def before_softplus(delta, dt):
    """dt with softplus dt = delta; what is said of it where a limit holds delta: it lies beyond."""
    inner = (delta > delta.min() + 1e-6) & (delta < delta.max() - 1e-6)
    assert inner.any()
    return np.where(inner, np.log(np.expm1(delta)), dt.numpy())


EDITS = {
    "delta": lambda layer: mp.scale("delta", 0.5, layer), "A_bar": lambda layer: mp.scale("A_bar", 0.5, layer),
    "B": lambda layer: mp.scale("B", 0.5, layer), "C": lambda layer: mp.scale("C", 0.5, layer),
    "ssm_input": lambda layer: mp.scale("x", 0.5, layer), "skip": lambda layer: mp.scale("z", 0.5, layer),
    "ssm_output": lambda layer: mp.scale("y", 0.5, layer), "h.4": lambda layer: mp.scale("h", 0.5, layer, token=4),
}  # fmt: skip


def test_a_hook_equal_to_an_edit_gives_the_same_bits(name, live):
    with mp.attach(live) as probe, torch.no_grad():
        layer = probe.layers[0]
        if name == "zamba":
            with pytest.raises(ValueError, match=r"unknown hook point 'blocks.0.mixer.hook_delta'"):
                probe.run_with_hooks(IDS, fwd_hooks=[("blocks.0.mixer.hook_delta", lambda delta, hook: delta)])
            return
        plain = live(IDS, attention_mask=MASK).logits
        for quantity, edit in EDITS.items():
            at = f"blocks.{layer}.mixer.hook_{quantity}"
            hooked = probe.run_with_hooks(IDS, MASK, fwd_hooks=[(at, lambda tensor, hook: 0.5 * tensor)])
            with probe.edit(edit(layer)):
                edited = live(IDS, attention_mask=MASK).logits
            assert torch.equal(hooked, edited), quantity
            assert (hooked - plain).abs().max() > 1e-6, quantity


STEPWISE = (
    mp.scale("B", 2.0, token=[3, 10]), mp.assign("h", 0.5, token=[4, 11]), mp.assign("A_bar", 0.0, token=9),
    mp.zero("x", token=12, channel=[1, 40]), mp.scale("z", 2.0, token=10), mp.scale("y", 0.5, token=[8, 11]),
)  # fmt: skip


@pytest.mark.parametrize("name", ["mamba", "falcon", "jamba", "zamba"])
def test_edits_act_alike_in_a_whole_sequence_and_step_by_step(live):
    with mp.attach(live) as probe, torch.no_grad(), probe.edit(*STEPWISE):
        options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        made = live.generate(IDS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, **options)
        mask = torch.cat([MASK, MASK.new_ones(len(IDS), 5)], 1)
        whole = live(made.sequences, attention_mask=mask, use_cache=False).logits
        for step, logits in enumerate(made.logits):
            assert error(logits, whole[:, 8 + step].numpy()) <= 2e-5, step


def test_what_a_hook_around_the_mixer_returns_goes_on(live):
    with mp.attach(live) as probe, torch.no_grad():
        last = probe.layers[-1]
        for place in ("hook_resid_pre", "hook_mixer_in", "hook_mixer_out", "hook_resid_post", "mixer.hook_in_proj"):
            plain = live(IDS, attention_mask=MASK).logits
            at = f"blocks.{last}.{place}"
            kept = probe.run_with_hooks(IDS, MASK, fwd_hooks=[(at, lambda tensor, hook: None)])
            moved = probe.run_with_hooks(IDS, MASK, fwd_hooks=[(at, lambda tensor, hook: tensor + 0.3)])
            assert torch.equal(kept, plain)
            assert (moved - plain).abs().max() > 1e-4, place


def test_a_scan_in_two_directions_has_points_at_the_mixer_alone():
    ids = ids_of()
    for kind in KINDS:
        with mp.attach(built(kind)) as probe, torch.no_grad():
            cache = probe.run_with_cache(ids)[1]
            assert list(cache) == probe.hook_names()
            expected = ["hook_mixer_in", "hook_mixer_out", "mixer.hook_ssm_out"]
            assert [name.removeprefix("blocks.0.") for name in cache if ".0." in name] == expected, kind


def test_what_holds_several_mixers_is_no_block():
    class Stack(nn.Module):
        def __init__(self, holder):
            super().__init__()
            self.mixers = holder(mp.blocks.MambaBlock(4, d_state=3, layer_idx=layer) for layer in (0, 1))

        def forward(self, hidden):
            for mixer in self.mixers:
                hidden = hidden + mixer(hidden)
            return hidden

    for holder in (nn.ModuleList, lambda mixers: nn.Sequential(*mixers)):
        with mp.attach(Stack(holder)) as probe, torch.no_grad():
            cache = probe.run_with_cache(torch.randn(2, 5, 4))[1]
        assert cache["mixer_in", 1].shape == (2, 5, 4)
        assert not any("resid" in name for name in cache)
