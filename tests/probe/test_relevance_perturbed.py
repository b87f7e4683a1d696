"""Tokens taken away by relevance: against a loop that edits the embedding table's output, and refusals."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock
from mamba_probe.relevance import perturbed, relevance

LENGTH = 11


def model_of(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel([MambaBlock(8, d_state=4), Mamba2Block(8, n_heads=4, d_state=4)], vocab_size=37).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 37, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def by_loop(model, ids, mask, found, row, query, count, *, replacement, own):
    """Probability of one row's target without its `count` most relevant tokens."""
    at, target = int(found["query_token"][row, query]), int(found["target_id"][row, query])
    R = found["relevance"].values[row, query]
    may = [token for token in range(at + own) if mask[row, token]]
    gone = sorted(may, key=lambda token: -R[token])[:count]
    vector = 0.0 if replacement == "zero" else model.get_input_embeddings().weight[replacement].detach()

    def cut(_module, _args, embedded):
        embedded = embedded.clone()
        embedded[0, gone] = vector
        return embedded

    handle = model.get_input_embeddings().register_forward_hook(cut)
    with torch.no_grad():
        logits = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0, at]
    handle.remove()
    return logits.softmax(-1)[target].item()


@pytest.mark.parametrize(("replacement", "own"), [("zero", False), (5, True)])
def test_curves_are_those_of_a_loop_over_rows_and_counts(replacement, own):
    model, (ids, mask) = model_of(), prompt()
    with mp.attach(model) as probe:
        found = relevance(probe, ids, mask, tokens=[4, 8])
        plain = relevance(probe, ids, mask, tokens=[4, 8], rules="gradient")
        options = {"replacement": replacement, "own": own, "n_random": 0}
        taken = perturbed(probe, found, plain, batch_size=2, **options)
    assert taken["order"].values.tolist() == ["mambalrp", "gradient"]
    assert taken["count"].values.tolist() == ([0, 1, 2, 4, 8, 9] if own else [0, 1, 2, 4, 8])
    for order, each in (("mambalrp", found), ("gradient", plain)):
        for place in np.ndindex(3, 2):
            curve = taken["probability"].sel(order=order).values[place]
            for count, value in zip(taken["count"].values, curve, strict=True):
                want = by_loop(model, ids, mask, each, *place, count, replacement=replacement, own=own)
                assert abs(value - want) < 1e-12
            assert abs(taken["area"].sel(order=order).values[place] - curve[1:].mean()) < 1e-12


def test_random_orders_are_of_the_seed_and_end_where_all_orders_end():
    model, (ids, mask) = model_of(), prompt()
    with mp.attach(model) as probe:
        found = relevance(probe, ids, mask)
        one, same, other = (perturbed(probe, found, n_random=3, seed=seed)["probability"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.values, same.values)
    assert np.abs(one.sel(order="random") - other.sel(order="random")).values.max() > 1e-6
    for count in (one["count"].values[0], one["count"].values[-1]):
        apart = one.sel(order="random", count=count) - one.sel(order="mambalrp", count=count)
        assert np.abs(apart.values).max() < 1e-12


def test_forwards_grow_with_the_logarithm_of_the_tokens():
    forwards = {}
    for length in (16, 64):
        model = model_of()
        ids = torch.randint(0, 37, (2, length), generator=torch.Generator().manual_seed(0))
        calls = []
        with mp.attach(model) as probe:
            handle = model.lm_head.register_forward_hook(lambda *_args, c=calls: c.append(1))
            found = relevance(probe, ids)
            assert len(calls) == 1, "one forward, however long"
            perturbed(probe, found, n_random=2)
            handle.remove()
        forwards[length] = len(calls) - 1
    assert forwards == {16: 3 * 6, 64: 3 * 8}


def test_wrong_requests_are_refused():
    model, (ids, mask) = model_of(), prompt()
    with mp.attach(model) as probe:
        found = relevance(probe, ids, mask)
        asks = {
            "takes what relevance.* returned; got dict": ({},),
            "two Datasets have rules 'mambalrp'": (found, found),
            "the Datasets differ in target_id": (found, relevance(probe, ids, mask, target=3, rules="gradient")),
            "query 0 of row 0 is its first token": (relevance(probe, ids, tokens=[0]),),
        }
        for match, given in asks.items():
            with pytest.raises(ValueError, match=match):
                perturbed(probe, *given)
        with pytest.raises(ValueError, match=r"a token id, is in 0 \.\. 36 and a whole number; got 37"):
            perturbed(probe, found, replacement=37)
        with pytest.raises(ValueError, match="n_random is at least 0 and a whole number; got -1"):
            perturbed(probe, found, n_random=-1)
    with mp.attach(model_of(seed=1)) as probe, pytest.raises(ValueError, match="relevance is of another model"):
        perturbed(probe, found)
