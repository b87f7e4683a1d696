"""The standalone S4D layer under a probe, alone and in a model of one's own, against its convolution in float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import erf, expit
from torch import nn

import mamba_probe as mp
from mamba_probe.formats.s4d import S4D
from mamba_probe.mixers import find_mixers
from mamba_probe.report.inspecting import described
from mamba_probe.trace.memory import readable

VARIABLES = ("delta", "A", "B", "C", "A_bar", "B_bar", "x", "y", "h", "u", "out")
SHARED = ("x", "y", "h", "u", "out")


def perturbed(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * (0.1 if "log" in name else 0.3))
    return module.eval()


class S4Model(nn.Module):
    """As the model of state-spaces/s4's `example.py`: encoder, residual layers with a norm after each, decoder."""

    def __init__(self, n_layers=3, transposed=True):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 6), nn.Linear(6, 4)
        self.s4_layers = nn.ModuleList(S4D(6, 3, transposed=transposed) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(n_layers))
        self.transposed = transposed

    def forward(self, x):
        x = self.encoder(x)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            z, _ = layer(x.mT) if self.transposed else layer(x)
            x = norm(x + (z.mT if self.transposed else z))
        return self.decoder(x.mean(dim=1))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return perturbed(S4D(6, 3, transposed=False))


@pytest.fixture(params=[True, False])
def model(request):
    torch.manual_seed(0)
    return perturbed(S4Model(transposed=request.param))


def hidden(length=21, width=6, batch=3):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def error(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def by_convolution(layer, u):
    """What the layer makes of u (batch, token, channel), its kernel summed lag by lag in float64: y and out."""
    w = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    u = np.asarray(u, dtype=np.float64)
    A = -np.exp(w["kernel.log_A_real"]) + 1j * w["kernel.A_imag"]
    step = np.exp(w["kernel.log_dt"])[:, None] * A
    C = (w["kernel.C"][..., 0] + 1j * w["kernel.C"][..., 1]) * (np.exp(step) - 1) / A
    y = w["D"] * u
    for lag in range(u.shape[1]):
        y[:, lag:] += 2 * (C * np.exp(lag * step)).sum(-1).real * u[:, : u.shape[1] - lag]
    gelu = y * (1 + erf(y / np.sqrt(2))) / 2
    value, gate = np.split(gelu @ w["output_linear.0.weight"][..., 0].T + w["output_linear.0.bias"], 2, axis=-1)
    return y, value * expit(gate)


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_a_bare_layer_is_recorded_as_its_convolution(layer, backend):
    u = hidden()
    with torch.no_grad():
        native = layer(u)[0]
    with mp.attach(layer, backend=backend) as probe:
        trace, parity = probe.record(u, variables=VARIABLES), probe.parity(u)
        with torch.no_grad():
            probed, state = layer(u)
    assert state is None
    assert error(probed, native) < 2e-6
    y, out = by_convolution(layer, u)
    assert error(trace["y"].sel(layer=0), y) < 2e-6
    assert error(trace["out"].sel(layer=0), out) < 2e-6
    assert all(float(parity[name].max()) < 2e-6 for name in parity.data_vars)
    assert {"out_vs_native", "out_vs_oracle", "delta", "B", "C"} <= set(parity.data_vars)
    np.testing.assert_array_equal(trace["u"].sel(layer=0), u)
    np.testing.assert_array_equal(trace["x"].sel(layer=0), u)
    with torch.no_grad():
        assert torch.equal(layer(u)[0], native), "detached"


def test_its_constants_have_no_token_and_its_states_follow_the_recurrence(layer):
    with mp.attach(layer) as probe:
        trace = probe.record(hidden(), variables=VARIABLES)
    assert (trace.attrs["family"], trace.attrs["discretization"]) == ("s4d", "zoh")
    assert trace["delta"].dims == ("layer", "channel")
    assert all(trace[name].dims == ("layer", "channel", "state") for name in ("A", "B", "C", "A_bar", "B_bar"))
    A_bar, B_bar = (trace[name].values[0].astype(complex) for name in ("A_bar", "B_bar"))
    state = np.zeros_like(trace["h"].values[0, :, 0], dtype=complex)
    for t in range(trace.sizes["token"]):
        state = A_bar * state + B_bar * trace["x"].values[0, :, t, :, None]
        assert error(trace["h"].values[0, :, t], state) < 5e-6


def test_the_weights_alone_give_the_output_of_what_was_scanned(layer):
    with mp.attach(layer) as probe:
        trace, weights = probe.record(hidden(), variables=["y", "out"]), probe.weights()
    y = trace["y"].values[0].astype(np.float64)
    gelu = y * (1 + erf(y / np.sqrt(2))) / 2
    found = {name: weights[name].values[0] for name in map(str, weights.data_vars)}
    value, gate = (gelu @ found[f"glu_{half}"].T + found[f"glu_{half}_bias"] for half in ("value", "gate"))
    assert error(trace["out"].values[0], value * expit(gate)) < 2e-6
    np.testing.assert_array_equal(found["D"], layer.D.detach())
    assert set(found) == {
        "delta", "A", "B", "C", "D", "glu_value", "glu_gate", "glu_value_bias", "glu_gate_bias"
    }  # fmt: skip


def test_padding_on_the_left_is_not_there(layer):
    u = hidden()
    mask = torch.ones(u.shape[:2], dtype=torch.int64)
    mask[0, :5] = 0
    with mp.attach(layer) as probe:
        trace, parity = probe.record(u, mask, variables=["y", "out"]), probe.parity(u, mask)
    assert float(parity["out_vs_oracle"].max()) < 2e-6
    assert error(trace["out"].values[0, 0, 5:], by_convolution(layer, u[:1, 5:])[1][0]) < 2e-6
    assert np.isnan(trace["out"].values[0, 0, :5]).all()


def test_layers_of_a_model_are_numbered_in_order_whatever_their_layout(model):
    x = hidden(width=2)
    with torch.no_grad():
        native = model(x)
    with mp.attach(model) as probe:
        assert probe.layers == (0, 1, 2)
        assert "3 layers 0..2: s4d: 6 channels, state 3, no gate" in repr(probe)
        with probe.recording(variables=VARIABLES) as recorder, torch.no_grad():
            probed = model(x)
    assert error(probed, native) < 2e-6
    trace = recorder.dataset
    assert trace["u"].dims == trace["out"].dims == ("layer", "batch", "token", "model")
    assert dict(trace.sizes)["token"] == 21
    for number, each in enumerate(model.s4_layers):
        assert error(trace["out"].sel(layer=number), by_convolution(each, trace["u"].sel(layer=number))[1]) < 2e-6
    assert not error(trace["out"].sel(layer=0), trace["out"].sel(layer=1)) < 0.1
    with torch.no_grad():
        assert torch.equal(model(x), native)


def test_parity_and_jacobian_follow_the_layout():
    class Backbone(S4Model):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    found = []
    for transposed in (True, False):
        model = Backbone(transposed=transposed)
        model.encoder = nn.Linear(6, 6)
        perturbed(model)
        model.load_state_dict(found[0][1].state_dict() if found else model.state_dict())
        with mp.attach(model) as probe:
            parity = probe.parity(hidden())
            jacobian = probe.jacobian(hidden(), layer=1, query_tokens=[20], direction=np.eye(6)[2])
        assert all(float(parity[name].max()) < 2e-6 for name in parity.data_vars)
        found.append((jacobian["jacobian"].values, model))
    assert error(found[0][0], found[1][0]) < 1e-6
    assert found[0][0].shape == (3, 1, 6, 21)
    moved, step = [], 1e-3
    with torch.no_grad(), mp.attach(model) as probe, probe.recording(variables=["u"], layers=[1]) as recorder:
        model(hidden())
    u = recorder.dataset["u"].values[0].astype(np.float64)
    for sign in (1, -1):
        nudged = u.copy()
        nudged[:, 7, 2] += sign * step
        moved.append(by_convolution(model.s4_layers[1], nudged)[1][:, 20])
    assert error(found[1][0][:, 0, :, 7], (moved[0] - moved[1]) / (2 * step)) < 1e-4


def test_numbers_set_by_hand_stand_and_may_not_collide(model):
    for number, each in zip((4, 7, 9), model.s4_layers, strict=True):
        each.layer_idx = number
    with mp.attach(model) as probe:
        assert probe.layers == (4, 7, 9)
    model.s4_layers[1].layer_idx = 4
    with pytest.raises(ValueError, match=r"two mixers share a layer number .*s4_layers.1 is layer 4"):
        mp.attach(model)


def test_beside_our_blocks_it_has_a_group_of_its_own():
    model = nn.ModuleDict({"block": mp.blocks.S4DBlock(6, d_inner=6, d_state=3), "bare": S4D(6, 3)})
    with mp.attach(perturbed(model)) as probe:
        assert probe.groups == {"s4d: 6 channels, state 3": (0,), "s4d: 6 channels, state 3, no gate": (1,)}


def test_without_decay_it_sums_what_it_wrote(layer):
    with mp.attach(layer) as probe, probe.edit(mp.ablate("decay")):
        trace = probe.record(hidden(), variables=["x", "h", "B_bar"])
    written = trace["B_bar"].values[:, None, None].astype(complex) * trace["x"].values[..., None]
    assert error(trace["h"], written.cumsum(2)) < 2e-6


def test_what_it_has_not_is_refused_by_name(layer):
    with mp.attach(layer) as probe:
        with pytest.raises(ValueError, match=r"s4d layers have no z: nothing gates the scan of these\. Known"):
            probe.record(hidden(), variables=["x", "z"])
        with pytest.raises(ValueError, match="no delta_cumsum: delta is constant"):
            probe.record(hidden(), variables=["delta_cumsum"])
        for edit, why in {
            mp.ablate("conv"): "conv of layer 0 .s4d. does not exist",
            mp.ablate("gate"): "gate of layer 0 .s4d. does not exist",
            mp.freeze("delta"): "delta of layer 0 .s4d. is a constant weight",
            mp.ablate("B"): "B of layer 0 .s4d. is a constant weight",
        }.items():
            with pytest.raises(ValueError, match=rf"{why}.*Editable there: decay, x, y, h\."), probe.edit(edit):
                pass
    with pytest.raises(ValueError, match="needs complex A"):
        mp.attach(layer, backend="triton")


def test_a_bare_transposed_layer_is_refused_until_it_is_told_otherwise(layer, tmp_path):
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    loaded = mp.load(tmp_path / "model.safetensors")
    assert [adapter.layer for adapter in find_mixers(loaded)] == [0]
    with pytest.raises(ValueError, match=r"bare S4D takes \(batch, channel, token\): set layer.transposed = False"):
        mp.attach(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(hidden().mT)[0].mT, layer(hidden())[0]), "left as it was"
    (tmp_path / "config.json").write_text(json.dumps({"transposed": False}))
    assert isinstance(loaded, S4D)
    loaded.transposed = False
    for each in (loaded, mp.load(tmp_path)):
        with mp.attach(each) as probe:
            assert error(probe.record(hidden(), variables=["out"])["out"][0], by_convolution(layer, hidden())[1]) < 2e-6


def test_inspect_lists_what_it_can_record(layer):
    layers, variables = described(layer, 2, 10)
    assert [list(column.cells) for column in layers.columns] == [
        ["0"], [""], ["S4D"], ["s4d: 6 channels, state 3, no gate"], ["decay, x, y, h"]
    ]  # fmt: skip
    weighed = dict(zip(variables.columns[0].cells, variables.columns[-1].cells, strict=True))
    assert set(weighed) == set(VARIABLES)
    assert (weighed["delta"], weighed["h"]) == ("24 B", readable(8 * 2 * 10 * 6 * 3))
