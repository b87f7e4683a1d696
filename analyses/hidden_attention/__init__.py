"""Hidden attention: what each token's scan output reads from each earlier token, selection as executed."""

from mamba_probe.analyses.hidden_attention.measure import measure
from mamba_probe.analyses.hidden_attention.plot import plot
from mamba_probe.analyses.hidden_attention.token_map import map

__all__ = ["map", "measure", "plot"]
