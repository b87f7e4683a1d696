"""Attribution: which tokens an answer's logit is made of, by MambaLRP and gradient x input, and whether that holds."""

from mamba_probe.analyses.attribution.measure import measure
from mamba_probe.analyses.attribution.plot import plot

__all__ = ["measure", "plot"]
