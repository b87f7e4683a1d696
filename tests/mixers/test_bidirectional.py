"""Layers that scan both ways: every direction is what a float64 recurrence says, at the tokens' own places."""

import copy

import numpy as np
import pytest
import torch
import two_ways
from two_ways import FUSED, KINDS, WIDTH, BiMambaWrapper, LanguageModel, Mamba, RCPSWrapper, Vim
from two_ways_oracle import apart, built, ids_of, logits, oracle, silu

import mamba_probe as mp
from mamba_probe.edits import zero
from mamba_probe.mixers import find_mixers
from mamba_probe.parity import error

BOUND = 2e-6
SCANNED = ("delta", "A_bar", "B_bar", "B", "C", "x", "z", "y", "h", "delta_cumsum")
TWO, FOUR = ("forward", "backward"), ("forward", "backward", "rc_forward", "rc_backward")


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    FUSED.clear()
    return request.param


# -- what is recorded ----------------------------------------------------------------------------------------------


def test_every_direction_is_recorded_at_the_tokens_own_places(kind):
    model, ids = built(kind), ids_of()
    native = logits(model, ids)
    FUSED.clear()
    with mp.attach(model) as probe:
        assert error(logits(model, ids), native) <= BOUND
        trace = probe.record(ids, variables=(*SCANNED, "A", "u", "out"))
    assert FUSED == []
    assert trace["direction"].values.tolist() == list(FOUR if kind == "rcps" else TWO)
    assert trace["layer"].values.tolist() == [0, 1]
    assert trace["delta"].dims == ("layer", "batch", "token", "channel", "direction")
    assert trace["A"].dims == ("layer", "channel", "state", "direction")
    assert trace["out"].dims == ("layer", "batch", "token", "model")
    for at, block in enumerate(model.layers):
        expected = oracle(block.mixer, trace["u"].values[at])
        for name in (*SCANNED, "out"):
            assert apart(trace[name].values[at], expected[name]) <= BOUND, name
    spread = trace.probe.by_head("B").isel(layer=0).transpose(..., "direction")
    assert spread.sizes["channel"] == 2 * WIDTH
    lazy = trace.drop_vars(["A_bar", "B_bar"]).probe
    for name, derived in {"A_bar": lazy.A_bar, "B_bar": lazy.B_bar}.items():
        assert derived.dims == trace[name].dims
        assert apart(derived.values, trace[name].values) <= BOUND


def test_detaching_restores_the_model_and_a_second_one_never_notices(kind):
    model, other, ids = built(kind), built(kind), ids_of()
    before = logits(model, ids)
    with mp.attach(model) as probe:
        copied = copy.deepcopy(model)
        assert len(find_mixers(model)) == 2
        FUSED.clear()
        assert torch.equal(logits(other, ids), before)
        assert torch.equal(logits(copied, ids), before)
        if "slow" not in kind:
            assert len(FUSED) >= 4
        probe.record(ids)
    FUSED.clear()
    assert torch.equal(logits(model, ids), before)
    assert not any("forward" in vars(module) or "step" in vars(module) for module in model.modules())


def test_training_never_leaves_our_scan_and_gradients_are_the_librarys(kind):
    model, ids = built(kind).train(), ids_of(5)

    def slopes():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    native = slopes()
    FUSED.clear()
    with mp.attach(model):
        probed = slopes()
    assert FUSED == []
    for name, slope in native.items():
        assert error(probed[name], slope) <= 1e-5, name


def test_parity_compares_with_the_untouched_library(kind, monkeypatch):
    model, ids = built(kind), ids_of(7)
    with mp.attach(model) as probe:
        found = probe.parity(ids)
        assert all(float(found[name].max()) <= BOUND for name in found)
        right = two_ways.selective_scan_fn
        monkeypatch.setattr(two_ways, "selective_scan_fn", lambda *args, **options: 1.5 * right(*args, **options))
        wrong = probe.parity(ids)
    assert float(wrong["out_vs_oracle"].max()) <= BOUND
    assert float(wrong["native_vs_oracle"].min()) > 0.01
    assert "the library is wrong here" in wrong.attrs["parting"]


def composed(kind, weights, gated):
    """What a layer makes of both directions' gated y, by its weights."""
    each, bias = weights["out_proj"].dot(gated, dim="channel"), weights.get("out_proj_bias", 0)
    if "vim" in kind:
        return each.sum("direction") + bias
    return (each + bias).prod("direction") if "product" in kind else (each + bias).sum("direction")


def test_weights_act_as_the_layers_do(kind):
    model, ids = built(kind), ids_of()
    with mp.attach(model) as probe:
        trace = probe.record(ids, variables=("delta", "A", "B", "C", "x", "y", "z", "u", "out"))
        weights = probe.weights()
    assert weights["direction"].values.tolist() == trace["direction"].values.tolist()
    assert apart(weights["A"].values, trace["A"].values) == 0
    dt = weights["dt_proj"].dot(weights["x_proj_dt"].dot(trace["x"], dim="channel"), dim="rank") + weights["dt_bias"]
    assert float(abs(np.logaddexp(0, dt) - trace["delta"]).max()) <= 1e-5
    for name in ("B", "C"):
        assert float(abs(weights[f"x_proj_{name}"].dot(trace["x"], dim="channel") - trace[name]).max()) <= 1e-5
    z = weights["in_proj_z"].dot(trace["u"], dim="model") + weights.get("in_proj_bias_z", 0)
    assert float(abs(z - trace["z"]).max()) <= 1e-5
    assert float(abs(composed(kind, weights, trace["y"] * silu(trace["z"])) - trace["out"]).max()) <= 1e-5
    tied = kind in ("vim", "vim v1", "vim, divided and scaled", "caduceus", "caduceus, slow path")
    assert ("direction" not in weights["in_proj_x"].dims) == tied
    assert weights["unembedding"].sizes["model"] == weights["norm_f"].size == trace.sizes["model"]


def test_a_readout_of_one_strand_is_no_weight_of_a_layer_that_sees_both():
    model = built("rcps")
    model.lm_head, model.norm_f = torch.nn.Linear(WIDTH, 12, bias=False), RCPSWrapper(torch.nn.LayerNorm(WIDTH))
    with mp.attach(model) as probe:
        weights = probe.weights()
    assert weights.sizes["model"] == 2 * WIDTH
    assert not {"unembedding", "norm_f"} & set(weights)


def test_tokens_and_channels_are_chosen_in_every_direction(kind):
    model, ids = built(kind), ids_of()
    with mp.attach(model) as probe:
        whole = probe.record(ids, variables=SCANNED)
        few = probe.record(ids, variables=SCANNED, tokens=[1, 2, 6], channels=[0, 7])
        said = probe.estimate(ids, variables=[*SCANNED, "A"])
        assert said.nbytes == probe.record(ids, variables=[*SCANNED, "A"]).drop_vars(whole.coords).nbytes
    for name in SCANNED:
        chosen = whole[name].isel(token=[1, 2, 6])
        chosen = chosen.isel(channel=[0, 7]) if "channel" in chosen.dims else chosen
        np.testing.assert_array_equal(few[name].values, chosen.values)


@pytest.mark.parametrize(
    "kind", ["rcps", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("vim", "vim v1", "caduceus"))]
)
def test_narrow_and_compiled_models_are_probed_as_they_are(kind):
    model, ids = built(kind), ids_of()
    exact = logits(model, ids)
    narrow = copy.deepcopy(model).bfloat16()
    native = error(logits(narrow, ids), exact)
    with mp.attach(narrow):
        assert error(logits(narrow, ids), exact) <= 2 * native
    with mp.attach(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert error(logits(compiled, ids), exact) <= BOUND


# -- edits ---------------------------------------------------------------------------------------------------------


def test_edits_act_on_every_direction_at_the_tokens_own_places(kind):
    model, ids = built(kind), ids_of(6)
    steps = torch.linspace(0.1, 0.9, 6)[None, :, None]
    with mp.attach(model) as probe:
        with probe.edit(mp.freeze("delta", layer=0, value=steps), mp.freeze("B", layer=0)):
            trace = probe.record(ids, variables=("delta", "B", "h"), layers=[0])
        native = probe.record(ids, variables=("B", "y", "C"), layers=[0])
        with probe.edit(mp.ablate("C", layer=0)):
            without = probe.record(ids, variables=("x", "y"), layers=[0])
        with probe.edit(mp.ablate("decay", layer=0)):
            kept = probe.record(ids, variables=("A_bar",), layers=[0])
        skip = probe.weights()["D"]
    assert trace.attrs["edits"].startswith("freeze(delta, layer=0, value=a tensor (1, 6, 1)); freeze(B, layer=0)")
    np.testing.assert_array_equal(trace["delta"].values, np.broadcast_to(steps[..., None], trace["delta"].shape))
    assert apart(trace["B"].values, np.broadcast_to(native["B"].mean("token", keepdims=True), trace["B"].shape)) < 1e-5
    assert float(abs(without["y"] - skip * without["x"]).max()) <= 1e-6
    inner = kept["A_bar"].isel(token=slice(1, -1))
    assert float(abs(inner - 1).max()) == 0


def test_a_state_is_edited_after_the_token_in_every_direction(kind):
    with mp.attach(built(kind)) as probe:
        with probe.edit(zero("h", layer=0, token=[2, 4])):
            trace = probe.record(ids_of(8), variables=("h", "y", "B_bar", "x"), layers=[0])
        skip = probe.weights(layers=[0])["D"]
    assert float(abs(trace["h"].sel(token=[2, 4])).max()) == 0
    assert float(abs(trace["y"] - skip * trace["x"]).sel(token=[2, 4]).max()) <= 1e-6
    written = (trace["B_bar"] * trace["x"]).transpose(*trace["h"].dims)
    for direction in trace["direction"].values:
        after = [1, 3] if direction in ("backward", "rc_forward") else [3, 5]
        at = {"direction": direction, "token": after}
        assert apart(trace["h"].sel(at).values, written.sel(at).values) <= BOUND
        rest = {"direction": direction, "token": [0, 6]}
        assert apart(trace["h"].sel(rest).values, written.sel(rest).values) > 0.01


def test_the_scan_has_no_hook_points_since_a_name_means_one_tensor():
    with mp.attach(built("vim")) as probe:
        names = probe.hook_names()
        assert "blocks.0.hook_mixer_out" in names
        assert not [name for name in names if name.endswith(("hook_delta", "hook_h", "hook_in_proj"))]


def test_a_convolution_taken_out_is_a_model_without_it(kind):
    model, without, ids = built(kind), built(kind), ids_of()
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            if ".conv1d" in name:
                parameter.zero_()
                if parameter.ndim == 3:
                    parameter[..., -1] = 1
    with mp.attach(model) as probe, probe.edit(mp.ablate("conv")):
        assert error(logits(model, ids), logits(without, ids)) <= BOUND


def test_a_gate_taken_out_leaves_what_the_scans_made(kind):
    with mp.attach(built(kind)) as probe:
        weights = probe.weights()
        with probe.edit(mp.ablate("gate")):
            trace = probe.record(ids_of(), variables=("y", "out"))
    assert float(abs(composed(kind, weights, trace["y"]) - trace["out"]).max()) <= 2e-5


def test_a_jacobian_sees_both_sides(kind):
    mixer = built(kind).layers[0].mixer
    width = 2 * WIDTH if kind == "rcps" else WIDTH
    hidden = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))
    with mp.attach(mixer) as probe:
        pulled = probe.jacobian(hidden, layer=0, query_tokens=[3])["jacobian"]
    slope = torch.func.jacrev(lambda u: mixer(u)[0, 3])(hidden)[:, 0].norm(dim=-1)
    assert apart(pulled.values[0, 0], slope.detach().numpy()) <= 1e-5
    assert (pulled > 0).all()


# -- who is found, and who is refused ------------------------------------------------------------------------------


def test_two_scans_are_one_layer():
    assert [mixer.name for mixer in find_mixers(built("rcps"))] == ["layers.0.mixer", "layers.1.mixer"]
    with mp.attach(built("caduceus")) as probe:
        assert "2 layers 0..1: mamba: 12 channels, state 5, 2 directions" in repr(probe)
    with mp.attach(LanguageModel([BiMambaWrapper(WIDTH, bidirectional=False, layer_idx=3)], WIDTH)) as probe:
        trace = probe.record(ids_of())
    assert "direction" not in trace.dims
    assert trace["layer"].values.tolist() == [3]


def test_what_is_not_bidirectional_in_itself_is_refused():
    cache = object()
    for kind in ("vim", "caduceus", "rcps"):
        mixer = built(kind).layers[0].mixer
        hidden = torch.randn(1, 4, 2 * WIDTH if kind == "rcps" else WIDTH)
        with mp.attach(mixer), pytest.raises(ValueError, match="no last token to scan from"):
            mixer(hidden, inference_params=cache)
    slow = Vim(WIDTH, use_fast_path=False)
    with mp.attach(slow) as probe, pytest.raises(ValueError, match="use_fast_path=False Vim's own code leaves"):
        probe.record(torch.randn(1, 4, WIDTH))
    with pytest.raises(ValueError, match="an RCPSWrapper around a BiMambaWrapper of one direction"):
        mp.attach(RCPSWrapper(BiMambaWrapper(WIDTH, bidirectional=False)))


def test_an_inner_mixer_can_be_probed_alone_and_not_beside_the_whole():
    model = built("caduceus")
    whole, inner = model.layers[0].mixer, model.layers[0].mixer.mamba_rev
    hidden = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    with mp.attach(inner) as probe:
        alone = probe.record(hidden.flip(1))
        with pytest.raises(ValueError, match="mamba_rev already has a forward of its own: a probe is attached"):
            mp.attach(whole)
    with mp.attach(whole) as probe:
        with pytest.raises(ValueError, match="a probe is attached"):
            mp.attach(inner)
        both = probe.record(hidden)
        assert error(inner(hidden), type(inner).forward(inner, hidden)) <= BOUND  # by hand: no part of a layer's call
        assert probe.record(hidden).equals(both)
    assert apart(both.probe.along("backward")["delta"].values, alone["delta"].values) == 0


def test_vim_is_told_from_mamba_by_its_second_A():
    assert type(Vim(WIDTH)).__module__ == type(Mamba(WIDTH)).__module__
    assert find_mixers(Vim(WIDTH))[0].sizes.directions == TWO
    assert find_mixers(Mamba(WIDTH))[0].sizes.directions == ()
