r"""
A selective layer whose kernels are wavelets
============================================

Are the kernels of the Haar construction wavelets, and what are they once the layer is time-invariant?

Above on the left each kernel (blue) lies on its best wavelet (orange), with their \|cos\|; beside it, how few
coefficients hold the energy. Below: at which scales it lies, and how well the best single wavelet fits. Frozen to
its means (dashed), the layer keeps the scaling function alone, a constant, which is no wavelet.
"""

import matplotlib.pyplot as plt
import numpy as np

import mamba_probe as mp
from mamba_probe.analyses import wavelet_alignment

LENGTH = 256


def recorded(construction: mp.constructions.Construction):
    with mp.attach(construction.model) as probe:
        return probe.record(construction.inputs(signal))


signal = np.random.default_rng(0).standard_normal((4, LENGTH))
layer = mp.constructions.haar(length=LENGTH, levels=3)
result = wavelet_alignment.measure(
    recorded(layer), read_out=layer.read_out, baseline=recorded(layer.randomised(0)), n_sampled=8, n_kept=8
)
one = result.isel(layer=0, batch=0, query_token=0)
print("|cos| of each read-out kernel with its best wavelet:", np.round(one["best_cosine"].values, 4))
print("once delta, B and C are frozen to their means:      ", np.round(one["null_best_cosine"].values, 4))
print("(the first kernel is the scaling function, a constant, which is no wavelet; nan: the frozen kernels cancel)")
print("states a time-invariant layer needs at least, 10 % error:", one["lti_order"].values.astype(int))

figure, axes = plt.subplots(2, 2, figsize=(9, 7.6), layout="constrained")
for ax, kind in zip(axes.flat, ("kernels", "compaction", "levels", "cosine"), strict=True):
    wavelet_alignment.plot(result, ax, kind=kind)
figure.savefig("haar.png", dpi=140)
