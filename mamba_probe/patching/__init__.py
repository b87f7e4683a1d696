"""Activation patching inside the recurrence: where, and through which quantity, one run's answer becomes another's.

    result = mp.patching.sweep(probe, base, source, metric)          # exact: a forward for each entry
    quick = mp.patching.attribute(probe, base, source, metric, exact=result)      # by gradients: one forward, one back
    mp.patching.plot(result, "delta")

What an entry of a quantity is, see `mamba_probe.patching.pair.QUANTITIES`; docs/patching.md has the formulas.
"""

from mamba_probe.patching.attribution import attribute
from mamba_probe.patching.pair import DEFAULT
from mamba_probe.patching.pair import QUANTITIES as _QUANTITIES
from mamba_probe.patching.picture import plot
from mamba_probe.patching.sweeping import sweep

__all__ = ["DEFAULT", "QUANTITIES", "attribute", "plot", "sweep"]

QUANTITIES = _QUANTITIES
"""What can be patched, and its hook point (`mamba_probe.patching.pair.QUANTITIES`)."""
