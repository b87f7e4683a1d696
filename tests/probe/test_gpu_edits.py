"""Edits on a GPU, in the compiled kernels, against the same float64 recurrence as on a CPU."""

import pytest
import torch
from edit_cells import bound, check, error, inputs, pairwise
from edited import Change, mixer, run

import mamba_probe as mp

pytestmark = pytest.mark.gpu
KINDS = ("mamba", "mamba2", "own mamba", "own mamba2")
LENGTH = 150
"""Tokens: three chunks of the chunked kernel, the last not whole."""

ACROSS_CHUNKS = (
    [Change("assign", "A_bar", 0.0, {"token": [70, 128]})],
    [Change("assign", "A_bar", 0.0, {"batch": 0})],
    [Change("assign", "A_bar", 1.0, {"token": list(range(60, 140))}), Change("assign", "A_bar", 0.0, {"token": 64})],
    [Change("ablate", "decay"), Change("zero", "B", None, {"token": list(range(10, 130))})],
    [Change("scale", "delta", 0.0, {"token": [63, 64, 65]}), Change("assign", "h", 0.5, {"token": [64, 127]})],
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_each_edit_equals_a_recurrence_with_the_same_edit():
    moved = [check(cell, "triton", "cuda") for cell in pairwise() if cell[0] != "s4d"]
    assert len(moved) > 150


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", ACROSS_CHUNKS, ids=str)
def test_a_state_is_forgotten_and_kept_across_chunks(kind, changes):
    one, (u, mask) = mixer(kind), inputs(kind, True, length=LENGTH)
    expected = run(kind, one, u.numpy(), mask.numpy(), changes)
    with mp.attach(one.cuda(), backend="triton") as probe, probe.edit(*[each.edit() for each in changes]):
        trace = probe.record(u, mask, variables=["h", "y", "out"])
    for name in ("h", "y", "out"):
        found = trace[name].isel(layer=0).values.reshape(expected[name].shape)
        assert error(found, expected[name], mask.bool().numpy()) <= bound(kind), name
