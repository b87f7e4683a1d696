"""Standalone S4D layers, against the convolution of `s4d.py` in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba_probe.formats.s4d import S4D
from mamba_probe.loading import load


@pytest.fixture
def source(kit):
    return kit.perturb(S4D(6, 3))


def convolution(weights, u):
    """The layer by its kernel of all lags, summed lag by lag; u is (batch, channel, token)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    A = torch.complex(-w["kernel.log_A_real"].exp(), w["kernel.A_imag"])
    step = A * w["kernel.log_dt"].exp()[:, None]
    C = torch.view_as_complex(w["kernel.C"]) * (step.exp() - 1) / A
    n_token = u.shape[-1]
    lags = torch.stack([2 * (C * (step * lag).exp()).sum(-1).real for lag in range(n_token)], -1)
    y = torch.stack([(lags[:, : t + 1].flip(-1) * u[..., : t + 1]).sum(-1) for t in range(n_token)], -1)
    mixed = torch.einsum("oc,bct->bot", w["output_linear.0.weight"][..., 0], F.gelu(y + u * w["D"][:, None]))
    value, gate = (mixed + w["output_linear.0.bias"][:, None]).chunk(2, 1)
    return value * gate.sigmoid()


@pytest.mark.parametrize("file", ["s4d.pt", "model.safetensors"])
def test_no_config_is_needed(kit, source, file, tmp_path):
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    kit.write(tmp_path, {}, weights, "model.safetensors")
    torch.save(weights, tmp_path / "s4d.pt")
    (tmp_path / "config.json").unlink()
    layer = load(tmp_path / file)
    assert (type(layer), layer._mamba_probe_source["format"], layer.training) == (S4D, "s4d", False)
    u = torch.randn(2, 6, 13, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, state = layer(u)
        assert torch.equal(output, source(u)[0])
    assert state is None
    expected = convolution(weights, u.double())
    assert (output - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_tokens_before_channels(kit, source, tmp_path):
    kit.write(tmp_path, {"d_model": 6, "d_state": 6, "transposed": False, "dropout": 0.1}, source.state_dict())
    layer = load(tmp_path)
    u = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(layer(u.mT)[0], source(u)[0].mT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 5}, r"d_model=5 is not supported, only 6 is: it is what the weights have"),
        ({"d_state": 3}, r"d_state=3 is not supported, only 6 is"),
        ({"d_sate": 6}, r"d_sate is unknown; did you mean d_state"),
    ],
)
def test_a_config_that_contradicts_the_weights(kit, source, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(kit.write(tmp_path, config, source.state_dict()))


def test_every_difference_is_named(kit, source, tmp_path):
    weights = dict(source.state_dict()) | {"kernel.B": torch.ones(2), "D": torch.ones(3)}
    del weights["output_linear.0.bias"]
    with pytest.raises(
        ValueError, match=r"missing output_linear.0.bias .*\n  unexpected kernel.B .*\n  shape of D: expected"
    ):
        load(kit.write(tmp_path, {}, weights))


def test_other_weights_without_a_config(kit, tmp_path):
    kit.write(tmp_path, {}, {"w": torch.ones(2)})
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no config.json, and the weights start with \['w'\]: only a stand"
    ):
        load(tmp_path)
