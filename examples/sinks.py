"""
Tokens with large steps
=======================

At which tokens are a model's steps large, and does the model need them to be?

On the left a ring is a head: its mean step at a class of tokens over that at all others, beside the range of random
classes (grey). On the right, what the loss changes by when the class's steps are set to the mean of the others,
beside as many random tokens: a large ratio need not have a function.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import sinks

MODELS = {
    "trained-mqar-mamba1": mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=1),
    "trained-keep-mamba1-64": mp.tasks.keep_nth(batch=16, length=64, n=5, n_tokens=16, seed=1),
}

figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
for (name, task), (left, right) in zip(MODELS.items(), panels, strict=True):
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task, variables=("delta", "A"))
        classes = sinks.classes(trace)
        ablated = probe.ablate_class(task, classes=classes)
    result = sinks.measure(trace, classes=classes, ablated=ablated)
    print(f"{name}: {result['intact_loss'].item():.2g} nats, nothing ablated")
    for of in result["class"].values:
        one = result.sel({"class": of})
        print(f"  {of}: ratio {one['layer_ratio'].values.round(3)}, specialists {one['share'].item():.1%}", end="; ")
        print(f"levelled {one['effect_loss'].item():+.2g} nats, random tokens {one['random_loss'].item():+.2g}", end="")
        print(f", accuracy {one['effect_accuracy'].item():+.2f}: {one['verdict'].item()}")
    sinks.plot(result, left)
    sinks.plot(result, right, kind="effect")
figure.savefig("sinks.png", dpi=110)
