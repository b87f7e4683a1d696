"""transformers' JambaMambaMixer: MambaMixer with a learned norm on each of dt, B and C.

[dt, B, C] = x_proj x, then  v <- w v / sqrt(mean(v^2) + eps)  for each of dt, B and C
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_probe.mixers.base import Labelled, double
from mamba_probe.mixers.falcon_mamba import unit_mean_square
from mamba_probe.mixers.mamba import MambaAdapter

__all__ = ["JambaAdapter"]


class JambaAdapter(MambaAdapter):
    """Reads and takes over `transformers.models.jamba.modeling_jamba.JambaMambaMixer`.

    In its weights norm_dt (rank), norm_B and norm_C (state) are w above, and x_proj_dt, x_proj_B and x_proj_C the rows
    of x_proj times w: they give dt, B and C up to one scale a token.
    """

    class_path = ("transformers.models.jamba.modeling_jamba", "JambaMambaMixer")
    shortcuts = ()

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        labelled = super().weights()
        for name, norm in zip(("dt", "B", "C"), self._norms, strict=True):
            dims, rows = labelled[f"x_proj_{name}"]
            wide = torch.promote_types(rows.dtype, torch.float32)
            labelled[f"x_proj_{name}"] = (dims, rows.to(wide) * norm.weight[:, None].to(wide))
            labelled[f"norm_{name}"] = (dims[:1], norm.weight)
        return labelled

    @property
    def _norms(self) -> tuple[Any, ...]:
        """The norms of dt, B and C."""
        return self.mixer.dt_layernorm, self.mixer.b_layernorm, self.mixer.c_layernorm

    def _normed(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        return [
            unit_mean_square(part, norm.variance_epsilon) * double(norm.weight)
            for part, norm in zip(parts, self._norms, strict=True)
        ]
