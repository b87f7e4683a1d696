"""mamba_ssm's own modules, taken over: held to stand-ins and to a float64 reference; to the real ones on a GPU."""

import copy
import re
import sys
from importlib.util import find_spec
from itertools import product

import libraries
import numpy as np
import pytest
import ssm_kernels
import torch
from cells import error
from libraries import InferenceParams, LanguageModel, perturbed, reference

import mamba_probe as mp

VARIABLES = ("delta", "B", "C", "x", "z", "h", "y", "out", "u")
ABLATABLE = ("conv", "gate", "decay", "delta", "B", "C")
KINDS = {
    "mamba": {},
    "mamba with biases": {"bias": True, "conv_bias": False},
    "mamba2": {"ngroups": 2},
    "mamba2 norm first": {"ngroups": 2, "norm_before_gate": True, "bias": True},
    "mamba2 no norm": {"rmsnorm": False},
    "mamba2 wide D": {"D_has_hdim": True, "ngroups": 2, "dt_limit": (0.6, 1.5)},
    "mamba2 limits": {"dt_limit": (0.6, 1.5), "use_mem_eff_path": False},
}
DECODING = [kind for kind in KINDS if kind != "mamba2 wide D"]
LENGTHS = (1, 3, 16, 17, 53)


@pytest.fixture(autouse=True)
def modules(request, monkeypatch):
    """The stand-ins, under the real class paths; on a GPU those are left to the real ones."""
    made = {name.rpartition(".")[2]: module for name, module in libraries.standins.items() if "ssm" in name}
    for module in made.values() if request.node.get_closest_marker("gpu") is None else ():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.fixture
def install(modules, monkeypatch):
    """Install causal_conv1d, as far as these modules can tell."""

    def installed():
        for module in modules.values():
            for name in ("causal_conv1d_fn", "causal_conv1d_update"):
                monkeypatch.setattr(module, name, getattr(ssm_kernels, name))

    return installed


@pytest.fixture
def build(modules):
    """A mixer of one of the KINDS, every weight perturbed."""

    def built(kind, seed=0, **options):
        torch.manual_seed(seed)
        first = kind.startswith("mamba2")
        maker = modules["mamba2"].Mamba2 if first else modules["mamba_simple"].Mamba
        sizes = {"d_state": 8} | ({"headdim": 8, "chunk_size": 16} if first else {})
        return perturbed(maker(24, **sizes | KINDS[kind] | options), seed)

    return built


@pytest.fixture
def model(build):
    """A builder of a language model of two layers."""
    return lambda kind: LanguageModel([build(kind, seed, layer_idx=seed) for seed in (0, 1)]).eval()


def hidden(length=21, batch=3, seed=0):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed))


def run(mixer, u, **options):
    with torch.no_grad():
        return mixer(u, **options)


def decoded(mixer, u, prompt):
    """The first `prompt` tokens at once, the others one by one."""
    mixer.layer_idx, params = 0, InferenceParams()
    outs = [run(mixer, u[:, :prompt], inference_params=params)]
    for at in range(prompt, u.shape[1]):
        params.seqlen_offset = at
        outs.append(run(mixer, u[:, at : at + 1], inference_params=params))
    return torch.cat(outs, 1)


def held(trace, mixer, u, bound=2e-6, **options):
    """Every variable of the one layer is the reference's."""
    made = reference(mixer, u, np.ones(u.shape[:2], bool), **options)
    for name, exact in made.items():
        found = trace[name].values[0]
        assert np.abs(found - exact).max() <= bound * max(np.abs(exact).max(), 1e-9), name


@pytest.mark.parametrize(("kind", "length", "conv"), list(product(KINDS, LENGTHS, (False, True))))
def test_recordings_and_outputs(kind, length, conv, build, install):
    if conv:
        install()
    mixer, u = build(kind), hidden(length)
    native = run(mixer, u)
    with mp.attach(mixer) as probe:
        trace, parity = probe.record(u, variables=VARIABLES), probe.parity(u)
        assert error(run(mixer, u), native) <= 2e-6
    held(trace, mixer, u)
    for name in ("out_vs_native", "out_vs_oracle", "native_vs_oracle", "delta", "B", "C"):
        assert float(parity[name].max()) <= 2e-6, name
    assert (run(mixer, u) == native).all(), "detach restores the very bits"
    assert not {"forward", "step"} & set(mixer.__dict__)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", DECODING)
def test_steps_continue_the_prompt_and_never_clamp_delta(kind, conv, build, install):
    if conv:
        install()
    mixer, u = build(kind), hidden(14)
    native = decoded(mixer, u, 9)
    with mp.attach(mixer) as probe, probe.recording(variables=VARIABLES) as recorder:
        probed = decoded(mixer, u, 9)
    trace = recorder.dataset
    assert error(probed, native) <= 2e-6
    assert trace["phase"].values[0].tolist() == ["prefill"] * 9 + ["decode"] * 5
    held(trace, mixer, u, clamped=9)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_generate_gives_the_same_tokens_and_its_predictions(kind, model):
    live, ids = model(kind), torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = live.generate(ids, 6)
    with mp.attach(live) as probe, probe.recording(variables=["delta", "h"]) as recorder:
        produced = live.generate(ids, 6)
    assert (produced == expected).all()
    predicted = recorder.dataset["prediction"].values
    assert (predicted[:, 6:] == expected[:, 7:].numpy()).all(), "logits of the last token alone are that token's"
    assert (predicted[:, :6] == -1).all()


def test_a_language_model_is_recorded_from_its_ids_and_read_out(model):
    live, ids = model("mamba"), torch.randint(0, 61, (2, 7))
    with mp.attach(live) as probe:
        trace, weights = probe.record(ids, torch.ones_like(ids)), probe.weights()
        with pytest.raises(ValueError, match="LanguageModel takes no attention_mask: padding would be read as tokens"):
            probe.record(ids, torch.tensor([[0] + [1] * 6] * 2))
        with pytest.raises(ValueError, match=r"token id 61 at row 0.*knows 0\.\.60"):
            probe.record(torch.full_like(ids, 61))
    assert trace["layer"].values.tolist() == [0, 1]
    assert (weights["unembedding"].values == live.lm_head.weight.detach().numpy()).all()
    assert (weights["norm_f"].values == 1).all()


@pytest.mark.parametrize("target", ABLATABLE)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 norm first", "mamba2 no norm"])
def test_ablations_are_those_of_the_reference_in_prompts_and_steps(kind, target, build):
    mixer, u = build(kind), hidden(12)
    plain = reference(mixer, u, np.ones(u.shape[:2], bool))["out"]
    with mp.attach(mixer) as probe, probe.edit(mp.ablate(target)), probe.recording(variables=VARIABLES) as recorder:
        run(mixer, u)
        decoded(mixer, u, 8)
    for rows in (slice(0, 3), slice(3, 6)):
        held(recorder.dataset.isel(batch=rows), mixer, u, bound=3e-6, without=target)
    assert error(recorder.dataset["out"].values[0, :3], plain) > 1e-2


def test_freezing_holds_a_quantity_constant(build):
    mixer, u = build("mamba2"), hidden()
    with mp.attach(mixer) as probe, probe.edit(mp.freeze("delta"), mp.freeze("B", value=0.5)):
        trace = probe.record(u, variables=["delta", "B", "out"])
    assert float(trace["delta"].std("token").max()) <= 1e-6
    assert (trace["B"].values == 0.5).all()


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 norm first", "mamba2 no norm"])
def test_training_never_takes_the_fused_kernels(kind, conv, build, install, modules, monkeypatch):
    mixer, u = build(kind), hidden(12)
    native = run(mixer, u)
    if conv:
        install()
    name = "mamba_split_conv1d_scan_combined" if kind.startswith("mamba2") else "mamba_inner_fn"
    module = modules["mamba2" if kind.startswith("mamba2") else "mamba_simple"]
    monkeypatch.setattr(module, name, lambda *a, **k: torch.zeros(3, 12, 24))
    mixer.train()
    fused = kind.startswith("mamba2") or conv
    assert (error(run(mixer, u), native) > 1e-2) == fused, "the fused kernel is taken"
    with mp.attach(mixer) as probe:
        trace = probe.record(u, variables=["delta", "out"])
        probed = mixer(u)
    assert error(probed.detach(), native) <= 2e-6
    assert error(trace["out"].values[0], native) <= 2e-6
    probed.square().sum().backward()
    assert mixer.A_log.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["mamba", "mamba2 wide D"])
def test_weights_act_on_what_was_recorded(kind, build):
    mixer, u = build(kind), hidden(9)
    with mp.attach(mixer) as probe:
        trace, weights = probe.record(u, variables=VARIABLES), probe.weights()
    z = trace["u"].dot(weights["in_proj_z"], dim="model").transpose(*trace["z"].dims)
    assert error(z, trace["z"]) <= 2e-6
    states = trace["h"].dims[-1:]
    C = trace["C"].isel(group=0, drop=True) if kind == "mamba" else trace["C"].isel(group=[0, 0, 0, 1, 1, 1])
    C = C if kind == "mamba" else C.rename(group="head")
    y = trace["h"].dot(C, dim=states) + weights["D"] * trace["x"]
    assert error(y.transpose(*trace["y"].dims), trace["y"]) <= 2e-6


def test_lora_on_in_proj_is_read_as_it_acts(build):
    """Mamba takes in_proj's weight and never calls it, so that what stands around it does nothing to a prompt."""
    mixer = build("mamba")
    base = mixer.in_proj

    class Around(torch.nn.Module):
        in_features, weight, bias = 24, base.weight, None

        def forward(self, u):
            return 2 * base(u)

    mixer.in_proj = Around()
    with mp.attach(mixer) as probe:
        assert (probe.weights()["in_proj_x"].values[0] == base.weight[:48].detach().numpy()).all()
        assert float(probe.parity(hidden())["out_vs_oracle"].max()) <= 2e-6


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_copies_and_second_models_are_not_probed(kind, build):
    mixer, other, u = build(kind), build(kind, seed=1), hidden(9)
    natives = [decoded(each, u, 6) for each in (mixer, other)]
    with mp.attach(mixer) as probe, probe.edit(mp.ablate("gate"), mp.ablate("conv")):
        twin = copy.deepcopy(mixer)
        for each, native in zip((twin, other), natives, strict=True):
            assert (decoded(each, u, 6) == native).all()
        params = InferenceParams()
        run(twin, u[:, :6], inference_params=params)
        states = params.key_value_memory_dict[0]
        with torch.no_grad():
            assert (twin.step(u[:, 6:7], *states)[0] == natives[0][:, 6:7]).all()
        assert error(decoded(mixer, u, 6), natives[0]) > 1e-2
    mp.detach(twin)
    assert not {"forward", "step"} & set(twin.__dict__)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_step_by_hand_is_edited_and_refused_while_recording(kind, build):
    mixer, u = build(kind, layer_idx=0), hidden(7)

    def step():
        params = InferenceParams()
        run(mixer, u[:, :6], inference_params=params)
        with torch.no_grad():
            return mixer.step(u[:, 6:], *params.key_value_memory_dict[0])[0]

    native = step()
    with mp.attach(mixer) as probe:
        assert error(step(), native) <= 2e-6
        with probe.edit(mp.ablate("gate")):
            assert error(step(), native) > 1e-2
        with (
            probe.recording(),
            pytest.raises(ValueError, match=r"layer 0: step\(\) was called by hand while recording"),
        ):
            step()
    assert (step() == native).all()


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 no norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_err_at_most_twice_as_much_as_the_library(kind, dtype, build):
    mixer, u = build(kind).to(dtype), hidden(53).to(dtype)
    with mp.attach(mixer) as probe:
        parity = probe.parity(u)
        steps = decoded(mixer, u[:, :9], 5)
    assert float(parity["out_vs_oracle"].max()) <= max(2e-6, 2 * float(parity["native_vs_oracle"].max()))
    assert float(parity["native_vs_oracle"].max()) <= 0.05
    assert error(steps.double(), decoded(mixer, u[:, :9], 5).double()) <= (0.03 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_compiled_models_follow_attach_edit_and_detach(kind, build):
    mixer, u = build(kind), hidden(9)
    native = run(mixer, u)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="eager")
    with mp.attach(mixer) as probe:
        assert error(run(compiled, u), native) <= 2e-6
        with probe.edit(mp.ablate("gate")):
            assert error(run(compiled, u), native) > 1e-2
    assert error(run(compiled, u), native) <= 1e-6


def test_derivatives_follow_the_mixer(build):
    mixer, u = build("mamba2"), hidden(6, batch=1)
    with mp.attach(mixer) as probe:
        found = probe.jacobian({"hidden_states": u}, layer=0, query_tokens=[4], direction=np.ones(24))
    exact = torch.autograd.functional.jacobian(lambda v: mixer(v)[0, 4], u)
    assert error(found["jacobian"].values[0, 0], exact[:, 0].sum(-1)) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba2", {"d_ssm": 24}, r"layer 0: Mamba2 with d_ssm=24 below expand \* d_model = 48 is not supported"),
        ("mamba2", {"process_group": "two"}, "Mamba2 with a process_group is not supported: each process has some"),
    ],
)
def test_what_does_not_fit_a_trace_is_refused_at_attach(kind, options, message, build):
    mixer = build(kind, **options)
    with pytest.raises(ValueError, match=message):
        mp.attach(mixer)
    assert not {"forward", "step"} & set(mixer.__dict__)


def test_what_does_not_fit_a_trace_is_refused_as_it_comes(build):
    mixer, u = build("mamba2 wide D"), hidden(5)
    packed = torch.zeros(3, 5, dtype=torch.int32)
    with mp.attach(mixer) as probe:
        for name, value in {"seq_idx": packed, "cu_seqlens": packed[0], "seqlen": 5}.items():
            with pytest.raises(ValueError, match=f"layer 0: {name} packs several sequences into a row"):
                mixer(u, **{name: value})
        with pytest.raises(ValueError, match=r"step takes no D by channel \(D_has_hdim\)"):
            decoded(mixer, u, 3)
        with pytest.raises(ValueError, match="Mamba2 takes no attention_mask"):
            probe.record(u, torch.tensor([[0, 1, 1, 1, 1]] * 3))


def test_another_release_and_other_mixers_are_refused_by_name(modules):
    class Mamba(modules["mamba_simple"].Mamba):
        def step(self, hidden_states, conv_state, ssm_state):
            return hidden_states, conv_state, ssm_state

    Mamba.__module__, Mamba.__qualname__ = "mamba_ssm.modules.mamba_simple", "Mamba"
    Mamba.step.__module__ = Mamba.__module__
    with pytest.raises(ValueError, match=re.escape("this release of mamba_ssm is not supported (>= 2.2 is)")):
        mp.attach(Mamba(24))
    fork = modules["mamba_simple"].Mamba(24)
    fork.A_s_log = torch.nn.Parameter(fork.A_log.detach().clone())
    with pytest.raises(ValueError, match=r"unsupported mixer family: Mamba \(mamba_ssm\.modules\.mamba_simple\)"):
        mp.attach(fork)
    for name in ("Mamba2Simple", "Mamba3"):
        kind = type(name, (torch.nn.Module,), {"__module__": f"mamba_ssm.modules.{name.lower()}"})
        with pytest.raises(ValueError, match=rf"unsupported mixer family: {name} \(mamba_ssm"):
            mp.attach(kind())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_modules_on_a_gpu(kind):
    """With mamba_ssm and a CUDA device; its kernels of Mamba-2 may use TF32, and the fused one needs causal_conv1d."""
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.modules.mamba_simple import Mamba

    first = kind.startswith("mamba2")
    sizes = {"d_state": 16, "layer_idx": 0} | ({"headdim": 16, "chunk_size": 32} if first else {})
    apart = {"use_mem_eff_path": False} if first and find_spec("causal_conv1d") is None else {}
    torch.manual_seed(0)
    mixer = perturbed((Mamba2 if first else Mamba)(64, **sizes | KINDS[kind] | apart)).cuda()
    u = torch.randn(2, 75, 64, device="cuda")
    native = run(mixer, u)
    with mp.attach(mixer) as probe:
        trace, parity = probe.record(u, variables=VARIABLES), probe.parity(u)
    assert np.isfinite(trace["out"].values).all()
    assert float(parity["out_vs_oracle"].max()) <= max(2e-6, 2 * float(parity["native_vs_oracle"].max()))
    if not first:  # of Mamba-2 the native kernels' own error is what is between them
        assert float(parity["out_vs_native"].max()) <= 1e-5
    assert (run(mixer, u) == native).all()
    if kind in DECODING:
        expected = decoded(mixer, u[:, :20], 15)
        with mp.attach(mixer) as probe, probe.recording(variables=["delta"]) as recorder:
            probed = decoded(mixer, u[:, :20], 15)
        assert error(probed.cpu(), expected.cpu()) <= (1e-2 if first else 1e-5)
        assert (recorder.dataset["phase"].values[0] == ["prefill"] * 15 + ["decode"] * 5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_point_that_is_listed_fires(kind, model):
    ids, live = torch.randint(0, 61, (2, 9)), model(kind)
    with mp.attach(live) as probe, torch.no_grad():
        names, plain = probe.hook_names(), live(ids).logits
        logits, cache = probe.run_with_cache(ids)
    assert torch.equal(logits, plain)
    assert list(cache) == names
    assert all(tensor.shape[:2] == (2, 9) for tensor in cache.values())
    assert {name.partition(".")[2][2:] for name in names} >= {"hook_mixer_in", "hook_mixer_out", "mixer.hook_delta"}
    assert ("blocks.0.mixer.hook_in_proj" in names) == kind.startswith("mamba2")
    made = reference(live.backbone.layers[1], cache["mixer_in", 1], np.ones((2, 9), bool))
    for short, name in {"delta": "delta", "B": "B", "ssm_input": "x", "skip": "z", "ssm_output": "y", "h": "h"}.items():
        found = cache[short, 1].numpy().reshape(made[name].shape)
        assert error(found, made[name]) <= 2e-6, short
    with mp.attach(live) as probe, pytest.raises(ValueError, match=r"unknown hook point 'blocks.0.hook_resid_pre'"):
        probe.run_with_cache(ids, names_filter="blocks.0.hook_resid_pre")
