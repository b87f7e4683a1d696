"""
How long a write lives, layer by layer
======================================

For how many tokens does each layer of a trained model remember, and is that more than its time-invariant equivalent
does?

Left: the median horizon of each layer with the range over tokens, channels and states (thin) and the interval over
rows (box). Right: the share of the second layer's writes that are not yet decayed after so many tokens. Blue is the
model as it ran; grey has the same step sizes in random order, orange the layer at its mean step. Where blue leaves
orange, selection matters.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon

task = mp.tasks.induction(batch=8, length=128, vocab=16, seed=1)
with mp.attach(mp.load("zoo:trained-induction-mamba1")) as probe:
    trace = probe.record(task)
result = memory_horizon.measure(trace)
for layer in result["layer"].values:
    one = result.sel(layer=layer, quantile=0.5)
    executed, frozen = (one[f"layer_{name}_horizon"].item() for name in ("forward", "null_lti"))
    print(f"layer {layer}: the median write lives {executed:.0f} tokens, at the mean step {frozen:.0f}")

figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
memory_horizon.plot(result, axes[0])
memory_horizon.plot(result, axes[1], kind="survival", layer=1)
figure.savefig("memory_horizon.png", dpi=140)
