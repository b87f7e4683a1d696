"""State sinks: are step sizes larger at some tokens, in which heads, and does it matter?"""

from mamba_probe.analyses.sinks.classes import classes
from mamba_probe.analyses.sinks.measure import measure
from mamba_probe.analyses.sinks.plot import plot

__all__ = ["classes", "measure", "plot"]
