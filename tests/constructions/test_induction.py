"""Induction heads: what followed this token the last time."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import induction

MIXERS = ["mamba1", "mamba2"]
KINDS = [(kind, mixer) for kind in ("special", "every") for mixer in MIXERS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_token_finds_its_successor(mixer, length, dtype, tool):
    ids, target = tool.successors(16, length, batch=2)
    logits = tool.logits_of(induction("every", mixer, 16, dtype=dtype), ids)
    assert (target >= 0).sum() > 0.7 * target.size
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) >= 0.999


@pytest.mark.parametrize(("length", "occurrences"), [(64, 1), (256, 1), (256, 4), (1024, 8)])
@pytest.mark.parametrize("mixer", MIXERS)
def test_special_token_finds_its_last_successor(mixer, length, occurrences, tool):
    ids, target = tool.after_special(16, length, occurrences, batch=8)
    logits = tool.logits_of(induction("special", mixer, 16), ids, rows=8)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) >= 0.9


@pytest.mark.long
@pytest.mark.parametrize("mixer", MIXERS)
def test_special_token_of_long_ago(mixer, tool):
    ids, target = tool.after_special(16, 16384, 4, batch=1)
    assert tool.share(tool.logits_of(induction("special", mixer, 16), ids).argmax(-1), target) == 1


@pytest.mark.long
def test_more_tokens(tool):
    ids, target = tool.successors(32, 512, batch=1)
    assert tool.share(tool.logits_of(induction("every", "mamba1", 32), ids).argmax(-1), target) == 1


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("n_tokens", [2, 7])
def test_other_sizes(mixer, n_tokens, tool):
    ids, target = tool.successors(n_tokens, 40, batch=4)
    assert tool.share(tool.logits_of(induction("every", mixer, n_tokens), ids).argmax(-1), target) == 1
    ids, target = tool.after_special(n_tokens, 40, 3, batch=4, special=1)
    assert tool.share(tool.logits_of(induction("special", mixer, n_tokens, special=1), ids).argmax(-1), target) == 1


@pytest.mark.parametrize(("kind", "mixer"), KINDS)
def test_numpy_recurrence_agrees(kind, mixer, evaluate_lm, tool):
    ids, target = tool.successors(5, 40, batch=2) if kind == "every" else tool.after_special(5, 40, 3, batch=2)
    construction = induction(kind, mixer, 5, dtype=torch.float64)
    exact = evaluate_lm(construction.model, ids)
    assert tool.share(exact.argmax(-1), target) == 1
    assert np.abs(exact - tool.logits_of(construction, ids)).max() < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_are_two_for_the_successor_and_one_for_the_token(mixer, evaluate_lm, tool):
    ids, target = tool.successors(6, 30, batch=2)
    logits = evaluate_lm(induction("every", mixer, 6, dtype=torch.float64).model, ids)
    asked = (target >= 0) & (target != ids)
    asked[:, 0] = False
    assert np.abs(logits[asked] - 2 * np.eye(6)[target[asked]] - np.eye(6)[ids[asked]]).max() < 1e-10


def test_mamba2_needs_its_first_layer(tool):
    """Without the previous token in the features, no head is told to write."""
    ids, target = tool.successors(16, 64, batch=2)
    construction = induction("every", "mamba2", 16)
    with torch.no_grad():
        construction.model.backbone.layers[0].mixer.D.zero_()
    assert tool.share(tool.logits_of(construction, ids).argmax(-1), target) < 0.3


def test_keeping_more_than_half_lets_older_tokens_win(tool):
    ids, target = tool.after_special(3, 256, 40, batch=32)
    construction = induction("special", "mamba2", 3)
    assert tool.share(tool.logits_of(construction, ids, rows=32).argmax(-1), target) == 1
    with torch.no_grad():
        construction.model.backbone.layers[0].mixer.A_log.fill_(-5)  # the special token leaves 0.99 of the memory
    assert tool.share(tool.logits_of(construction, ids, rows=32).argmax(-1), target) < 0.9


@pytest.mark.parametrize(("kind", "mixer"), KINDS)
def test_randomised_twin_fails(kind, mixer, tool):
    ids, target = tool.successors(16, 64, batch=8) if kind == "every" else tool.after_special(16, 64, 3, batch=32)
    logits = tool.logits_of(induction(kind, mixer, 16).randomised(1), ids, rows=32)
    assert tool.share(logits.argmax(-1), target) < 0.3


def test_two_layers_describe_their_channels():
    construction = induction("every", "mamba2", 5)
    assert "model=10, channel=30, state=1, head=5, layer=2" in repr(construction)
    assert construction.channels[:6] == [f"previous token {token}" for token in range(5)] + ["padding"]
    assert construction.channels[30:36] == [f"token {token} after token 0" for token in range(5)] + ["padding"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "all"}, 'kind=\'all\' is not supported; use one of "special", "every"'),
        ({"mixer": "s4"}, "mixer='s4' is not supported; did you mean 's4d'"),
        ({"n_tokens": 1}, r"n_tokens >= 2 \(got 1\)"),
        ({"kind": "special", "special": 16}, r"0 <= special < n_tokens \(got special = 16, n_tokens = 16\)"),
        ({"special": 3}, 'special=3 goes with kind="special" alone'),
        ({"dtype": torch.float16}, "got torch.float16"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        induction(**arguments)


def test_impossible_tokens():
    with pytest.raises(ValueError, match=r"induction: input_ids must be in \[0, 4\), got \[4, 4\]"):
        induction(n_tokens=4).inputs(np.full((1, 3), 4))
