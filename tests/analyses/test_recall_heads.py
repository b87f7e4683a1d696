"""Induction by layer and head on repeated random tokens: loops, constructions, chance, padding, words."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit

VARIABLES = ("delta", "A", "B", "C", "x", "z")
TASK = mp.tasks.repeated_tokens(batch=4, period=12, vocab=16, seed=2)


def recorded(model, task=TASK, **options):
    with mp.attach(model) as probe:
        return probe.record(task, variables=VARIABLES, **options)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "s4d"])
def test_the_constructions_heads_read_what_followed(mixer):
    trace = recorded(mp.constructions.induction("every", mixer, 16).model)
    found = recall_circuit.induction_heads(trace)
    head = found.given.dims[-1]
    last = found.isel(layer=-1).sel(offset=0)
    loud = last.volume.values > 1e-3
    np.testing.assert_allclose(last.given.values[loud], 1.0, atol=1e-5)
    assert last.volume.sum().item() == pytest.approx(1.0)
    assert found.accuracy.item() == 1.0
    assert found.n_query.item() == 4 * 11
    assert found.null.item() == pytest.approx(np.mean([1 / (t + 1) for t in range(12, 23)]))
    assert found.sizes[head] == trace.sizes[head]
    if mixer == "s4d":  # what it chooses is in x and the gate: alpha itself is flat
        np.testing.assert_allclose(last["share"], found.null, atol=1e-6)


def test_shares_agree_with_loops(model):
    """On a perturbed model of each Mamba family."""
    task = mp.tasks.repeated_tokens(batch=2, period=7, vocab=50, seed=1)
    trace = recorded(model, task)
    found = recall_circuit.induction_heads(trace, offsets=(0, 1))
    data = {str(name): array.values.astype(float) for name, array in trace.items()}
    mamba = trace.attrs["family"] == "mamba"
    n_heads = data["delta"].shape[-1]
    A = data["A"] if mamba else data["A"][..., None]
    x, z = (data[n] if not mamba else data[n][..., None] for n in "xz")
    layer, head, share, given = 1, 3, [], np.zeros(2)
    group = head // (n_heads // trace.sizes["group"])
    beside = []
    for row in range(2):
        for t in range(7, 13):
            weight = np.zeros(t + 1)
            for s in range(t + 1):
                elapsed = data["delta"][layer, row, s + 1 : t + 1, head].sum()
                match = data["C"][layer, row, t, group] * data["B"][layer, row, s, group]
                kept = np.exp(A[layer, head] * elapsed)
                weight[s] = abs((match * kept).sum() * data["delta"][layer, row, s, head])
            gate = z[layer, row, t, head] / (1 + np.exp(-z[layer, row, t, head]))
            spoken = weight * [np.linalg.norm(gate * x[layer, row, s, head]) for s in range(t + 1)]
            target = t + 1 - 7
            share.append(weight[target + 1] / weight.sum())
            given += [spoken[target + 1], spoken.sum()]
            near = [s for s in range(max(target - 8, 0), min(target + 9, t) + 1) if s not in (target, target + 1)]
            beside.append(weight[near].mean() / weight.sum())
    one = found.sel(layer=layer, offset=1).isel({found.share.dims[-1]: head})
    assert one["share"].item() == pytest.approx(np.mean(share), rel=1e-5)
    assert one.given.item() == pytest.approx(given[0] / given[1], rel=1e-5)
    assert one.neighbours.item() == pytest.approx(np.mean(beside), rel=1e-5)
    assert one.low.item() <= one["share"].item() <= one.high.item()


def test_a_random_model_has_no_induction_head(model):
    task = mp.tasks.repeated_tokens(batch=4, period=16, vocab=50, seed=3)
    found = recall_circuit.induction_heads(recorded(model, task))
    assert (found["share"] < 0.35).all()
    assert abs(found["share"].mean() - found.neighbours.mean()).item() < 0.05
    assert found.accuracy_high.item() < 0.2


def test_left_pads_change_nothing(model):
    ids = np.pad(TASK.input_ids, ((0, 0), (3, 0)), constant_values=1)
    mask = np.pad(np.ones_like(TASK.input_ids), ((0, 0), (3, 0)))
    source = np.pad(np.where(TASK.source_token >= 0, TASK.source_token + 3, -1), ((0, 0), (3, 0)), constant_values=-1)
    with mp.attach(model) as probe:
        padded = probe.record(ids, mask, variables=VARIABLES).assign_coords(source_token=(("batch", "token"), source))
    plain, moved = (recall_circuit.induction_heads(one) for one in (recorded(model), padded))
    np.testing.assert_allclose(moved["share"], plain["share"], rtol=1e-4)


def test_dask_gives_the_same_and_one_prompt_has_no_interval(model):
    trace = recorded(model)
    whole = recall_circuit.induction_heads(trace)
    np.testing.assert_array_equal(recall_circuit.induction_heads(trace.chunk({"batch": 1}))["share"], whole["share"])
    one = recall_circuit.induction_heads(trace.isel(batch=[0]))
    assert one.low.isnull().all()
    assert one.attrs["interval"] == "none: one prompt"


def test_what_it_cannot_answer(model):
    trace = recorded(model)
    with pytest.raises(ValueError, match=r"no token of the trace has a `source_token`"):
        recall_circuit.induction_heads(trace.assign_coords(source_token=trace.source_token * 0 - 1))
    with pytest.raises(ValueError, match="lacks `source_token`"):
        recall_circuit.induction_heads(trace.drop_vars("source_token"))
    with pytest.raises(ValueError, match=r"`offsets` must be distinct and grow from at least 0; got \(1, 0\)"):
        recall_circuit.induction_heads(trace, offsets=(1, 0))
    with pytest.raises(ValueError, match="row 0 has gaps"):
        recall_circuit.induction_heads(trace.isel(token=[0, 2, 5, 13]))
    without = recall_circuit.induction_heads(trace.drop_vars(["x", "z", "prediction"]))
    assert not {"given", "volume", "accuracy"} & set(without.data_vars)


def test_the_task_names_what_followed_and_refuses_sizes_that_cannot_be():
    task = mp.tasks.repeated_tokens(batch=3, period=5, vocab=9, repeats=3, seed=4)
    assert torch.equal(torch.tensor(task.input_ids[:, :5]), torch.tensor(task.input_ids[:, 10:]))
    assert all(len(set(row[:5])) == 5 for row in task.input_ids.tolist())
    for row in range(3):
        for t in np.flatnonzero(task.target[row] >= 0):
            before = max(s for s in range(t) if task.input_ids[row, s] == task.input_ids[row, t])
            assert task.source_token[row, t] == before + 1
            assert task.target[row, t] == task.input_ids[row, t + 1] == task.input_ids[row, before + 1]
    assert task.n_query == 3 * 9
    with pytest.raises(ValueError, match=r"vocab >= period.*\(got 4 < 5\).*repeats >= 2 \(got 1\)"):
        mp.tasks.repeated_tokens(period=5, vocab=4, repeats=1)
    with pytest.raises(ValueError, match=r"sizes and seed are integers; got period=2\.5"):
        mp.tasks.repeated_tokens(period=2.5)
