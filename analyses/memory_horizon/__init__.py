"""Effective memory horizon: how many tokens a write survives, against the time-invariant equivalent of the layer."""

from mamba_probe.analyses.memory_horizon.measure import measure
from mamba_probe.analyses.memory_horizon.plot import plot

__all__ = ["measure", "plot"]
