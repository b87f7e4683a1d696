"""Recall circuit: does the model store key-value pairs and read them back, and where?"""

from mamba_probe.analyses.common.proportion import causal_share
from mamba_probe.analyses.recall_circuit.diagram import diagram
from mamba_probe.analyses.recall_circuit.distance import distance
from mamba_probe.analyses.recall_circuit.heads import induction_heads
from mamba_probe.analyses.recall_circuit.measure import measure
from mamba_probe.analyses.recall_circuit.plot import plot

__all__ = ["causal_share", "diagram", "distance", "induction_heads", "measure", "plot"]
