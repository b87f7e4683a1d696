"""Induction heads that cannot forget: S4D counts what followed a token, and the most frequent wins."""

import numpy as np
import pytest
import torch

from mamba_probe.constructions import induction


def agrees(correct, noted, z=3.0):
    """Whether `noted` is in Wilson's score interval of z standard deviations."""
    total, p = correct.size, correct.mean()
    centre, half = p + z**2 / (2 * total), z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return (centre - half) / (1 + z**2 / total) <= noted <= (centre + half) / (1 + z**2 / total)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def heads(request):
    return {kind: induction(kind, "s4d", 16, dtype=request.param) for kind in ("special", "every")}


@pytest.mark.parametrize("length", [64, 256])
def test_one_earlier_occurrence_is_answered(length, heads, tool):
    ids, target = tool.after_special(16, length, 1, batch=16)
    logits = tool.logits_of(heads["special"], ids, rows=16)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) >= 0.999


@pytest.mark.parametrize(("length", "occurrences", "noted"), [(256, 4, 0.469), (1024, 8, 0.125)])
def test_more_occurrences_are_not(length, occurrences, noted, heads, tool):
    ids, target = tool.after_special(16, length, occurrences, batch=32)
    predicted = tool.logits_of(heads["special"], ids, rows=16).argmax(-1)
    correct = (predicted == target)[target >= 0]
    assert correct.mean() < 0.7
    assert agrees(correct, noted)
    for row, answer in zip(ids, predicted[:, -1], strict=True):
        count = np.bincount(row[1:][row[:-1] == 0], minlength=16)
        assert count[answer] == count.max(), "the most frequent wins"


@pytest.mark.parametrize(("length", "noted", "batch"), [(64, 0.582, 8), (512, 0.242, 1)])
def test_random_tokens_are_answered_where_the_newest_is_the_most_frequent(length, noted, batch, heads, tool):
    ids, target = tool.successors(16, length, batch)
    correct = (tool.logits_of(heads["every"], ids).argmax(-1) == target)[target >= 0]
    assert agrees(correct, noted)
    assert correct.mean() < 0.75


@pytest.mark.parametrize("length", [64, 512])
def test_a_successor_that_is_always_the_same_is_answered(length, heads, tool):
    """A cycle through all tokens, and one that holds tokens after themselves."""
    cycle = np.random.default_rng(0).permutation(16)
    ids = np.stack([np.tile(cycle, length // 16), np.tile(cycle[:8], length // 8)])
    target = np.where(np.arange(length) >= [[16], [8]], np.roll(ids, -1, axis=1), -1)
    logits = tool.logits_of(heads["every"], ids)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) >= 0.999


def test_it_counts(evaluate_lm, tool):
    """Up to the last norm, a logit is twice the count of a successor, plus one for the token at hand."""
    construction = induction("every", "s4d", 5, dtype=torch.float64)
    ids, _ = tool.successors(5, 30, batch=2)
    logits = evaluate_lm(construction.model, ids)
    for row, tokens in enumerate(ids):
        count = np.zeros((5, 5))
        for t, token in enumerate(tokens):
            if t:
                count[tokens[t - 1], token] += 1
            plain = 2 * count[token] + np.eye(5)[token]
            scale = np.sqrt((5 / 5 + 1e-5) / ((plain**2).sum() / 5 + 1e-5))  # of the last norm, undone for one count
            assert logits[row, t] == pytest.approx(plain * scale, abs=1e-4)
    assert np.abs(logits - tool.logits_of(construction, ids)).max() < 1e-12


@pytest.mark.parametrize("special", [0, 3])
def test_any_token_can_be_the_special_one(special, tool):
    ids, target = tool.after_special(7, 40, 1, batch=8, special=special)
    construction = induction("special", "s4d", 7, special=special)
    assert tool.share(tool.logits_of(construction, ids, rows=8).argmax(-1), target) == 1


def test_a_token_after_itself_is_found(tool):
    ids, target = np.array([[2, 2, 4, 1, 3, 3]]), np.array([[-1, 2, -1, -1, -1, 3]])
    assert tool.share(tool.logits_of(induction("every", "s4d", 5), ids).argmax(-1), target) == 1


@pytest.mark.parametrize("kind", ["special", "every"])
def test_randomised_twin_fails(kind, tool):
    ids, target = tool.successors(16, 64, 8) if kind == "every" else tool.after_special(16, 64, 1, batch=32)
    logits = tool.logits_of(induction(kind, "s4d", 16).randomised(1), ids, rows=32)
    assert tool.share(logits.argmax(-1), target) < 0.3


def test_channels_are_pairs_of_tokens():
    construction = induction("every", "s4d", 3)
    assert construction.channels == [f"token {j} after token {i}" for i in range(3) for j in range(3)]
    assert construction.sizes == {"model": 3, "channel": 9, "state": 1}
    assert induction("special", "s4d", 3, special=2).channels == [f"token {j} after token 2" for j in range(3)]
