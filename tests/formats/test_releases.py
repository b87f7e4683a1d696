"""Releases of transformers that are known to be wrong are named when a checkpoint is loaded."""

import warnings

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2

from mamba_probe.formats.releases import KnownErrorWarning
from mamba_probe.load import load


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
