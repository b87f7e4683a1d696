"""transformers' FalconMambaMixer: MambaMixer with dt, B and C each brought to unit mean square, by no weight.

[dt, B, C] = x_proj x, then  v <- v / sqrt(mean(v^2) + eps)  for each of dt, B and C
"""

from collections.abc import Sequence

from torch import Tensor

from mamba_probe.mixers.mamba import MambaAdapter

__all__ = ["FalconMambaAdapter", "unit_mean_square"]


class FalconMambaAdapter(MambaAdapter):
    """Reads and takes over `transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer`.

    Its weights are a MambaMixer's: x_proj_dt, x_proj_B and x_proj_C give dt, B and C up to one scale a token.
    """

    class_path = ("transformers.models.falcon_mamba.modeling_falcon_mamba", "FalconMambaMixer")

    def _normed(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        return [unit_mean_square(part, self.mixer.rms_eps) for part in parts]


def unit_mean_square(values: Tensor, eps: float) -> Tensor:
    """`values` over the root of their mean square along the last axis, `eps` added to the mean square."""
    return values / (values.square().mean(-1, keepdim=True) + eps).sqrt()
