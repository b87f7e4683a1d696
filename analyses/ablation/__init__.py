"""Head and layer ablation: what a model loses without a part of it, beside what that part reads."""

from mamba_probe.analyses.ablation.measure import measure
from mamba_probe.analyses.ablation.plot import plot

__all__ = ["measure", "plot"]
