"""The weights of one Mamba-2 block under their own names, in one group, and transformers' layout of them.

Symbols, for input u (token, model), with lag 0 the current token; channels are those of head 0, then of head 1, ...:

    x = silu(conv_x * (in_proj_x u) + conv_x_bias), and so B and C       z = in_proj_z u
    delta = softplus(in_proj_dt u + dt_bias), one a head, of the current token alone
    h <- exp(-exp(A_log) delta) h + delta B x        y = silu(z) (C h + D x)
    out = out_proj (norm y / sqrt(mean y^2 + epsilon))
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mamba_probe.constructions.block import CONV_KERNEL

__all__ = ["Mamba2Block"]

CHUNK = 64  # tokens the scan takes at a time; any number gives the same output


@dataclass(frozen=True, eq=False)
class Mamba2Block:
    """The weights of a Mamba-2 block, float64; all zero until written, but the norm's scale, which is one."""

    in_proj_x: Float[np.ndarray, "channel model"]
    in_proj_z: Float[np.ndarray, "channel model"]
    in_proj_B: Float[np.ndarray, "state model"]
    in_proj_C: Float[np.ndarray, "state model"]
    in_proj_dt: Float[np.ndarray, "head model"]
    conv_x: Float[np.ndarray, "channel lag"]
    conv_B: Float[np.ndarray, "state lag"]
    conv_C: Float[np.ndarray, "state lag"]
    conv_x_bias: Float[np.ndarray, " channel"]
    conv_B_bias: Float[np.ndarray, " state"]
    conv_C_bias: Float[np.ndarray, " state"]
    dt_bias: Float[np.ndarray, " head"]
    A_log: Float[np.ndarray, " head"]
    D: Float[np.ndarray, " head"]
    norm: Float[np.ndarray, " channel"]
    out_proj: Float[np.ndarray, "model channel"]

    @classmethod
    def zeros(cls, model: int, channel: int, state: int, head: int) -> "Mamba2Block":
        """Return a block of these sizes, every weight zero but the norm's scale."""
        sizes = {"model": model, "channel": channel, "state": state, "head": head, "lag": CONV_KERNEL}
        dims = {name: hint.dim_str.split() for name, hint in cls.__annotations__.items()}
        block = cls(**{name: np.zeros([sizes[dim] for dim in of]) for name, of in dims.items()})
        block.norm[:] = 1
        return block

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights under the names, and in the layout, of transformers' `Mamba2Mixer`."""
        projections = [self.in_proj_z, self.in_proj_x, self.in_proj_B, self.in_proj_C, self.in_proj_dt]
        arrays = {
            "A_log": self.A_log,
            "D": self.D,
            "conv1d.weight": np.concatenate([self.conv_x, self.conv_B, self.conv_C])[:, None, ::-1],
            "conv1d.bias": np.concatenate([self.conv_x_bias, self.conv_B_bias, self.conv_C_bias]),
            "dt_bias": self.dt_bias,
            "in_proj.weight": np.concatenate(projections),
            "norm.weight": self.norm,
            "out_proj.weight": self.out_proj,
        }
        return {name: torch.tensor(array.copy(), dtype=dtype) for name, array in arrays.items()}

    def config(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Return the transformers `Mamba2Config` of these sizes, with further `settings`."""
        from transformers import Mamba2Config

        (channel, model), (state, _), head = self.in_proj_x.shape, self.in_proj_B.shape, self.D.size
        sizes = {"hidden_size": model, "expand": channel // model, "state_size": state, "num_heads": head}
        fixed = {"head_dim": channel // head, "n_groups": 1, "chunk_size": CHUNK, "conv_kernel": CONV_KERNEL}
        layers = {"num_hidden_layers": 1, "use_bias": False, "dtype": dtype}
        return Mamba2Config(**sizes, **fixed, **(layers | settings))
