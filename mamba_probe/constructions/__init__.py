"""Mamba models whose weights are written down: what a probe must find in them is known in closed form."""

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.keep import keep_nth
from mamba_probe.constructions.recall import mqar
from mamba_probe.constructions.wavelets import haar

__all__ = ["Construction", "haar", "keep_nth", "mqar"]
