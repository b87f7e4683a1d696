"""Parity says where probe, library and oracle part, and who is wrong there."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

import mamba_probe as mp
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers import tap
from mamba_probe.parity import parting

IDS = torch.randint(0, 31, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def said(model):
    with mp.attach(model) as probe:
        return probe.parity(IDS).attrs["parting"]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, "2e-06"), (torch.float64, "2e-06"), (torch.bfloat16, "0.03")]
)
def test_where_nothing_parts_it_says_so(model, dtype, bound):
    """transformers rounds A and the bias of delta to float32 in a float64 model too."""
    assert said(model.to(dtype)) == f"nowhere: every error is at most {bound}"


def test_a_wrong_library_is_named_with_its_layers(model, monkeypatch):
    original = modeling_mamba.mamba_selective_scan

    def wrong(*args, **options):
        return 1.1 * original(*args, **options)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", wrong)
    text = said(model)
    assert text.count("the library is wrong here") == 2
    assert "layer 0: out of the library is" in text
    assert "layer 1: out of the library is" in text


def test_a_wrong_probe_is_named_with_its_quantity(model, monkeypatch):
    def wrong(x, delta, *args, **options):
        return selective_scan(x, delta + 0.01, *args, **options)

    monkeypatch.setattr(tap, "selective_scan", wrong)
    text = said(model)
    assert text.count("the probe is wrong here") == 2
    assert text.count("delta of the probe is") == 2


def test_both_may_be_wrong_and_rounding_of_the_two_may_add_up():
    both = {0: {"out_vs_native": 1e-7, "out_vs_oracle": 0.2, "native_vs_oracle": 0.3}}
    assert parting(both, 1e-6).endswith("out of the probe 0.2: both are here")
    apart = {4: {"out_vs_native": 1.5e-6, "out_vs_oracle": 9e-7, "native_vs_oracle": 9e-7}}
    assert parting(apart, 1e-6) == "layer 4: out of the probe is 1.5e-06 from the library's"
