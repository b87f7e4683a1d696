"""Edits as cells of a grid, each held to a float64 recurrence with the same edit."""

import itertools
import random

import numpy as np
import torch
from edited import AXES, KINDS, TRANSFORMERS, Change, mixer, run

import mamba_probe as mp

LENGTH = 7
WHERE = (
    {}, {"token": 4}, {"token": [2, 5]}, {"batch": 1, "token": [4, 6]}, {"head": [3, 1]}, {"head": 2, "token": 5},
    {"channel": [4, 1]}, {"channel": 2, "token": 5}, {"group": 0},
    {"state": [2, 0], "token": 3}, {"state": 1}, {"head_channel": 0, "head": 1},
)  # fmt: skip
VERBS = ("assign", "array", "scale", "scale array", "clamp", "zero", "freeze mean", "freeze", "swap")


def bound(kind):
    return 2e-6 if kind in TRANSFORMERS else 1e-12


def inputs(kind, padded, seed=0, length=LENGTH):
    dtype = torch.float32 if kind in TRANSFORMERS else torch.float64
    u = torch.randn(3, length, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    mask = torch.ones(3, length, dtype=torch.int64)
    if padded:
        mask[0, :2], mask[1, :1] = 0, 0
    return u, mask


def error(found, expected, valid):
    found, expected = np.asarray(found)[valid], expected[valid]
    assert np.isfinite(found).all()
    return abs(found - expected).max() / (abs(expected).max() or 1.0)


def axes(kind, target):
    own = AXES[target].split()
    if "mamba2" in kind:
        return own[:3] if target == "A_bar" else own
    return ["channel" if axis == "head" else axis for axis in own if axis != "head_channel"]


def change(kind, target, verb, where):
    """The edit of this cell; None where there is none."""
    where = dict(where)
    if target == "h" and "token" not in where:
        where["token"] = [1, 4]
    if set(where) - set(axes(kind, target)) or (target == "h" and verb.startswith("freeze")):
        return None
    if kind == "s4d" and (target not in ("x", "z", "y", "h") or (target, verb) == ("h", "clamp")):
        return None
    sizes = run(kind, mixer(kind), *map(np.asarray, inputs(kind, False)), [])[target].shape
    if verb.endswith("array"):
        named = {("head" if name == "channel" else name): at for name, at in where.items()}
        shape = [np.size(named.get(name, range(n))) for name, n in zip(AXES[target].split(), sizes, strict=False)]
        values = np.random.default_rng(2).uniform(0.1, 0.9, shape)
        return Change("scale" if verb.startswith("scale") else "assign", target, values, where)
    name = verb.split()[0]
    value = {"assign": 0.37, "scale": 0.6, "clamp": (0.2, 0.5), "freeze": 0.4}.get(verb)
    return Change(name, target, value, where)


GRID = tuple(itertools.product(KINDS, (False, True), AXES, VERBS, range(len(WHERE))))


def pairwise():
    """Cells of the grid in which every two of kind, padding, target, verb and place that can meet do."""
    cells, seen, chosen = list(GRID), set(), []
    random.Random(0).shuffle(cells)
    for cell in cells:
        pairs = set(itertools.combinations(enumerate(cell), 2))
        if not pairs <= seen and change(cell[0], cell[2], cell[3], WHERE[cell[4]]) is not None:
            seen |= pairs
            chosen.append(cell)
    return chosen


def check(cell, backend="auto", device="cpu"):
    kind, padded, target, verb, place = cell
    one = change(kind, target, verb, WHERE[place])
    if one is None:
        return None
    model, (u, mask), (u2, whole) = mixer(kind), inputs(kind, padded), inputs(kind, False, seed=1)
    other = run(kind, model, u2.numpy(), whole.numpy(), [])
    expected = run(kind, model, u.numpy(), mask.numpy(), [one], other)
    unedited = run(kind, model, u.numpy(), mask.numpy(), [])["out"]
    with mp.attach(model.to(device), backend=backend) as probe, torch.no_grad():
        source = probe.record(u2, variables=[target]) if verb == "swap" else None
        with probe.edit(one.edit(source)):
            out = model(u.to(device), attention_mask=mask.to(device)).cpu()
    found = error(out, expected["out"], mask.bool().numpy())
    assert found <= bound(kind), (cell, one, found)
    return found, error(unedited, expected["out"], mask.bool().numpy())
