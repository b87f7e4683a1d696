"""Edits act in every step of generate(): as a model whose weights were changed by hand, and as whole forwards do."""

import copy

import numpy as np
import pytest
import torch

import mamba_probe as mp

IDS = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(9))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
VARIABLES = ("delta", "B", "C", "h", "delta_cumsum", "A_bar", "y")
GREEDY = {"do_sample": False, "attention_mask": MASK, "pad_token_id": 0}


@pytest.fixture
def own(build, family):
    """Mamba-2's decoding does not clamp delta, as the library's: here that makes no difference."""
    model = build() if family == "mamba" else build(time_step_limit=(0.0, float("inf")))
    model.generation_config.eos_token_id = None
    return model


def recorded(model, *edits):
    """What `generate` gave under the edits, and the trace of it."""
    with mp.attach(model) as probe, probe.edit(*edits), probe.recording(variables=VARIABLES) as recorder:
        produced = model.generate(IDS, **GREEDY, max_new_tokens=9)
    return produced, recorder.dataset


def with_delta(model, value):
    """The twin whose weights hold delta at `value`."""
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            bias = np.log(np.expm1(value))
            if hasattr(mixer, "dt_proj"):
                mixer.dt_proj.weight.zero_()
                mixer.dt_proj.bias.fill_(bias)
            else:
                mixer.in_proj.weight[-mixer.num_heads :].zero_()
                mixer.dt_bias.fill_(bias)
    return model


def without_decay(model):
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.A_log.fill_(-80.0)
    return model


def without_skip_of_c(model):
    """C is zero: what is read is D x alone, as where the state is never written."""
    with torch.no_grad():
        for block in model.backbone.layers:
            mixer = block.mixer
            if hasattr(mixer, "x_proj"):
                mixer.x_proj.weight[-mixer.ssm_state_size :].zero_()
            else:
                n = mixer.n_groups * mixer.ssm_state_size
                mixer.conv1d.weight[-n:].zero_()
                mixer.conv1d.bias[-n:].zero_()
    return model


@pytest.mark.parametrize(
    ("edit", "by_weights"),
    [
        (mp.freeze("delta", value=0.3), lambda model: with_delta(model, 0.3)),
        (mp.ablate("decay"), without_decay),
        (mp.ablate("C"), without_skip_of_c),
    ],
)
def test_an_edit_acts_in_every_step(own, edit, by_weights):
    native = own.generate(IDS, **GREEDY, max_new_tokens=9)
    twin, expected = recorded(by_weights(copy.deepcopy(own)))
    produced, trace = recorded(own, edit)
    assert (produced == twin).all()
    assert (produced != native).any()
    assert trace.attrs["edits"] == repr(edit)
    for name in VARIABLES:
        scale = abs(expected[name]).max()
        assert float(abs(trace[name] - expected[name]).max()) <= 2e-5 * max(scale, 1e-6), name
    with mp.attach(own) as probe, probe.edit(edit):
        mask = torch.cat([MASK, torch.ones(3, 9, dtype=torch.long)], 1)
        whole = probe.record(produced, mask, variables=["delta"])["prediction"].values
    assert (whole[:, IDS.shape[1] - 1 : -1] == produced[:, IDS.shape[1] :].numpy()).all()


def test_a_mean_over_tokens_needs_a_sequence_also_while_generating(own):
    with (
        mp.attach(own) as probe,
        probe.edit(mp.freeze("B")),
        pytest.raises(ValueError, match=r"one token \(a decoding step\?\): pass value="),
    ):
        own.generate(IDS, **GREEDY, max_new_tokens=3)
