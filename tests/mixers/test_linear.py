"""Projections that are no plain Linear: LoRA around them, and what is not linear at all."""

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

import mamba_probe as mp
from mamba_probe.mixers.linear import affine


class LoRA(nn.Module):
    """As peft's: the base layer, and beside it dropout, two thin matrices and a scale; `weight` is the base's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.dropout = nn.Dropout(0.5)
        self.lora_A, self.lora_B = (
            nn.Linear(base.in_features, 3, bias=False),
            nn.Linear(3, base.out_features, bias=False),
        )

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, u):
        return self.base_layer(u) + 2.0 * self.lora_B(self.lora_A(self.dropout(u)))

    def merged(self):
        return self.base_layer.weight + 2.0 * self.lora_B.weight @ self.lora_A.weight


class Rounded(nn.Linear):
    """Rounds what it is given, as kernels do that quantise activations."""

    def forward(self, u):
        scale = u.abs().max() / 7 + 1e-9
        return super().forward(torch.round(u / scale) * scale)


MODELS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=24, state_size=5, num_hidden_layers=2)),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=31, hidden_size=24, state_size=8, num_hidden_layers=2, num_heads=6, head_dim=8, n_groups=2
        )
    ),
}
WRAPPED = {"mamba": ("in_proj", "x_proj", "out_proj", "dt_proj"), "mamba2": ("in_proj", "out_proj")}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for layer in model.backbone.layers:
        for name in WRAPPED[kind]:
            setattr(layer.mixer, name, LoRA(getattr(layer.mixer, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_a_probed_model_with_lora_is_the_model_and_the_oracle(model, known_wrong):
    ids = torch.randint(0, 31, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        native = model(ids).logits
    with mp.attach(model) as probe:
        parity = probe.parity(ids)
        with torch.no_grad():
            assert (model(ids).logits - native).abs().max() < 2e-5 * native.abs().max()
    assert float(parity["out_vs_native"].max()) < 2e-6
    assert (parity["out_vs_oracle"] > 1e-4).all() if known_wrong(model) else (parity["out_vs_oracle"] < 2e-6).all()


def test_weights_are_those_that_act(kind, model):
    with mp.attach(model) as probe:
        weights = probe.weights()
    for index, layer in enumerate(model.backbone.layers):
        merged = layer.mixer.out_proj.merged().detach()
        found = torch.from_numpy(weights.out_proj.isel(layer=index).values).flatten(1)
        assert (found - merged).abs().max() < 1e-6
        if kind == "mamba":
            x_proj = layer.mixer.x_proj.merged().detach()
            rank = weights.sizes["rank"]
            found = torch.from_numpy(weights.x_proj_B.isel(layer=index).values)
            assert (found - x_proj[rank : rank + 5]).abs().max() < 1e-6
            assert torch.equal(  # the library takes the base's weight and never calls the module
                torch.from_numpy(weights.dt_proj.isel(layer=index).values), layer.mixer.dt_proj.weight.detach()
            )


def test_dropout_is_out_of_it_and_the_mode_is_restored():
    torch.manual_seed(0)
    wrapped = LoRA(nn.Linear(7, 5)).train()
    W, b = affine(wrapped, torch.ones(1))
    assert (W - wrapped.merged()).abs().max() < 1e-6
    assert torch.allclose(b, wrapped.bias)
    assert wrapped.training
    assert wrapped.dropout.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_asked_in_the_dtype_of_the_mixer(dtype):
    torch.manual_seed(0)
    wrapped = LoRA(nn.Linear(7, 5, bias=False)).to(dtype)
    W, b = affine(wrapped, torch.ones(1, dtype=dtype))
    assert W.dtype == dtype
    assert b is None
    assert (W - wrapped.merged()).abs().max() <= 4 * torch.finfo(dtype).eps * W.abs().max()


def test_what_is_not_linear_is_refused_by_name_and_still_recorded():
    torch.manual_seed(0)
    model = MODELS["mamba"]().eval()
    mixer = model.backbone.layers[1].mixer
    rounded = Rounded(24, mixer.in_proj.out_features, bias=False)
    rounded.load_state_dict(mixer.in_proj.state_dict())
    mixer.in_proj = rounded
    ids = torch.arange(12)[None]
    with mp.attach(model) as probe:
        assert probe.record(ids).sizes["token"] == 12
        with pytest.raises(ValueError, match="a Rounded does not act by a matrix"):
            probe.weights()
