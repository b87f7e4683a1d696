"""transformers' FalconH1Mixer: Mamba-2 with multipliers on its input and projection, parallel to attention.

[z, xBC, dt] = m * (in_proj (s u)), s = ssm_in_multiplier and m = mup_vector, one number a row: our in_proj is m W s.
With a norm, y silu(z) is normed, or y is and silu(z) multiplies it (norm_before_gate); without one the gate acts alone.
The fused kernel that the library takes in train() with mamba_ssm installed is told that the gate comes first whatever
norm_before_gate says; probed, the mixer trains on the plain path, which heeds it.
What the layer multiplies after the mixer (ssm_out_multiplier) is in neither `out` nor out_proj.
"""

from typing import Any

import torch
from torch import Tensor

from mamba_probe.mixers.mamba2 import Mamba2Adapter, acting_gate
from mamba_probe.mixers.tap import Tap

__all__ = ["FalconH1Adapter"]


class FalconH1Adapter(Mamba2Adapter):
    """Reads and takes over `transformers.models.falcon_h1.modeling_falcon_h1.FalconH1Mixer`."""

    class_path = ("transformers.models.falcon_h1.modeling_falcon_h1", "FalconH1Mixer")

    def _watch_gate(self, tap: Tap) -> None:
        """Where no norm takes the gate, it is met as in_proj gives it, and its multiplier is put on beforehand."""
        if self.mixer.mamba_rms_norm:
            super()._watch_gate(tap)
            return
        heads = (self.sizes.n_heads, self.sizes.head_channels)
        parts = [heads[0] * heads[1], sum(self._parts())]
        mixer = self.mixer

        def at_in_proj(_in_proj: Any, _args: Any, projected: Tensor) -> Tensor:
            gate, rest = projected.split(parts, -1)
            multiplier = mixer.mup_vector[..., : parts[0]]
            executed = gate * multiplier
            acting = acting_gate(tap, executed, heads)
            return projected if acting is executed else torch.cat([acting / multiplier, rest], -1)

        self.mixer.in_proj.register_forward_hook(at_in_proj)

    def _in_proj(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        rows, bias = super()._in_proj(dtype)
        multipliers = self.mixer.mup_vector[0, 0].to(dtype)
        rows = rows * multipliers[:, None] * self.mixer.ssm_in_multiplier
        return rows, None if bias is None else bias * multipliers

    @property
    def _norms_first(self) -> bool:
        return self.mixer.norm.norm_before_gate
