"""State dynamics: how fast a layer forgets, how its state grows along the context, and how much of it is used."""

from mamba_probe.analyses.state_dynamics.measure import measure
from mamba_probe.analyses.state_dynamics.plot import plot

__all__ = ["measure", "plot"]
