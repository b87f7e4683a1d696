"""transformers' mixers of hybrids whose forward is Mamba2Mixer's, step by step: only what they are built from differs.

Zamba2 and Nemotron-H hold delta to (time_step_min, inf) whatever the configuration's limits; Zamba2's norm has a fixed
epsilon of 1e-5. Both stand in the mixer itself, and are read there.
"""

from mamba_probe.mixers.mamba2 import Mamba2Adapter

__all__ = ["BambaAdapter", "GraniteMoeHybridAdapter", "NemotronHAdapter", "Zamba2Adapter"]


class BambaAdapter(Mamba2Adapter):
    """Reads and takes over `BambaMixer`, the `mamba` of the layers that have no attention."""

    class_path = ("transformers.models.bamba.modeling_bamba", "BambaMixer")


class Zamba2Adapter(Mamba2Adapter):
    """Reads and takes over `Zamba2MambaMixer`, one in every layer; some layers have shared attention before it."""

    class_path = ("transformers.models.zamba2.modeling_zamba2", "Zamba2MambaMixer")


class GraniteMoeHybridAdapter(Mamba2Adapter):
    """Reads and takes over `GraniteMoeHybridMambaLayer`; on attention layers `mamba` is None."""

    class_path = ("transformers.models.granitemoehybrid.modeling_granitemoehybrid", "GraniteMoeHybridMambaLayer")


class NemotronHAdapter(Mamba2Adapter):
    """Reads and takes over `NemotronHMamba2Mixer`; a layer's `mixer` may also be attention, an MLP or experts."""

    class_path = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHMamba2Mixer")
