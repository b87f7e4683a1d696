"""Receptive field: how far a layer sees, beyond the length it was trained on too, and what moves its output."""

from mamba_probe.analyses.receptive_field.measure import measure
from mamba_probe.analyses.receptive_field.plot import plot

__all__ = ["measure", "plot"]
