"""Every edit equals a brute-force float64 recurrence with the same edit."""

import copy

import numpy as np
import pytest
import torch
from edit_cells import GRID, LENGTH, bound, check, error, inputs, pairwise
from edited import AXES, KINDS, Change, mixer, run

import mamba_probe as mp


def test_each_edit_equals_a_recurrence_with_the_same_edit_in_a_sample_where_every_two_meet():
    moved = [check(cell)[1] for cell in pairwise()]
    assert len(moved) > 180
    assert np.mean(np.array(moved) > 1e-4) > 0.95, "the edits act"


def test_the_naive_backend_does_the_same():
    assert all(check(cell, "naive") for cell in pairwise()[::6])


def test_triton_does_the_same(interpreted):
    (n_held,) = interpreted("interpreted_edits.py")
    assert int(n_held) >= 9


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", AXES)
def test_each_edit_equals_a_recurrence_with_the_same_edit(kind, target):
    found = [check(cell) for cell in GRID if (cell[0], cell[2]) == (kind, target)]
    assert any(found) == (kind != "s4d" or target in ("x", "z", "y", "h"))


ABLATED = ("conv", "gate", "decay", "delta", "B", "C")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_each_ablation_and_all_together(kind, padded):
    able = ABLATED[:3] if kind == "s4d" else ABLATED
    model, (u, mask) = mixer(kind), inputs(kind, padded)
    with mp.attach(model) as probe, torch.no_grad():
        for names in [*[(name,) for name in able], able[:3], able[1:]]:
            changes = [Change("ablate", name) for name in names]
            expected = run(kind, model, u.numpy(), mask.numpy(), changes)["out"]
            with probe.edit(*[one.edit() for one in changes]):
                assert error(model(u, attention_mask=mask), expected, mask.bool().numpy()) <= bound(kind), names


COMPOSED = (
    [Change("scale", "A_bar", 1.5), Change("clamp", "A_bar", (None, 0.9))],
    [Change("assign", "A_bar", 0.0, {"token": 3}), Change("ablate", "decay")],
    [Change("scale", "delta", 2.0, {"token": 3}), Change("freeze", "delta", None, {"batch": 1})],
    [Change("assign", "B", 0.5, {"token": 2}), Change("scale", "B", 3.0), Change("zero", "C", None, {"token": 5})],
    [Change("assign", "h", 0.4, {"token": 3}), Change("scale", "h", -2.0, {"token": [3, 5]})],
    [Change("ablate", "B"), Change("assign", "B", 0.3, {"token": 1})],
)


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("changes", COMPOSED, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_edits_act_in_the_order_in_which_they_are_given(kind, changes, nested):
    model, (u, mask) = mixer(kind), inputs(kind, True)
    valid, made = mask.bool().numpy(), []
    with mp.attach(model) as probe, torch.no_grad():
        for ordered in (changes, changes[::-1]):
            expected = run(kind, model, u.numpy(), mask.numpy(), ordered)["out"]
            edits = [one.edit() for one in ordered]
            with probe.edit(*edits[: 1 if nested else None]), probe.edit(*edits[1:] if nested else ()):
                made.append(model(u, attention_mask=mask).numpy())
            assert error(made[-1], expected, valid) <= bound(kind), ordered
    assert error(made[0], made[1], valid) > 1e-4, "the order matters"


def test_a_model_is_bit_equal_after_an_edit_and_others_never_change(model, build):
    ids = torch.arange(1, 19).reshape(2, 9)
    second, wrong = build(), mp.assign("B", torch.ones(7), token=2)
    with mp.attach(model) as probe, torch.no_grad():
        before = model(ids).logits
        with probe.edit(mp.zero("B", token=3), mp.assign("h", 1.0, layer=0, token=2), mp.scale("z", 2.0, layer=1)):
            edited = model(ids).logits
            copied = copy.deepcopy(model)(ids).logits
            assert torch.equal(second(ids).logits, build()(ids).logits)
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(ValueError, match="broadcasts"), probe.edit(mp.scale("C", 3.0), wrong):
            model(ids)
        assert torch.equal(model(ids).logits, before)
    native = build()(ids).logits
    assert (edited - before).abs().max() > 1e-3
    assert torch.equal(copied, native), "a copy is not edited"
    assert torch.equal(model(ids).logits, native)


KEPT = ("delta", "A_bar", "B", "C", "x", "z", "y", "h", "delta_cumsum")


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("part", [{}, {"tokens": [0, 2, 5]}, {"channels": [1, 3]}, {"tokens": [4], "channels": [2]}])
def test_a_recording_holds_what_was_executed(kind, part):
    changes = [
        Change("scale", "delta", 0.5, {"token": 3}), Change("assign", "A_bar", 0.25, {"token": 4}),
        Change("assign", "h", 0.7, {"token": [2, 5]}), Change("zero", "y", None, {"token": 2}),
        Change("scale", "x", 2.0, {"batch": 1}), Change("freeze", "z", 0.5), Change("clamp", "C", (-0.2, 0.2)),
    ]  # fmt: skip
    model, (u, mask) = mixer(kind), inputs(kind, True)
    expected = run(kind, model, u.numpy(), mask.numpy(), changes)
    expected["delta_cumsum"] = expected["delta"].cumsum(1)
    with mp.attach(model) as probe, probe.edit(*[one.edit() for one in changes]):
        trace = probe.record(u, mask, variables=KEPT, **part)
    tokens, channels = part.get("tokens", range(LENGTH)), part.get("channels", slice(None))
    valid = mask.bool().numpy()[:, list(tokens)]
    for name in trace.data_vars:
        whole = expected[name][:, list(tokens)]
        whole = whole if name in "BC" else whole[:, :, channels]
        found = trace[name].isel(layer=0).values.reshape(whole.shape)
        assert error(found, whole, valid) <= bound(kind), name
    assert trace.attrs["edits"].count(";") == len(changes) - 1
