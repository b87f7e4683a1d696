"""Relevance: which tokens a logit is made of, by gradients or by MambaLRP, and whether the answer goes with them."""

from mamba_probe.relevance.explaining import relevance
from mamba_probe.relevance.perturbing import perturbed

__all__ = ["perturbed", "relevance"]
