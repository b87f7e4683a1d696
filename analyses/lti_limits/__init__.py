"""What N time-invariant states cannot do: lower bounds on kernels of the lag, fits beside them, n-term Haar."""

from mamba_probe.analyses.lti_limits.measure import measure
from mamba_probe.analyses.lti_limits.plot import plot

__all__ = ["measure", "plot"]
