"""A standalone S4D layer (state-spaces/s4's `s4d.py`), which takes and gives (batch, channel, token).

| key in the file | key in the module |
|---|---|
| kernel.C, real view (channel, state, 2) | the same |
| kernel.log_dt (channel,), kernel.log_A_real, kernel.A_imag (channel, state) | the same |
| D (channel,) | the same |
| output_linear.0.weight (2 channel, channel, 1), output_linear.0.bias | the same |

    y = 2 Re(C h) + D u, zoh       out = GLU(output_linear GELU(y))

A state stands for itself and its conjugate, so that N of `d_state=N` are N / 2 here. No config is needed: the tensors
say every size. If there is one, it may hold S4D's arguments d_model, d_state, dropout (without effect in eval mode),
transposed, dt_min, dt_max and lr.

Source of names and of the function: state-spaces/s4, `models/s4/s4d.py` (S4D, S4DKernel), arXiv 2206.11893.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_probe.blocks import S4DKernel
from mamba_probe.formats.fields import refuse_unknown, refuse_values
from mamba_probe.formats.recipe import Recipe
from mamba_probe.kernels.scan import selective_scan

__all__ = ["KEYS", "NAME", "S4D", "convert", "matches"]

NAME = "s4d"
KEYS = ("kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag", "D", "output_linear.0.weight")
_FIELDS = ("d_model", "d_state", "dropout", "transposed", "dt_min", "dt_max", "lr")


class S4D(nn.Module):
    """S4D with its output layer. Source: state-spaces/s4, `models/s4/s4d.py`, arXiv 2206.11893.

    Args:
        d_model: channels.
        d_state: conjugate pairs a channel.
        transposed: whether the input is (batch, channel, token), as upstream's default, or (batch, token, channel).

    Example:
        >>> output, state = S4D(4, 2)(torch.ones(2, 4, 5))
        >>> output.shape, state
        (torch.Size([2, 4, 5]), None)
    """

    def __init__(self, d_model: int, d_state: int, transposed: bool = True):
        super().__init__()
        self.transposed = transposed
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model, d_state)
        self.activation = nn.GELU()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch channel token"],
        attention_mask: Int[Tensor, "batch token"] | None = None,
    ) -> tuple[Float[Tensor, "batch channel token"], None]:
        """Return the output, and None in the place of upstream's state; padding (0 in `attention_mask`) is not read."""
        x = hidden_states.mT if self.transposed else hidden_states
        x = x if attention_mask is None else x * attention_mask[..., None].to(x.dtype)
        delta, A, B, C = self.kernel()
        y = selective_scan(
            x[..., None], delta.expand(x.shape), A, B, C, self.D, discretization="zoh", backend="cpu"
        ).y[..., 0]  # fmt: skip
        out = self.output_linear(self.activation(y).mT.to(x.dtype))
        return (out if self.transposed else out.mT), None


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether all of S4D's names stand at the top of the state dict.

    Source: ours.

    Example:
        >>> matches({}, KEYS), matches({}, ["kernel.C"])
        (True, False)
    """
    return "model_type" not in config and set(KEYS) <= set(keys)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Recipe:
    """Recipe of the layer; its sizes are those of `kernel.log_A_real`.

    Source: ours; the table is at the module's head.

    Raises:
        ValueError: a field is unknown or contradicts the weights.

    Example:
        >>> convert({}, {name: torch.ones(4, 2) for name in KEYS}, "here").module.D.shape
        torch.Size([4])
    """
    refuse_unknown(config, _FIELDS, where)
    shape = weights["kernel.log_A_real"].shape
    if len(shape) != 2:
        raise ValueError(f"{where}: kernel.log_A_real must be (channel, state), got {tuple(shape)}.")
    sizes = {"d_model": (shape[0],), "d_state": (2 * shape[1],), "transposed": (True, False)}
    refuse_values(config, sizes, where, why="it is what the weights have")
    with torch.device("meta"):
        return Recipe(S4D(*shape, transposed=config.get("transposed", True)), weights)
