"""How does a selective layer keep token n for the rest of the sequence? Draws keep_nth.png."""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon

LENGTH, KEPT = 256, 100

layer = mp.constructions.keep_nth(n_tokens=16, length=LENGTH, n=KEPT)
tokens = np.random.default_rng(0).integers(0, 16, (4, LENGTH))
with mp.attach(layer.model) as probe:
    trace = probe.record(layer.inputs(tokens))

horizon = memory_horizon.measure(trace, tokens=[KEPT - 1, KEPT], event_tokens=KEPT)
decay = horizon["mean_decay_event"].isel(layer=0, channel=0, state=0)
print("mean exp(A delta) before, at and after the kept token:", [f"{value:.3g}" for value in decay.values])

retained = trace.probe.A_bar.isel(layer=0, batch=0, channel=0, state=0)
time_invariant = np.exp((trace["delta"].mean("token") * trace["A"]).isel(layer=0, batch=0, channel=0, state=0))
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.plot(retained, color="#0072B2", label="as executed")
ax.axhline(float(time_invariant), color="#D55E00", ls="--", label="time-invariant: delta at its mean")
ax.axvline(KEPT, color="0.6", lw=1)
ax.annotate("the kept token", (KEPT, 0.75), (6, 0), textcoords="offset points", color="0.35")
ax.set(xlabel="token", ylabel=r"decay of one step, $\bar{A}_t = e^{\Delta_t A}$")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))
figure.savefig("keep_nth.png", dpi=160)
