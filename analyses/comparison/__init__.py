"""Any measure over two or more models, traces or training revisions, with paired intervals."""

from mamba_probe.analyses.comparison.compare import compare
from mamba_probe.analyses.comparison.layout import Unlike
from mamba_probe.analyses.comparison.plot import LEVEL, MOST, plot

__all__ = ["LEVEL", "MOST", "Unlike", "compare", "plot"]
