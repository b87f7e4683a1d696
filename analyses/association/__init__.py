"""Association: at which token, and before or after the convolution, is a key's pair held until it is asked for?"""

from mamba_probe.analyses.association.measure import measure
from mamba_probe.analyses.association.plot import plot

__all__ = ["measure", "plot"]
