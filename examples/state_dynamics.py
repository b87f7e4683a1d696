"""How much of its state does a recall model use, and what becomes of it on rows longer than those it was trained on?

Draws state_dynamics.png.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import state_dynamics

LENGTH, PAIRS, LONG = 64, 8, 4096
VARIABLES = ("delta", "A", "B", "C", "x")


def recorded(name: str, length: int, rows: int):
    """The model's trace on rows of recall, and the task."""
    task = mp.tasks.mqar(batch=rows, length=length, n_pairs=PAIRS, vocab=256, seed=0)
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        return probe.record(task, variables=VARIABLES), task


figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
splits = np.arange(1, LENGTH)
for name, colour, label in (
    ("mqar-mamba1", "#0072B2", "in closed form, 128 states"),
    ("trained-mqar-mamba1", "#D55E00", "trained, 16 states"),
):
    trace, task = recorded(name, LENGTH, 16)
    result = state_dynamics.measure(trace, at=splits, heads=[0, 40, 80])
    over = [dim for dim in result["ess_entropy"].dims if dim != "query_token"]
    size, null = (result[f"{kind}ess_entropy"].mean(over) for kind in ("", "null_lti_"))
    axes[0].plot(splits, size, color=colour, lw=1.8, label=label)
    axes[0].plot(splits, null, color=colour, lw=1.2, ls="--", label=f"{label}: time-invariant (null)")
    at = LENGTH // 2
    print(f"{name}: {size[at - 1]:.3f} states at token {at}, time-invariant {null[at - 1]:.3f}")
source = task.source_token[:, None]
asked_later = np.arange(LENGTH) >= splits[:, None]
pairs = ((source >= 0) & (source < splits[:, None]) & asked_later).sum(-1).mean(0)
axes[0].plot(splits[::3], pairs[::3], "o", mfc="none", mec="0.3", ms=6, label="pairs written before i, asked for later")
axes[0].set_xlabel("split i (token)")
axes[0].set_ylabel("effective state size of T[i:, :i]\nmean over 16 rows (no interval)")
axes[0].set_ylim(0, 12.5)
axes[0].set_title("Mamba-1 on 8 pairs: how many states a row's past takes", fontsize="medium", loc="left")
axes[0].spines[["top", "right"]].set_visible(False)
axes[0].legend(fontsize="small", frameon=False, loc="upper right")

trace, task = recorded("trained-mqar-mamba2", LONG, 8)
result = state_dynamics.measure(trace, every=32)
state_dynamics.plot(result, axes[1], kind="state")
axes[1].set_title("Trained Mamba-2 on rows 64 times as long as in training", fontsize="medium", loc="left", pad=24)
axes[1].axvline(LENGTH, color="0.6", lw=1, zorder=0)
axes[1].annotate(
    "a row in training\nends here", (LENGTH, 0.97), (5, 0), ("data", "axes fraction"), "offset points", va="top"
)
print(f"trained-mqar-mamba2 on {LONG} tokens: growth {result['layer_growth'].sel(quantile=0.5).item():.2f},", end=" ")
print(f"in random order {result['layer_null_order_growth'].sel(quantile=0.5).item():.2f};", end=" ")
half_life = result["layer_half_life"].sel(quantile=0.5).item()
print(
    f"at its mean step a state halves in {half_life:.0f} tokens; states {result['layer_rms'].values[0, -1]:.3f}",
    end=" ",
)
print(f"after {LONG} tokens, {result['layer_rms'].values[0, 1]:.3f} after {LENGTH}")
for length in (LENGTH, 256, 1024, LONG):
    trace, task = recorded("trained-mqar-mamba2", length, 32)
    right, asked = task.accuracy(trace["prediction"].values)
    print(f"rows of {length}: {right} of {asked} answers right")
figure.savefig("state_dynamics.png", dpi=160)
