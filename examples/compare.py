"""
Models side by side, and over training
======================================

When in its training does a mixer become selective, and how do trained models differ?

Left: the selectivity gain of a Mamba-1 at six points of a short training, on the same rows. Right: the entropy of
what each recall model reads, less that of the first. Bars are paired 95 % intervals; a filled mark differs from the
reference (Holm p below 0.05).
"""

from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention, memory_horizon
from mamba_probe.analyses.comparison import plot
from mamba_probe.training import Config, initial, train


def record(model, task):
    with mp.attach(model) as probe:
        return probe.record(task)


def say(result, name):
    ends = ("_difference", "_difference_low", "_difference_high", "_p_holm")
    for other in result["other"].values.tolist():
        numbers = [result[f"{name}{end}"].sel(other=other, layer=0).item() for end in ends]
        print(
            f"{other} against {result.attrs['reference']}: {{:+.3f}} [{{:+.3f}}, {{:+.3f}}], Holm p {{:.2g}}".format(
                *numbers
            )
        )


task, mixer = {"name": "mqar", "length": 16, "n_pairs": 2, "vocab": 16}, {"kind": "mamba1", "d_model": 16, "d_state": 8}
config = Config(task, mixer, layers=1, steps=500, batch=32, learning_rate=2e-2, every=100)
rows = mp.tasks.mqar(batch=12, length=128, n_pairs=2, vocab=16, seed=3)
revisions = {0: record(initial(config), rows)}
with TemporaryDirectory() as folder:
    for step in range(config.every, config.steps + 1, config.every):
        revision = train(config, folder, until=step)
        revisions[step] = record(revision.model, rows)
        print(f"step {step}: {revision.last.accuracy:.2f} of the queries of unseen rows right")
selective = mp.compare(memory_horizon, revisions, variable="layer_selectivity_gain")
say(selective, "layer_selectivity_gain")

rows = mp.tasks.mqar(batch=12, length=64, n_pairs=8, vocab=256, seed=1)
names = ("mamba1", "mamba2", "s4d", "no-conv")
models = {name: record(mp.load(f"zoo:trained-mqar-{name}"), rows) for name in names}
recall = mp.compare(hidden_attention, models, variable="layer_entropy")
say(recall, "layer_entropy")

figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
plot(selective, panels[0], kind="trajectory").set_xlabel("training step")
plot(recall, panels[1])
figure.savefig("compare.png", dpi=140)
