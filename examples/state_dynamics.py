"""
States in use, and states on long rows
======================================

How much of its state does a recall model use, and what becomes of it on rows longer than those it was trained on?

Left: how many states a row's past takes at each split of it. The construction (blue) needs one for each pair that
is written and asked for later (rings); the trained model (orange) holds on to more; dashed, both at their mean
step. Right: the size of the state against tokens read, the same tokens in random order beside it: it fills far past
a training row.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import state_dynamics

LENGTH, LONG = 64, 4096


def recorded(name: str, length: int, rows: int):
    """The model's trace on rows of recall, and the task."""
    task = mp.tasks.mqar(batch=rows, length=length, n_pairs=8, vocab=256, seed=0)
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        return probe.record(task, variables=("delta", "A", "B", "C", "x")), task


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
splits = np.arange(1, LENGTH)
for name, colour, label in (
    ("mqar-mamba1", "#0072B2", "in closed form, 128 states"),
    ("trained-mqar-mamba1", "#D55E00", "trained, 16 states"),
):
    trace, task = recorded(name, LENGTH, 16)
    result = state_dynamics.measure(trace, at=splits, heads=[0, 40, 80])
    over = [dim for dim in result["ess_entropy"].dims if dim != "query_token"]
    size, null = (result[f"{kind}ess_entropy"].mean(over) for kind in ("", "null_lti_"))
    left.plot(splits, size, color=colour, lw=1.8, label=label)
    left.plot(splits, null, color=colour, lw=1.2, ls="--", label="the same, time-invariant (null)")
    print(f"{name}: {size[31]:.3f} states at token 32, time-invariant {null[31]:.3f}")
source = task.source_token[:, None]
pairs = ((source >= 0) & (source < splits[:, None]) & (np.arange(LENGTH) >= splits[:, None])).sum(-1).mean(0)
left.plot(splits[::3], pairs[::3], "o", mfc="none", mec="0.3", label="pairs written before, asked for later")
left.set(
    xlabel="split i (token)", ylabel="effective state size of T[i:, :i]\nmean over 16 rows (no interval)", ylim=(0, 13)
)
left.legend(fontsize="small", frameon=False, loc="upper right")

trace, _ = recorded("trained-mqar-mamba2", LONG, 8)
result = state_dynamics.measure(trace, every=32)
state_dynamics.plot(result, right, kind="state")
right.axvline(LENGTH, color="0.6", lw=1, zorder=0)
right.annotate(
    "a training row\nends here", (LENGTH, 0.97), (5, 0), ("data", "axes fraction"), "offset points", va="top"
)
growth, null = (result[f"layer_{name}growth"].sel(quantile=0.5).item() for name in ("", "null_order_"))
print(f"trained-mqar-mamba2 on {LONG} tokens: growth {growth:.2f}, in random order {null:.2f}")
figure.savefig("state_dynamics.png", dpi=140)
