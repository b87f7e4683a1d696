"""Releases of transformers that are known to be wrong are named when a checkpoint is loaded."""

import warnings

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.mamba2 import modeling_mamba2

from mamba_probe.formats.releases import KnownErrorWarning
from mamba_probe.loading import load


class MambaRMSNormGated(torch.nn.Module):
    """As up to 5.22: no groups."""

    def __init__(self, hidden_size, group_size=None, eps=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_that_takes_all_groups_together_is_warned_of(kit, groups, monkeypatch, tmp_path):
    kit.tiny("mamba2", n_groups=groups).save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_mamba2, "MambaRMSNormGated", MambaRMSNormGated)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(tmp_path)
    found = [str(one.message) for one in said if one.category is KnownErrorWarning]
    assert len(found) == groups - 1
    assert all("norms all groups of Mamba2Mixer as one, which 5.23 corrected" in text for text in found)


def test_this_release(kit, tmp_path):
    kit.tiny("mamba2", n_groups=2).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(tmp_path)
    assert [one.category for one in said] == ([] if kit.NORMS_BY_GROUP else [KnownErrorWarning])


@pytest.mark.parametrize("dropped", [True, False])
def test_a_norm_that_drops_the_token_axis_is_warned_of(dropped, kit, monkeypatch, tmp_path):
    """As Falcon-H1's up to 5.22: one token of several rows comes back without its axis, and the rows mix."""
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4}
    config = FalconH1Config(**sizes, **heads, mamba_d_state=4, mamba_n_groups=2, mamba_rms_norm=True)
    kit.perturb(FalconH1ForCausalLM(config)).save_pretrained(tmp_path)

    def forward(norm, hidden, gate=None):
        return hidden.squeeze(1) if dropped else hidden

    monkeypatch.setattr(modeling_falcon_h1.FalconH1RMSNormGated, "forward", forward)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(tmp_path)
    found = [str(one.message) for one in said if one.category is KnownErrorWarning]
    assert len(found) == dropped
    assert all("mixes the rows of a batch at single tokens, as in generate(), in FalconH1Mixer" in one for one in found)
