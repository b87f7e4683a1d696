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
real, frozen = (float(result[name].isel(layer=0)) for name in ("layer_best_cosine", "layer_null_best_cosine"))
print(f"mean |cos| with the best single wavelet: {real:.4f}; time-invariant {frozen:.4f}")

figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
wavelet_alignment.plot(result, ax)
figure.savefig("haar.png", dpi=160)
