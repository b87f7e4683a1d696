"""Edits of a model whose weights are written down move its answers exactly as its mathematics says."""

import pytest
import torch

import mamba_probe as mp

IDS = torch.tensor([[1, 6, 2, 7, 1, 2]])
"""Keys 1 and 2 with the values 6 and 7, then both keys asked."""
VALUES, QUERIES = [1, 3], [4, 5]


@pytest.fixture(params=["mamba1", "mamba2"])
def model(request):
    return mp.constructions.mqar(mixer=request.param, n_keys=4, n_values=4).model


def answers(model):
    """The largest logit at each query, and whose it is."""
    with torch.no_grad():
        top = model(IDS).logits[0, QUERIES].max(-1)
    return top.indices.tolist(), top.values


def test_b_of_two_pairs_swapped_swaps_their_values(model):
    with mp.attach(model) as probe:
        _, cache = probe.run_with_cache(IDS, names_filter="blocks.0.mixer.hook_B")
        native, logits = answers(model)
        B = cache["B", 0].reshape(1, len(IDS[0]), 1, -1)
        with probe.edit(mp.assign("B", B[:, VALUES[::-1]], layer=0, token=VALUES)):
            swapped, other = answers(model)
    assert native == [6, 7]
    assert swapped == [7, 6]
    torch.testing.assert_close(other, logits)


def test_a_gate_cut_at_a_query_takes_that_answer_alone(model):
    with mp.attach(model) as probe:
        native, logits = answers(model)
        with probe.edit(mp.zero("z", layer=0, token=QUERIES[0])):
            cut, other = answers(model)
            with torch.no_grad():
                assert not model(IDS).logits[0, QUERIES[0]].any(), "nothing is said there"
    assert cut[1] == native[1]
    torch.testing.assert_close(other[1], logits[1])


def test_a_decay_of_0_forgets_the_pairs_before_it_and_of_1_keeps_all(model):
    with mp.attach(model) as probe:
        _, logits = answers(model)
        with probe.edit(mp.assign("A_bar", 0.0, layer=0, token=VALUES[1])):
            _, forgotten = answers(model)
        with probe.edit(mp.assign("A_bar", 1.0, layer=0)):
            kept, _ = answers(model)
    torch.testing.assert_close(forgotten, torch.tensor([0.0, 1.0]) * logits)
    assert kept == [6, 7]
