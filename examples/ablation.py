"""
What each layer and head is worth
=================================

What does a model lose without each of its layers and heads, and does it show in what they read?

On the left a dot is a unit taken out, filled where the loss of accuracy is more than chance; grey is the same
number of random channels. On the right the same harm against the entropy of what the unit reads: a low entropy does
not mean that a unit matters.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import ablation

MODELS = {
    "trained-mqar-mamba2": (mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=1), {"n_random": 80}),
    "trained-keep-mamba1-64": (mp.tasks.keep_nth(batch=16, length=64, n=5, n_tokens=16, seed=1), {"group": 8}),
}

figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
for (name, (task, parts)), (left, right) in zip(MODELS.items(), panels, strict=True):
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task, variables=("delta", "A", "B", "C"))
        ablated = probe.ablate_units(task, **parts)
    result = ablation.measure(trace, ablated=ablated)
    print(f"{name}: accuracy {result['accuracy'].item():.2f}; {result.attrs['verdict']}")
    for unit in result["unit"].values[result["effect_accuracy"].values < -0.1]:
        one = result.sel(unit=unit)
        print(f"  without {unit}: {one['effect_accuracy'].item():+.2f}", end="; ")
        print(f"random channels {one['random_accuracy'].item():+.2f}, entropy {one['entropy'].item():.2f} nats")
    rho, low, high = (result[f"correlation{end}"].item() for end in ("", "_null_low", "_null_high"))
    print(f"  rank correlation of harm and entropy {rho:.2f}; units paired at random {low:.2f} to {high:.2f}")
    ablation.plot(result, left)
    ablation.plot(result, right, kind="entropy")
figure.savefig("ablation.png", dpi=110)
