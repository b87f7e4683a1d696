"""Our own blocks: Mamba-1 and Mamba-2 against transformers' mixers, S4D against its convolution; all probed."""

import inspect

import numpy as np
import pytest
import torch
from scipy.special import expit
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

import mamba_probe as mp
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock, build, config_of

S4D_VARIABLES = ("delta", "A", "B", "C", "A_bar", "B_bar", "x", "z", "y", "h", "out")


def perturbed(model, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * (0.1 if "log" in name else scale))
    return model.eval()


def language_model(kind, seed=0):
    torch.manual_seed(seed)
    make = {
        "mamba1": lambda: MambaBlock(24, d_inner=40, d_state=8, dt_rank=3),
        "mamba2": lambda: Mamba2Block(24, n_heads=6, d_inner=48, d_state=8, n_groups=2),
        "gate": lambda: Mamba2Block(24, n_heads=6, d_inner=48, d_state=8, n_groups=2, gated_norm=False),
        "s4d": lambda: S4DBlock(24, d_inner=40, d_state=8),
    }[kind]
    return perturbed(LanguageModel([make(), make()], vocab_size=61), seed)


KINDS = ("mamba1", "mamba2", "gate", "s4d")


@pytest.fixture(params=KINDS)
def own(request):
    return language_model(request.param)


def prompt(length=40, batch=3):
    ids = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, :1] = 0
    return ids, mask


def error(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1
"""transformers up to 5.22 norms all groups as one, which our blocks never do."""


def theirs(kind):
    if kind == "mamba1":
        from transformers import MambaConfig as Config
        from transformers.models.mamba.modeling_mamba import MambaMixer as Mixer

        sizes = {"hidden_size": 24, "expand": 2, "state_size": 8, "time_step_rank": 3}
    else:
        from transformers import Mamba2Config as Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Mixer

        sizes = {"hidden_size": 24, "expand": 2, "state_size": 8, "num_heads": 6, "head_dim": 8, "n_groups": GROUPS}
    torch.manual_seed(1)
    return perturbed(Mixer(Config(**sizes), layer_idx=0), 1)


def ours(kind):
    if kind == "mamba1":
        return MambaBlock(24, d_state=8, dt_rank=3).eval()
    return Mamba2Block(24, n_heads=6, d_state=8, n_groups=GROUPS).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_our_blocks_are_transformers_mixers_and_take_their_state_dicts_both_ways(kind, padded):
    theirs_, ours_ = theirs(kind), ours(kind)
    ours_.load_state_dict(theirs_.state_dict(), strict=True)
    hidden = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(2))
    mask = prompt()[1] if padded else None
    with torch.no_grad():
        a, b = ours_(hidden, mask), theirs_(hidden, attention_mask=mask)
    kept = slice(None) if mask is None else mask.bool()
    assert error(a[kept], b[kept]) < 2e-6
    theirs_.load_state_dict(perturbed(ours_, 5).state_dict(), strict=True)
    with torch.no_grad():
        assert error(ours_(hidden), theirs_(hidden)) < 2e-6


def s4d_by_convolution(block, hidden):
    """S4D from its kernel K(lag) = 2 Re sum_n C (exp(delta A) - 1) / A exp(lag delta A), summed by brute force."""
    w = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
    xz = hidden @ w["in_proj.weight"].T
    x, z = np.split(xz, 2, axis=-1)
    taps = w["conv1d.weight"][:, 0]
    padded = np.pad(x, [(0, 0), (taps.shape[1] - 1, 0), (0, 0)])
    u = sum(padded[:, i : i + x.shape[1]] * taps[:, i] for i in range(taps.shape[1])) + w["conv1d.bias"]
    u = u * expit(u)
    A = -np.exp(w["kernel.log_A_real"]) + 1j * w["kernel.A_imag"]
    C = w["kernel.C"][..., 0] + 1j * w["kernel.C"][..., 1]
    dt_A = np.exp(w["kernel.log_dt"])[:, None] * A
    lags = np.arange(x.shape[1])
    kernel = 2 * np.einsum("cn,cnl->cl", C * (np.exp(dt_A) - 1) / A, np.exp(dt_A[..., None] * lags)).real
    y = np.stack([(kernel[:, t::-1].T * u[:, : t + 1]).sum(1) for t in lags], axis=1) + w["D"] * u
    return (y * z * expit(z)) @ w["out_proj.weight"].T


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_s4d_block_is_its_convolution(dtype, bound):
    block = language_model("s4d").backbone.layers[0].mixer.to(dtype)
    hidden = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        out = block(hidden.to(dtype)).double().numpy()
    assert error(out, s4d_by_convolution(block, hidden.to(dtype).double().numpy())) < bound


def test_convolved_at_once_s4d_and_its_gradients_are_the_scan_s():
    """Padded, in float64, at a length that is no power of two."""
    block = language_model("s4d").backbone.layers[0].mixer.double()
    hidden = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, :7] = 0
    found = {}
    for block.backend in ("cpu", "convolution"):
        out = block(hidden, mask)
        found[block.backend] = out, *torch.autograd.grad(out.square().sum(), tuple(block.parameters()))
    for convolved, scanned in zip(found["convolution"], found["cpu"], strict=True):
        assert error(convolved.detach(), scanned.detach()) < 1e-12
    block.backend = "convolution"
    assert block.float()(hidden.float(), mask).dtype == torch.float32
    assert error(block(hidden.float(), mask).detach().double(), found["cpu"][0].detach()) < 2e-6


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_a_probe_sees_our_blocks_and_leaves_them_as_they_were(own, backend):
    ids, mask = prompt()
    with torch.no_grad():
        native = own(ids, mask).logits
    with mp.attach(own, backend=backend) as probe:
        trace, parity = probe.record(ids, mask, variables=("delta", "A", "B", "C", "x", "z", "y", "h", "out")), None
        parity = probe.parity(ids, mask)
        weights = probe.weights()
        with torch.no_grad():
            probed = own(ids, mask).logits
    assert error(probed[mask.bool()], native[mask.bool()]) < 2e-6
    for name in ("out_vs_native", "out_vs_oracle", "delta", "B", "C"):
        assert float(parity[name].max()) < 2e-6, name
    assert (trace["prediction"].values[mask.bool().numpy()] == native.argmax(-1)[mask.bool()].numpy()).all()
    assert weights["unembedding"].shape == (61, 24)
    with torch.no_grad():
        assert torch.equal(own(ids, mask).logits, native)
    assert trace.sizes["layer"] == 2


def test_the_trace_of_s4d_has_its_dims_and_the_recurrence_holds_in_it():
    model = language_model("s4d")
    ids, _ = prompt()
    with mp.attach(model) as probe:
        trace, weights = probe.record(ids, variables=S4D_VARIABLES), probe.weights()
    assert trace.attrs["family"] == "s4d"
    assert trace.attrs["discretization"] == "zoh"
    assert trace["delta"].dims == ("layer", "channel")
    for name in ("A", "B", "C", "A_bar", "B_bar"):
        assert trace[name].dims == ("layer", "channel", "state"), name
        assert np.iscomplexobj(trace[name]), name
    assert trace["h"].dims == ("layer", "batch", "token", "channel", "state")
    kernel = model.backbone.layers[1].mixer.kernel
    assert error(trace["delta"].sel(layer=1), kernel.log_dt.detach().exp()) < 1e-6
    recomputed = trace.drop_vars(["A_bar", "B_bar"]).probe
    assert error(recomputed.A_bar, trace["A_bar"]) < 2e-7
    assert error(recomputed.B_bar, trace["B_bar"]) < 1e-5  # expm1 of a complex float32
    h, x = trace["h"].values.astype(complex), trace["x"].values.astype(float)
    A_bar, B_bar, C = (trace[name].values[:, None].astype(complex) for name in ("A_bar", "B_bar", "C"))
    state = np.zeros_like(h[:, :, 0])
    for t in range(h.shape[2]):
        state = A_bar * state + B_bar * x[:, :, t, :, None]
        assert error(h[:, :, t], state) < 5e-6
        y = 2 * (C * state).sum(-1).real + weights["D"].values[:, None] * x[:, :, t]
        assert error(trace["y"].values[:, :, t], y) < 5e-6


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_a_trace_of_s4d_survives_its_store(tmp_path, suffix):
    ids, mask = prompt()
    with mp.attach(language_model("s4d")) as probe:
        trace = probe.record(ids, mask, variables=S4D_VARIABLES)
        weights = probe.weights()
    trace.probe.save(tmp_path / f"t.{suffix}")
    opened = mp.open_trace(tmp_path / f"t.{suffix}")
    for name in trace.data_vars:
        assert opened[name].dtype == trace[name].dtype, name
        np.testing.assert_array_equal(opened[name].values, trace[name].values)
        assert opened[name].attrs == trace[name].attrs
    assert opened["h"].chunks is not None, "lazy"
    assert weights["A"].dtype == np.complex64


def test_s4d_channels_and_tokens_can_be_chosen():
    ids, _ = prompt()
    model = language_model("s4d")
    with mp.attach(model) as probe:
        whole = probe.record(ids, variables=S4D_VARIABLES)
        some = probe.record(ids, variables=S4D_VARIABLES, channels=[3, 7], tokens=[0, 5, 20], layers=[1])
    chosen = whole.sel(layer=[1], channel=[3, 7], token=[0, 5, 20])
    for name in S4D_VARIABLES:
        np.testing.assert_array_equal(some[name].values, chosen[name].values)


def test_what_s4d_has_not_is_refused_by_name():
    model = language_model("s4d")
    ids, _ = prompt()
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match=r"s4d layers have no delta_cumsum: delta is constant"):
            probe.record(ids, variables=["delta_cumsum"])
        for edit in (mp.freeze("delta"), mp.ablate("B"), mp.freeze("C", layer=1)):
            with (
                pytest.raises(ValueError, match=r"is a constant weight, the same at every token.*conv, gate, decay"),
                probe.edit(edit),
            ):
                pass
    with pytest.raises(ValueError, match=r'"triton" does not support them yet: .*\(s4d\) needs complex A'):
        mp.attach(model, backend="triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["conv", "gate"])
def test_convolution_and_gate_can_be_ablated(kind, target):
    model = language_model(kind)
    ids, _ = prompt()
    with mp.attach(model) as probe:
        before = probe.record(ids, variables=["x", "y", "out"])
        with probe.edit(mp.ablate(target, layer=0)):
            after = probe.record(ids, variables=["x", "y", "out"])
    same = ["x", "y"] if target == "gate" else []
    for name in same:
        np.testing.assert_array_equal(after[name].sel(layer=0), before[name].sel(layer=0))
    assert error(after["out"].sel(layer=0), before["out"].sel(layer=0)) > 1e-2
    mixer = model.backbone.layers[0].mixer
    if target == "conv":
        hidden = model.backbone.layers[0].norm(model.backbone.embeddings(ids))
        projected = mixer.in_proj(hidden).detach()
        d_inner = mixer.sizes["d_inner"]
        passed = projected[..., d_inner : 2 * d_inner] if kind in ("mamba2", "gate") else projected[..., :d_inner]
        x = after["x"].sel(layer=0).values.reshape(*ids.shape, -1)
        assert error(x, passed * torch.sigmoid(passed)) < 2e-6
    elif kind != "mamba2":
        y = after["y"].sel(layer=0).values.reshape(*ids.shape, -1)
        assert error(after["out"].sel(layer=0), y @ mixer.out_proj.weight.detach().numpy().T) < 2e-6


def test_s4d_without_decay_sums_what_it_wrote():
    model = language_model("s4d")
    ids, _ = prompt()
    with mp.attach(model) as probe, probe.edit(mp.ablate("decay", layer=0)):
        after = probe.record(ids, variables=["x", "h", "B_bar"], layers=[0])
    written = after["B_bar"].values[:, None, None].astype(complex) * after["x"].values[..., None]
    assert error(after["h"], written.cumsum(2)) < 2e-6


def test_a_constant_of_the_weights_is_not_recorded_where_an_edit_contradicts_it():
    ids, _ = prompt()
    with mp.attach(language_model("s4d")) as probe, probe.edit(mp.ablate("decay")):
        for name in ("A", "A_bar"):
            with pytest.raises(
                ValueError, match=rf"A_bar is 1 whatever A says, so {name} of the weights would be wrong"
            ):
                probe.record(ids, variables=[name, "h"])


def test_a_model_of_two_families_is_recorded_group_by_group():
    torch.manual_seed(0)
    model = perturbed(LanguageModel([S4DBlock(8, d_state=2), MambaBlock(8), S4DBlock(8, d_state=2)], vocab_size=61))
    ids, mask = prompt()
    with mp.attach(model) as probe:
        assert "2 layers 0, 2: s4d" in repr(probe)
        with pytest.raises(ValueError, match=r"Pass layers= of one group: layers \[0, 2\]: s4d.*; layers \[1\]: mamba"):
            probe.weights()
        for layers in ([0, 2], [1]):
            trace, weights = probe.record(ids, mask, layers=layers), probe.weights(layers)
            assert trace["layer"].values.tolist() == weights["layer"].values.tolist() == layers
        assert float(probe.parity(ids, mask)["out_vs_oracle"].max()) < 2e-6


def test_float64_blocks_show_the_a_that_they_execute():
    for kind in ("mamba1", "mamba2"):
        model = language_model(kind).double()
        with mp.attach(model) as probe:
            trace = probe.record(prompt()[0], variables=["A", "delta", "A_bar"])
        want = -torch.exp(model.backbone.layers[0].mixer.A_log.detach())
        assert error(trace["A"].sel(layer=0), want) < 1e-15
        assert error(trace.drop_vars("A_bar").probe.A_bar, trace["A_bar"]) < 1e-14


def test_a_copy_of_a_probed_model_is_not_probed():
    import copy

    model = language_model("mamba1")
    ids, _ = prompt()
    with torch.no_grad():
        native = model(ids).logits
        with mp.attach(model) as probe:
            twin = copy.deepcopy(model)
            with probe.edit(mp.ablate("gate")), probe.recording(variables=["delta"]) as recorder:
                assert torch.equal(twin(ids).logits, native)
                assert not torch.equal(model(ids).logits, native)
        assert recorder.dataset.sizes["batch"] == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_of_training_lower_the_loss(kind):
    torch.manual_seed(0)
    model = language_model(kind).train()
    ids, mask = prompt()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        logits = model(ids, mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_config_builds_the_same_model_again_and_it_loads(kind, tmp_path):
    import json

    from safetensors.torch import save_file

    model = language_model(kind)
    again = build(config_of(model))
    again.load_state_dict(model.state_dict(), strict=True)
    (tmp_path / "config.json").write_text(json.dumps(config_of(model)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = mp.load(tmp_path)
    ids, mask = prompt()
    with torch.no_grad():
        logits = model(ids, mask).logits
        assert torch.equal(loaded(ids, mask).logits, logits)
        assert torch.equal(again.eval()(ids, mask).logits, logits)


def test_wrong_sizes_and_configs_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="d_state must be a whole number >= 1; got 0"):
        S4DBlock(4, d_state=0)
    with pytest.raises(ValueError, match=r"d_inner must be a multiple of n_heads.*d_inner = 8, n_heads = 3"):
        Mamba2Block(4, n_heads=3)
    with pytest.raises(ValueError, match=r"needs blocks of one d_model, .*; got \[4, 5\]"):
        LanguageModel([S4DBlock(4), S4DBlock(5)], vocab_size=8)
    block = S4DBlock(4)
    with pytest.raises(ValueError, match="each once"):
        LanguageModel([block, block], vocab_size=8)
    with pytest.raises(ValueError, match=r"mixers are blocks of mamba_probe\.blocks; got Linear"):
        LanguageModel([torch.nn.Linear(4, 4)], vocab_size=8)
    with pytest.raises(ValueError, match="d_inner must be a whole number >= 1; got 0"):
        MambaBlock(4, d_inner=0)
    with pytest.raises(ValueError, match=r"kind of a block must be one of .*'s4d'.*; got 's5'"):
        build({"mixers": [{"kind": "s5"}], "vocab_size": None})
    with pytest.raises(ValueError, match=r"s4d: .*unexpected keyword argument 'rank'"):
        build({"mixers": [{"kind": "s4d", "d_model": 4, "rank": 1}], "vocab_size": None})
    with pytest.raises(ValueError, match="is one bare block; got 2"):
        build({"mixers": [{"kind": "s4d", "d_model": 4}] * 2, "vocab_size": None})
    with pytest.raises(ValueError, match=r"Linear is no block or language model of mamba_probe\.blocks"):
        config_of(torch.nn.Linear(1, 1))
    (tmp_path / "config.json").write_text('{"model_type": "mamba_probe", "mixers": []}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"needs exactly the fields .*vocab_size"):
        mp.load(tmp_path)
