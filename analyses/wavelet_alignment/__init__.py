"""Wavelet-basis alignment: how well a layer's executed kernels are wavelets, against the layer made time-invariant."""

from mamba_probe.analyses.wavelet_alignment.measure import measure
from mamba_probe.analyses.wavelet_alignment.plot import plot

__all__ = ["measure", "plot"]
