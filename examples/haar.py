"""Are the kernels of the Haar construction wavelets, and what are they once it is time-invariant? Draws haar.png."""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import wavelet_alignment

LENGTH = 256

layer = mp.constructions.haar(length=LENGTH, levels=3)
signal = np.random.default_rng(0).standard_normal((4, LENGTH))
with mp.attach(layer.model) as probe:
    trace = probe.record(layer.inputs(signal))
result = wavelet_alignment.measure(trace, read_out=layer.read_out)
cosine = result["best_cosine"].isel(layer=0, batch=0, query_token=0).values
frozen = result["null_best_cosine"].isel(layer=0, batch=0, query_token=0).values
print("|cos| of each read-out kernel with its best wavelet:", np.round(cosine, 4))
print("once delta, B and C are frozen to their means:      ", np.round(frozen, 4))
print("(the first kernel is the scaling function, a constant, which is no wavelet; nan: the frozen kernels cancel)")

row = trace.isel(layer=0, batch=0)  # one state a channel: k[s] = C_T exp(A (cum_T - cum_s)) delta_s B_s
cumulative = row["delta"].cumsum("token")
decay = np.exp(row["A"].isel(state=0) * (cumulative.isel(token=-1) - cumulative))
in_out = row["C"].isel(token=-1, group=0, state=0) * row["B"].isel(group=0, state=0)
kernels = layer.read_out @ (in_out * decay * row["delta"]).transpose("channel", "token").values

figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for i, kernel in enumerate(kernels):
    ax.axhline(-i, color="0.85", lw=0.8, zorder=0)
    ax.plot(kernel / abs(kernels).max() * 0.45 - i, color="#0072B2", lw=1.5)
    null = "cancels" if np.isnan(frozen[i]) else f"{frozen[i]:.3f}"
    label = "constant" if i == 0 else f"|cos| {cosine[i]:.3f}, frozen: {null}"
    ax.annotate(label, (LENGTH, -i), (8, 0), textcoords="offset points", va="center", fontsize=8, annotation_clip=False)
ax.set(xlabel="token s", ylabel="read-out kernel of the last token", yticks=-np.arange(len(kernels)))
ax.set_yticklabels([str(i) for i in range(len(kernels))])
ax.set_xlim(0, LENGTH)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig("haar.png", dpi=160)
