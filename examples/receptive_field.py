"""
How far a model sees
====================

How far back does a trained model read, on rows four times as long as those it was trained on?

Left: the mean distance read against the tokens there are; the dotted line reads all alike, dashes are the layers at
their mean step. Middle: how much a source at each lag matters, with selection moving (solid) and frozen (dotted):
layer 1 picks single far tokens. Right: how much the answer changes when the first tokens are removed: only once
they held it.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import receptive_field

TRAINED, LONGER = 256, 4

task = mp.tasks.induction(batch=8, length=LONGER * TRAINED, vocab=16, seed=1)
asking = task.role == "query"
eighth = LONGER * TRAINED // 8  # one query of each: where most rows are asked
asked = np.array(
    [end - 1 - asking.sum(0)[end - eighth : end][::-1].argmax() for end in range(eighth, 8 * eighth + 1, eighth)]
)
rows = np.argsort(~asking[:, asked[-1]], kind="stable")[:4]
with mp.attach(mp.load("zoo:trained-induction-mamba1")) as probe:
    trace = probe.record(task, variables=("delta", "A", "B", "C", "u", "out"))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4, trace.sizes["model"]))
    given = {"query_tokens": asked[-1:], "read_out": signs}
    jacobian = [probe.jacobian(task.input_ids[rows], layer=layer, **given) for layer in probe.layers]
    remembrance = probe.remembrance(task, queries=[np.flatnonzero(row)[-1] for row in asking])
result = receptive_field.measure(
    trace, train_length=TRAINED, jacobian=jacobian, remembrance=remembrance, query_tokens=asked
)
ratio = result["layer_collapse_ratio"].sel(fraction=LONGER).values
print(f"of the pace of the length, at {LONGER} times the length trained on, the layers keep", ratio.round(2))
print("frozen to their means they keep", result["layer_null_lti_collapse_ratio"].sel(fraction=LONGER).values.round(2))
print("heads that keep 5 % over the length trained on:", result["layer_global_share"].values.round(2))

figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
for ax, kind in zip(panels, ("distance", "profile", "remembrance"), strict=True):
    receptive_field.plot(result, ax, kind=kind)
figure.savefig("receptive_field.png", dpi=110)
