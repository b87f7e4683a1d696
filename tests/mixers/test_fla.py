"""fla's layers, taken over: held to a stand-in of them and to a float64 reference; to the real ones on a GPU."""

import copy
import sys
from itertools import product

import fla_cache
import libraries
import numpy as np
import pytest
import ssm_kernels
import torch
from cells import error
from libraries import perturbed, reference
from torch import nn

import mamba_probe as mp

VARIABLES = ("delta", "B", "C", "x", "z", "h", "y", "out", "u")
ABLATABLE = ("conv", "gate", "decay", "delta", "B", "C")
KINDS = {
    "mamba": {},
    "mamba with biases": {"use_bias": True, "use_conv_bias": False},
    "mamba2": {"use_bias": True},
    "mamba2 norm first": {"norm_before_gate": True},
    "mamba2 no norm": {"rmsnorm": False},
    "mamba2 wide D": {"D_has_hdim": True},
    "mamba2 limits": {"dt_limit": (0.6, 1.5)},
}
LENGTHS = (1, 3, 16, 17, 53)


@pytest.fixture(autouse=True)
def modules(request, monkeypatch):
    """The stand-ins, under the real class paths; on a GPU those are left to the real ones."""
    made = {name.rpartition(".")[2]: module for name, module in libraries.standins.items() if "fla" in name}
    for module in made.values() if request.node.get_closest_marker("gpu") is None else ():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


@pytest.fixture
def kernels(modules, monkeypatch):
    """Let mamba_ssm's kernels and causal_conv1d be installed, and run on this device."""
    for module in modules.values():
        monkeypatch.setattr(module, "is_fast_path_available", True)
        monkeypatch.setattr(module, "DEVICE", "cpu")

    def equipped(layer):
        layer.backend = "cuda"
        layer.causal_conv1d_fn = ssm_kernels.causal_conv1d_fn
        layer.causal_conv1d_update = ssm_kernels.causal_conv1d_update
        return layer

    return equipped


@pytest.fixture
def build(modules):
    """A layer of one of the KINDS, every weight perturbed."""

    def built(kind, seed=0, **options):
        torch.manual_seed(seed)
        second = kind.startswith("mamba2")
        sizes = {"hidden_size": 24, "state_size": 8, "layer_idx": 0}
        sizes |= {"head_dim": 8, "chunk_size": 16} if second else {}
        maker = modules["mamba2"].Mamba2 if second else modules["mamba"].Mamba
        return perturbed(maker(**sizes | KINDS[kind] | options), seed)

    return built


def hidden(length=21, seed=0):
    return torch.randn(3, length, 24, generator=torch.Generator().manual_seed(seed))


def padding(length, inside=True):
    """The first row padded on the left, the second inside, the third not."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, : min(length - 1, 7)] = 0
    mask[1, 1 : length // 2] = 0 if inside else 1
    return mask


def run(layer, u, **options):
    with torch.no_grad():
        return layer(u, **options)[0]


def decoded(layer, u, prompt, mask=None):
    """The first `prompt` tokens at once, the others one by one; the mask grows, as in generate()."""
    cache, outs = fla_cache.Cache(), []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, u.shape[1]))]:
        given = None if mask is None else mask[:, :stop]
        piece = u[:, start:stop]
        outs.append(run(layer, piece, attention_mask=given, past_key_values=cache, use_cache=True))
    return torch.cat(outs, 1)


def held(trace, layer, u, valid, bound=2e-6, **options):
    """Every variable of the one layer is the reference's, at valid tokens."""
    for name, exact in reference(layer, u, valid, **options).items():
        found = trace[name].values[0][valid]
        assert np.abs(found - exact[valid]).max() <= bound * max(np.abs(exact[valid]).max(), 1e-9), name


@pytest.mark.parametrize(("kind", "length", "padded"), list(product(KINDS, LENGTHS, (False, True))))
def test_recordings_and_outputs(kind, length, padded, build):
    layer, u = build(kind), hidden(length)
    mask = padding(length) if padded and length > 1 else None
    valid = np.ones(u.shape[:2], bool) if mask is None else mask.bool().numpy()
    native = run(layer, u, attention_mask=mask)
    masked = u if mask is None or kind in ("mamba", "mamba with biases") else u * mask[..., None]
    with mp.attach(layer) as probe:
        trace, parity = probe.record(u, mask, variables=VARIABLES), probe.parity(u, mask)
        assert error(run(layer, u, attention_mask=mask), native, valid) <= 2e-6
    held(trace, layer, masked, valid)
    for name in ("out_vs_native", "out_vs_oracle", "native_vs_oracle", "delta", "B", "C"):
        assert float(parity[name].max()) <= 2e-6, name
    assert (run(layer, u, attention_mask=mask) == native).all(), "detach restores the very bits"
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_the_loops_steps_continue_the_prompt_and_clamp_delta(kind, build):
    layer, u, mask = build(kind), hidden(14), padding(14)
    mask[:, 9:] = 1
    valid, native = mask.bool().numpy(), decoded(layer, u, 9, mask)
    with mp.attach(layer) as probe, probe.recording(variables=VARIABLES) as recorder:
        probed = decoded(layer, u, 9, mask)
    trace = recorder.dataset
    assert error(probed, native, valid) <= 2e-6
    assert (trace["valid"].values == valid).all()
    assert trace["phase"].values[2].tolist() == ["prefill"] * 9 + ["decode"] * 5
    held(trace, layer, u * mask[..., None] if kind.startswith("mamba2") else u, valid)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_steps_do_not_clamp_delta(kind, build, kernels):
    layer, u, mask = kernels(build(kind)), hidden(14), padding(14, inside=False)
    valid = mask.bool().numpy()
    native, whole = decoded(layer, u, 9, mask), run(layer, u, attention_mask=mask)
    with mp.attach(layer) as probe:
        assert error(run(layer, u, attention_mask=mask), whole, valid) <= 2e-6
        with probe.recording(variables=VARIABLES) as recorder:
            probed = decoded(layer, u, 9, mask)
    assert error(probed, native, valid) <= 2e-6
    held(recorder.dataset, layer, u, valid, clamped=9)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_loop_is_wrong_about_groups_and_the_probe_is_not(groups, build):
    layer, u = build("mamba2", n_groups=groups), hidden()
    with mp.attach(layer) as probe:
        parity, trace = probe.parity(u), probe.record(u, variables=VARIABLES)
    held(trace, layer, u, np.ones(u.shape[:2], bool))
    assert float(parity["out_vs_oracle"].max()) <= 2e-6
    assert (float(parity["native_vs_oracle"].max()) > 1e-2) == (groups > 1)
    assert ("the library is wrong here" in parity.attrs["parting"]) == (groups > 1)


@pytest.mark.parametrize("target", ABLATABLE)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 norm first", "mamba2 no norm"])
def test_ablations_are_those_of_the_reference_in_prompts_and_steps(kind, target, build):
    layer, u = build(kind), hidden(12)
    valid = np.ones(u.shape[:2], bool)
    plain = reference(layer, u, valid)["out"]
    with mp.attach(layer) as probe, probe.edit(mp.ablate(target)), probe.recording(variables=VARIABLES) as recorder:
        run(layer, u)
        decoded(layer, u, 8)
    for rows in (slice(0, 3), slice(3, 6)):
        held(recorder.dataset.isel(batch=rows), layer, u, valid, bound=3e-6, without=target)
    assert error(recorder.dataset["out"].values[0, :3], plain) > 1e-2


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2 no norm"])
def test_training_never_takes_the_fused_kernels(kind, build, kernels, modules, monkeypatch):
    layer, u = kernels(build(kind)), hidden(12)
    native = run(layer, u)
    second = kind.startswith("mamba2")
    name = "mamba_split_conv1d_scan_combined" if second else "mamba_inner_fn"
    monkeypatch.setattr(modules["mamba2" if second else "mamba"], name, lambda *a, **k: torch.zeros(3, 12, 24))
    layer.train()
    assert error(run(layer, u), native) > 1e-2, "the fused kernel is taken"
    with mp.attach(layer) as probe:
        trace = probe.record(u, variables=["delta", "out"])
        probed = layer(u)[0]
    assert error(probed.detach(), native) <= 2e-6
    assert error(trace["out"].values[0], native) <= 2e-6
    probed.square().sum().backward()
    assert layer.A_log.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_copies_and_second_models_are_not_probed(kind, build):
    layer, other, u = build(kind), build(kind, seed=1), hidden(9)
    natives = [decoded(each, u, 6) for each in (layer, other)]
    with mp.attach(layer) as probe, probe.edit(mp.ablate("gate"), mp.ablate("conv")):
        twin = copy.deepcopy(layer)
        for each, native in zip((twin, other), natives, strict=True):
            assert (decoded(each, u, 6) == native).all()
        assert error(decoded(layer, u, 6), natives[0]) > 1e-2
    mp.detach(twin)
    assert "forward" not in twin.__dict__


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_bfloat16_errs_at_most_twice_as_much_as_the_library(kind, build):
    layer, u = build(kind).bfloat16(), hidden(53).bfloat16()
    with mp.attach(layer) as probe:
        parity = probe.parity(u)
        assert error(decoded(layer, u[:, :9], 5).double(), run(layer, u[:, :9]).double()) <= 0.03
    assert float(parity["out_vs_oracle"].max()) <= 2 * float(parity["native_vs_oracle"].max())
    assert float(parity["native_vs_oracle"].max()) <= 0.05


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_compiled_models_follow_attach_edit_and_detach(kind, build):
    layer, u = build(kind), hidden(9)
    native = run(layer, u)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    with mp.attach(layer) as probe:
        assert error(run(compiled, u), native) <= 2e-6
        with probe.edit(mp.ablate("gate")):
            assert error(run(compiled, u), native) > 1e-2
    assert error(run(compiled, u), native) <= 1e-6


def test_weights_by_names_and_derivatives(build):
    layer, u = build("mamba2 wide D"), hidden(6)
    with mp.attach(layer) as probe:
        weights = probe.weights()
        found = probe.jacobian(u, layer=0, query_tokens=[4], direction=np.ones(24))
    assert (weights["D"].values[0] == layer.D.detach().unflatten(0, (6, 8)).numpy()).all()
    assert weights["in_proj_x"].dims == ("layer", "head", "head_channel", "model")
    exact = torch.autograd.functional.jacobian(lambda v: layer(v)[0][:, 4].sum(0), u)
    assert error(found["jacobian"].values[:, 0], exact.sum(-1).movedim(0, 1)) <= 1e-5


def test_another_activation_an_older_release_and_other_layers_are_refused_by_name(build, modules):
    with pytest.raises(ValueError, match="layer 0: Mamba with hidden_act='relu' is not supported: the scan's gate is"):
        mp.attach(build("mamba", hidden_act="relu"))

    class Mamba(nn.Module):
        activation = "silu"

        def __init__(self):
            super().__init__()
            self.conv1d = nn.Conv1d(4, 4, 4)

        def forward(self, hidden_states, cache_params=None, attention_mask=None):
            return hidden_states

    Mamba.__module__, Mamba.__qualname__ = "fla.layers.mamba", "Mamba"
    with pytest.raises(ValueError, match=r"this release of flash-linear-attention is not supported \(>= 0.6 is\)"):
        mp.attach(Mamba())
    for name in ("Mamba3", "LogLinearMamba2"):
        kind = type(name, (nn.Module,), {"__module__": f"fla.layers.{name.lower()}"})
        with pytest.raises(ValueError, match=rf"unsupported mixer family: {name} \(fla\.layers"):
            mp.attach(kind())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_layers_on_a_gpu(kind):
    """With flash-linear-attention and a CUDA device; mamba_ssm's kernels where that is installed, its loop else."""
    from fla.layers.mamba import Mamba
    from fla.layers.mamba2 import Mamba2
    from fla.models.cache_utils import Cache

    second = kind.startswith("mamba2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "state_size": 16, "layer_idx": 0}
    sizes |= {"head_dim": 16, "chunk_size": 32} if second else {"intermediate_size": 128}
    layer = perturbed((Mamba2 if second else Mamba)(**sizes | KINDS[kind])).cuda()
    u = torch.randn(2, 75, 64, device="cuda")

    def steps():
        cache, outs = Cache(), []
        for start, stop in [(0, 15), *((at, at + 1) for at in range(15, 20))]:
            outs.append(run(layer, u[:, start:stop], past_key_values=cache, use_cache=True))
        return torch.cat(outs, 1).cpu()

    native, expected = run(layer, u), steps()
    with mp.attach(layer) as probe:
        parity = probe.parity(u)
        with probe.recording(variables=["delta"]) as recorder:
            probed = steps()
    assert float(parity["out_vs_oracle"].max()) <= max(2e-6, 2 * float(parity["native_vs_oracle"].max()))
    assert float(parity["out_vs_native"].max()) <= 1e-2
    assert error(probed, expected) <= 1e-2
    assert (recorder.dataset["phase"].values[0] == ["prefill"] * 15 + ["decode"] * 5).all()
    assert (run(layer, u) == native).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_point_that_is_listed_fires(kind, build):
    layer, u = build(kind), hidden(9)
    with mp.attach(layer) as probe, torch.no_grad():
        plain = layer(u)[0]
        found, cache = probe.run_with_cache(u)
        names = probe.hook_names()
        changed = probe.run_with_hooks(u, fwd_hooks=[("blocks.0.hook_mixer_in", lambda u, hook: 2 * u)])
        assert torch.equal(changed[0], layer(2 * u)[0])
    assert torch.equal(found[0], plain)
    assert list(cache) == names
    assert torch.equal(cache["mixer_out", 0], plain)
    assert torch.equal(cache["in_proj", 0], layer.in_proj(u))
    assert all(tensor.shape[:2] == (3, 9) for tensor in cache.values())
