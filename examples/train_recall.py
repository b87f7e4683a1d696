"""How soon does each mixer learn to recall? Draws train_recall.png."""

import matplotlib.pyplot as plt

from mamba_probe.training import Config, answered, progress, train

PAIRS = 4
TASK = {"name": "mqar", "length": 24, "n_pairs": PAIRS, "vocab": 32}
MIXERS = {
    "Mamba-1": {"kind": "mamba1", "d_model": 32, "d_state": 8},
    "Mamba-2": {"kind": "mamba2", "d_model": 32, "d_state": 8, "n_heads": 4},
    "S4D": {"kind": "s4d", "d_model": 32, "d_inner": 128, "d_state": 2},
}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, mixer in MIXERS.items():
    config = Config(TASK, mixer, layers=1, steps=800, batch=32, learning_rate=1e-2, every=50)
    with progress(name) as say:
        result = train(config, say=say)
    correct, total = answered(result.model, config, "test")
    parameters = sum(weight.numel() for weight in result.model.parameters())
    print(f"{name}: {correct} of {total} queries of unseen rows right after {result.last.step} steps", end=" ")
    print(f"and {result.last.seconds:.0f} s; {parameters:,} parameters")
    accuracy = [point.accuracy for point in result.curve]
    label = f"{name}: {accuracy[-1]:.2f} with {parameters:,} parameters"
    axes.plot([point.step for point in result.curve], accuracy, marker="o", ms=3, label=label)

axes.axhline(1 / PAIRS, color="0.6", lw=1, ls="--", zorder=0, label="one of the row's values, at random")
axes.set(xlabel="step", ylabel="accuracy on held-out rows", ylim=(0, 1.03), xlim=(0, None))
axes.legend(loc="lower right", frameon=False, fontsize=9, labelspacing=0.25)
axes.set_title(f"Recall of {PAIRS} pairs, one layer, the same training")
figure.savefig("train_recall.png", dpi=160)
