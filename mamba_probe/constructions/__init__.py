"""Mamba models whose weights are written down: what a probe must find in them is known in closed form."""

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.induction import induction
from mamba_probe.constructions.keep import keep_nth
from mamba_probe.constructions.recall import mqar
from mamba_probe.constructions.recall_gated import mqar_gated
from mamba_probe.constructions.wavelets import haar, window_sums

__all__ = ["Construction", "haar", "induction", "keep_nth", "mqar", "mqar_gated", "window_sums"]
