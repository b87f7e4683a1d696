r"""
A layer that keeps one token
============================

How does a selective layer keep token 50 for the rest of the sequence?

Above: the decay of single steps. Before the event the layer forgets within a step, after it nothing decays. Below:
for how many tokens a write of each token lives along the path executed (blue), in the layer at its mean step
(dashed), and with selection moving (green): only the kept token is written at all, which the frozen path cannot
tell.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon

LENGTH, KEPT = 128, 50

layer = mp.constructions.keep_nth(n_tokens=16, length=LENGTH, n=KEPT)
inputs = layer.inputs(np.random.default_rng(0).integers(0, 16, (4, LENGTH)))
with mp.attach(layer.model) as probe:
    trace = probe.record(inputs)
    jacobian = probe.jacobian(inputs, layer=0, source_tokens=[*range(0, LENGTH, 5), KEPT - 1])

horizon = memory_horizon.measure(trace, tokens=range(LENGTH), event_tokens=KEPT, jacobian=jacobian)
one = horizon.isel(layer=0)
decay = [f"{value:.3g}" for value in one["layer_mean_decay_event"].values]
print("mean exp(A delta) before, at and after the kept token:", decay)
print(f"gamma {one['layer_gamma'].item():.3g}, shuffled {one['layer_null_shuffle_gamma'].item():.2g};", end=" ")
print(f"sigma {one['sigma'].max().item():.2g}: {one['layer_retained_share'].item():.0%} of channels keep 90 % of it")
later = jacobian["jacobian"].sel(source_token=[KEPT, KEPT + 5]).isel(batch=0).max("token").values
print(f"largest |d out_t / d u_s| of the kept token {later[0]:.2g}, of one five tokens later {later[1]:.2g}")

figure, axes = plt.subplots(2, 1, figsize=(7, 8), layout="constrained")
memory_horizon.plot(horizon, axes[0], kind="decay")
memory_horizon.plot(horizon, axes[1], kind="token")
axes[1].axvline(KEPT, color="0.6", lw=1, zorder=0)
axes[1].annotate("the kept token", (KEPT, 8), (6, 0), textcoords="offset points", color="0.35")
figure.savefig("keep_nth.png", dpi=140)
