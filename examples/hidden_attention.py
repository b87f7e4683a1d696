r"""
What each token reads
=====================

Which token does each token of the recall model read, and which once the layer is time-invariant?

Each line of a map is a query, each column a token that it may read; colour is the signed weight alpha, logarithmic.
On the left every query reads one token, the value that it asks for (green rings). On the right the same layer with
delta, B and C at the row's means reads all tokens alike: recall is selection.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention

model = mp.load("zoo:mqar-mamba1")
task = mp.tasks.mqar(batch=4, length=40, n_pairs=6, vocab=256, seed=0)
with mp.attach(model) as probe:
    trace = probe.record(task, variables=("delta", "A", "B", "C", "x", "y"))
    weights = probe.weights()
asked = np.stack([np.flatnonzero(role == "query") for role in trace["role"].values])
result = hidden_attention.measure(trace, query_tokens=asked, weights=weights, aggregate="mean_absolute")
truth = np.take_along_axis(trace["source_token"].values, asked, axis=1)
print("queries that read the value they ask for:", int((result["aggregate_top_source"].values[0] == truth).sum()))
print("of", truth.size, "with a share of |alpha| of", round(result["layer_top_share"].item(), 6))
print("once delta, B and C are frozen to their means:", round(result["layer_null_lti_top_share"].item(), 3))
print("alpha . x + D x against the scan's output:", f"{result['identity_error'].max().item():.1e} of the terms")

square = hidden_attention.map(trace, row=0)
figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
for ax, series in zip(panels, ("executed", "null_lti"), strict=True):
    hidden_attention.plot(square, ax, kind="map", series=series)
panels[0].plot(truth[0], asked[0], "o", mfc="none", mec="#009E73", ms=11, mew=1.5, label="query and its value")
panels[0].legend(loc="upper right")
figure.savefig("hidden_attention.png", dpi=140)
