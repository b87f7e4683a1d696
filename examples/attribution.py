"""
The tokens behind an answer
===========================

Which tokens is a recalled answer made of, and does the answer go when they do?

Above, one row up to its query: orange speaks for the answer, purple against it; k and v are keys and values, green
the pair that is asked for. In the middle, the share of each kind of token, beside gradient x input and chance.
Below, tokens are taken away, the most relevant first: a good ranking makes the answer fall early.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import attribution

task = mp.tasks.mqar(batch=16, length=32, n_pairs=5, vocab=256, seed=3)
with mp.attach(mp.load("zoo:trained-mqar-mamba1")) as probe:
    found = probe.relevance(task, batch_size=4)
    gradient = probe.relevance(task, rules="gradient", batch_size=4)
    taken = probe.perturbed(found, gradient, batch_size=4)
result = attribution.measure(found, gradient=gradient, perturbation=taken)
for kind in result["token_class"].values:
    one = result.sel(token_class=kind)
    names = ("mean_class_share", "mean_gradient_class_share", "chance")
    values = ", ".join(f"{one[name].item():.2f}" for name in names)
    print(f"share of the positive relevance on {kind} (MambaLRP, gradient x input, chance): {values}")
figure, panels = plt.subplots(3, 1, figsize=(8.4, 9.2), layout="constrained", height_ratios=[1, 2, 2])
for ax, kind in zip(panels, ("tokens", "classes", "curve"), strict=True):
    attribution.plot(result, ax, kind=kind)
figure.savefig("attribution.png", dpi=130)
