"""What MambaLRP and gradient x input hold to account on every model of the zoo, and on untrained ones: two tables."""

from dataclasses import replace

import numpy as np
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import attribution
from mamba_probe.reproduce.trained import checkpoints, fresh_task
from mamba_probe.run import randomised_twin

ROWS, MOST = 16, 256
"""Rows of each model's own task; models of longer rows take a quarter of them."""


def explained(model, task, twin=None):
    """Relevance by both rules, curves of tokens taken away, and the untrained twin's relevance, measured."""
    with mp.attach(model) as probe:
        found = probe.relevance(task, batch_size=4)
        gradient = probe.relevance(task, rules="gradient", batch_size=4)
        taken = probe.perturbed(found, gradient, batch_size=4)
    baseline = None
    if twin is not None:
        with mp.attach(twin) as probe:
            baseline = probe.relevance(task, batch_size=4)
    return attribution.measure(found, gradient=gradient, perturbation=taken, baseline=baseline)


def subjects():
    """Every model of the zoo with fresh rows of its own task."""
    yield "mqar-mamba1", mp.tasks.mqar(batch=ROWS, length=64, n_pairs=8, vocab=256, seed=1)
    for found in checkpoints():
        task = fresh_task(found, ROWS, 1)
        rows = ROWS if task.input_ids.shape[1] <= MOST else ROWS // 4
        parts = {name: getattr(task, name)[:rows] for name in ("input_ids", "role", "target", "source_token")}
        yield found.name, replace(task, **parts)


def shares(one, prefix):
    """Of the positive relevance, as text."""
    mean = one[f"mean_{prefix}class_share"].reindex(token_class=["asked value", "asked key", "own"]).values
    return ["-" if np.isnan(value) else f"{value:.2f}" for value in mean]


def table():
    """A line for each model of the zoo."""
    print("| zoo | answers right | asked value | asked key | own | gradient: value, key, own | twin: pair | "
          "taken away: MambaLRP, gradient, random | biases |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, task in subjects():
        model = mp.load(f"zoo:{name}")
        one = explained(model, task, randomised_twin(model))
        pair = f"{one['mean_baseline_pair_share'].item():.2f}" if "mean_pair_share" in one else "-"
        area = ", ".join(f"{value:.3f}" for value in one["area"].values)
        cells = [f"{float(one['top'].mean()):.2f}", *shares(one, ""), ", ".join(shares(one, "gradient_")), pair, area,
                 f"{float(one['bias_share'].mean()):.2f}"]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")


def chance():
    """Shares of untrained models of two layers, twenty of a kind: the pair that is asked for, and the query itself."""
    task = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32, seed=0)
    for kind, sizes in {
        "mamba1": {"d_state": 4},
        "mamba2": {"d_state": 4, "n_heads": 4},
        "s4d": {"d_state": 4},
    }.items():
        found = []
        for seed in range(20):
            torch.manual_seed(seed)
            model = blocks.build({"mixers": [{"kind": kind, "d_model": 16, **sizes}] * 2, "vocab_size": 32}).eval()
            with mp.attach(model) as probe:
                one = attribution.measure(probe.relevance(task), n_bootstrap=2)
            found.append((one["mean_pair_share"].item(), one["mean_class_share"].sel(token_class="own").item()))
        pair, own = np.mean(found, axis=0)
        print(f"untrained {kind}: {pair:.4f} on the pair (chance 0.11), {own:.2f} on the query itself")


table()
chance()
