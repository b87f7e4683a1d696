"""Effective remembrance: against separate runs of each shortened row, a model of known reach, and refusals."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.blocks import LanguageModel, MambaBlock
from mamba_probe.remembrance import remembrance


def prompt(length=14, padded=0):
    ids = torch.randint(1, 61, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return ids, mask


def by_hand(model, row, start, query):
    """q(. | x[start:query + 1]) of one row alone, in numpy."""
    with torch.no_grad():
        logits = model(row[None, start : query + 1]).logits[0, -1].double().numpy()
    q = np.exp(logits - logits.max())
    return q / q.sum()


@pytest.mark.parametrize("padded", [0, 4])
def test_it_is_the_distance_of_separate_runs(build, padded):
    model = build()
    ids, mask = prompt(padded=padded)
    rows, queries, starts = [ids[0, padded:], ids[1], ids[2]], [8, 9, 9], [0, 1, 3, 8]
    with mp.attach(model) as probe:
        found = remembrance(probe, ids, mask, starts=starts, queries=queries)
        again = remembrance(probe, ids, mask, starts=starts, queries=queries, batch_size=1)
        expected, others = np.full((2, 3, 4), np.nan)
        for i, (row, at) in enumerate(zip(rows, queries, strict=True)):
            for j, start in enumerate(starts):
                whole = by_hand(model, row, 0, at)
                expected[i, j] = np.abs(whole - by_hand(model, row, start, at)).sum() / 2
                other = next((k for k in ((i + 1) % 3, (i + 2) % 3) if queries[k] >= at - start), None)
                alike = by_hand(model, rows[other], queries[other] - at + start, queries[other])
                others[i, j] = np.abs(whole - alike).sum() / 2
    np.testing.assert_allclose(found["remembrance"], expected, atol=1e-6)
    np.testing.assert_allclose(found["null_other_row"], others, atol=1e-6)
    np.testing.assert_allclose(again["remembrance"], found["remembrance"], atol=1e-6)
    assert (found["remembrance"].sel(start=0) == 0).all()
    with mp.attach(model) as probe:
        longest = remembrance(probe, ids, mask, starts=[0, 2], queries=[8, 9, 7])["null_other_row"].values
        lone = remembrance(probe, ids[:1], starts=[0])["null_other_row"].values
    assert np.isnan(longest).tolist() == [[False, False], [True, False], [False, False]]
    assert np.isnan(lone).all()
    assert found["remembrance"].sel(start=8).min() > 0.01, "all that came before the query is gone"
    assert found["position"].values[0, :5].tolist() == ([-1] * 4 + [0] if padded else [0, 1, 2, 3, 4])
    assert found["query_position"].values.tolist() == queries
    assert found.attrs["kind"] == "remembrance"
    assert found["remembrance"].attrs["units"] == "1"


def test_a_model_that_sees_four_tokens_remembers_nothing_else():
    """C = 0: the scan is silent, and D x reaches back as far as the convolution's four taps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LanguageModel([MambaBlock(8, d_state=2)], vocab_size=61).double().eval()
    with torch.no_grad():
        model.backbone.layers[0].mixer.x_proj.weight[-2:] = 0
        model.lm_head.weight *= 20
    ids, _ = prompt()
    with mp.attach(model) as probe:
        found = remembrance(probe, ids)
    starts = found["start"].values
    assert starts.tolist() == [0, 1, 2, 4, 5, 8, 9, 11, 12, 13]
    seen = found["remembrance"].values
    assert seen[:, starts <= 10].max() < 1e-12
    assert seen[:, starts > 10].min() > 1e-4


def test_what_is_remembered_of_a_pair_goes_with_it():
    """Recall: the answer stands until the tokens removed reach its pair."""
    task = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=256, seed=3)
    asked = np.array([np.flatnonzero(row == "query")[-1] for row in task.role])
    source = task.source_token[np.arange(4), asked]
    with mp.attach(mp.load("zoo:trained-mqar-mamba1")) as probe:
        found = remembrance(probe, task, starts=range(20), queries=asked)["remembrance"].values
    for row, at in zip(found, source, strict=True):
        assert row[: at - 1].max() < 0.2
        assert row[at + 1 :].min() > 0.8


def test_wrong_requests_are_refused(build):
    ids, mask = prompt(padded=4)
    with mp.attach(build()) as probe:
        cases = [
            ({"starts": [10]}, r"starts must lie in 0 \.\. 9, the earliest query, which is never removed; got \[10\]"),
            ({"starts": []}, "starts is a non-empty list of distinct positions"),
            ({"starts": [1, 1]}, "distinct positions"),
            ({"queries": [10, 9, 9]}, r"queries: row 0 has positions 0 \.\. 9; got 10"),
            ({"queries": [1, 2]}, r"queries needs one position, or one a row, \(batch = 3,\)"),
            ({"batch_size": 0}, "batch_size is at least 1 and a whole number; got 0"),
        ]
        for given, text in cases:
            with pytest.raises(ValueError, match=text):
                remembrance(probe, ids, mask, **given)
        with probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match="starts from the unedited probe"):
            remembrance(probe, ids)
        with probe.recording(variables=["delta"]), pytest.raises(ValueError, match="a recording is open"):
            remembrance(probe, ids)
        both = {"input_ids": ids, "labels": ids}
        with pytest.raises(ValueError, match="remembrance removes tokens from input_ids or inputs_embeds, given alone"):
            remembrance(probe, both)
    with mp.attach(MambaBlock(8)) as probe, pytest.raises(ValueError, match="removes tokens from input_ids"):
        remembrance(probe, torch.ones(1, 5, 8))
    model = build()
    with mp.attach(model.backbone) as probe, pytest.raises(ValueError, match="gives no logits"):
        remembrance(probe, ids)
