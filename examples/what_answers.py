"""
The token that gives the answer
===============================

Which token of its prompt gives a trained model each answer?

A row is a query, a column a token that the layer wrote: what it adds to the logit of the right answer, as a share of
what all tokens add. Each query should read the one token at which its pair was written.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses.common import interval

ROWS, FROZEN = 64, [mp.freeze(name) for name in ("delta", "B", "C")]
task = mp.tasks.mqar(batch=ROWS, length=40, n_pairs=8, vocab=256, seed=0)


def shares(trace, weights, row):
    """(query, token), queries in the order of their pairs: C_t exp(A sum delta) B_s delta_s x_s, gated and read out."""
    one, w = trace.isel(layer=0, batch=row), weights.isel(layer=0)
    delta, A, x, z, B, C = (np.squeeze(one[name].values.astype(float)) for name in ("delta", "A", "x", "z", "B", "C"))
    clock, targets = delta.cumsum(0), trace["target"].values
    logits = (w["unembedding"] * w["norm_f"]).values @ w["out_proj"].values
    logits -= logits[np.unique(targets[targets >= 0])].mean(0)
    asked = np.flatnonzero(one["role"].values == "query")
    found = np.zeros((len(asked), len(delta)))
    for at, t in enumerate(asked[np.argsort(one["source_token"].values[asked])]):
        kernel = np.einsum("n,scn,sn->sc", C[t], np.exp(A * (clock[t] - clock[: t + 1])[..., None]), B[: t + 1])
        gated = kernel * delta[: t + 1] * x[: t + 1] * z[t] / (1 + np.exp(-z[t]))
        found[at, : t + 1] = gated @ logits[targets[row, t]]
    return found / np.abs(found).sum(1, keepdims=True)


figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
for ax, (what, name, edits, late) in zip(
    axes,
    [
        ("weights in closed form", "zoo:mqar-mamba1", [], 0),
        ("trained", "zoo:trained-mqar-mamba1", [], 2),  # it writes a pair two tokens after the value
        ("trained, then made time-invariant", "zoo:trained-mqar-mamba1", FROZEN, 2),
    ],
    strict=True,
):
    with mp.attach(mp.load(name)) as probe, probe.edit(*edits):
        trace, weights = probe.record(task, variables=("delta", "A", "B", "C", "x", "z")), probe.weights()
    grids = np.stack([shares(trace, weights, row) for row in range(ROWS)])
    own = np.stack([grids[:, pair, 2 * pair + 1 + late] for pair in range(8)]).mean(0)
    low, high = interval(lambda draws, own=own: own @ draws / draws.sum(), ROWS, 1000, 0)
    right = (trace["prediction"] == trace["target"]).values[trace["role"].values == "query"].mean()
    told = [f"share of its own pair {own.mean():.2f} [{low:.2f}, {high:.2f}]", f"accuracy {right:.2f}"]
    print(what, *told, sep="; ")
    picture = ax.imshow(grids[0], cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    ax.set_title("\n".join([what, *told]), fontsize="small")
    ax.set_xlabel("token that was written (8 pairs, then filler)", fontsize="small")
axes[0].set_ylabel("query, by its pair")
figure.colorbar(picture, ax=axes, label="share of what all tokens add\nto the right answer")
figure.savefig("what_answers.png", dpi=160)
