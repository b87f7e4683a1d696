"""The weights of one Mamba-1 block under their own names, and the transformers modules they are poured into.

Symbols, for input u (token, model), with lag 0 the current token:

    x = silu(conv * (in_proj_x u) + conv_bias)      z = in_proj_z u
    delta = softplus(dt_proj x_proj_dt x + dt_bias)  B = x_proj_B x  C = x_proj_C x
    h <- exp(-exp(A_log) delta) h + delta B x        out = out_proj (silu(z) (C h + D x))
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["INVERSE_SOFTPLUS_ONE", "SILU_ONE", "Block", "check_dtype", "fresh", "pour", "silu"]

CONV_KERNEL = 4
INVERSE_SOFTPLUS_ONE = math.log(math.expm1(1.0))  # softplus of it is 1


def silu(value: float) -> float:
    """Return `value` / (1 + exp(-`value`))."""
    return value / (1 + math.exp(-value))


SILU_ONE = silu(1.0)


@dataclass(frozen=True, eq=False)
class Block:
    """The weights of a Mamba-1 block, float64; all zero until written."""

    in_proj_x: Float[np.ndarray, "channel model"]
    in_proj_z: Float[np.ndarray, "channel model"]
    conv: Float[np.ndarray, "channel lag"]
    conv_bias: Float[np.ndarray, " channel"]
    x_proj_dt: Float[np.ndarray, "rank channel"]
    x_proj_B: Float[np.ndarray, "state channel"]
    x_proj_C: Float[np.ndarray, "state channel"]
    dt_proj: Float[np.ndarray, "channel rank"]
    dt_bias: Float[np.ndarray, " channel"]
    A_log: Float[np.ndarray, "channel state"]
    D: Float[np.ndarray, " channel"]
    out_proj: Float[np.ndarray, "model channel"]

    @classmethod
    def zeros(cls, model: int, channel: int, state: int, rank: int) -> "Block":
        """Return a block of these sizes, every weight zero."""
        sizes = {"model": model, "channel": channel, "state": state, "rank": rank, "lag": CONV_KERNEL}
        dims = {name: hint.dim_str.split() for name, hint in cls.__annotations__.items()}
        return cls(**{name: np.zeros([sizes[dim] for dim in of]) for name, of in dims.items()})

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights under the names, and in the layout, of transformers' `MambaMixer`."""
        arrays = {
            "A_log": self.A_log,
            "D": self.D,
            "conv1d.weight": self.conv[:, None, ::-1],
            "conv1d.bias": self.conv_bias,
            "in_proj.weight": np.concatenate([self.in_proj_x, self.in_proj_z]),
            "x_proj.weight": np.concatenate([self.x_proj_dt, self.x_proj_B, self.x_proj_C]),
            "dt_proj.weight": self.dt_proj,
            "dt_proj.bias": self.dt_bias,
            "out_proj.weight": self.out_proj,
        }
        return {name: torch.tensor(array.copy(), dtype=dtype) for name, array in arrays.items()}

    def config(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Return the transformers `MambaConfig` of these sizes, with further `settings`."""
        from transformers import MambaConfig

        (channel, model), (rank, _), (state, _) = self.in_proj_x.shape, self.x_proj_dt.shape, self.x_proj_B.shape
        sizes = {"hidden_size": model, "expand": channel // model, "state_size": state, "time_step_rank": rank}
        fixed = {"num_hidden_layers": 1, "conv_kernel": CONV_KERNEL, "use_bias": False, "dtype": dtype}
        return MambaConfig(**sizes, **fixed, **settings)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype in which the constructions are not meant to hold."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")


def fresh(config: Any, seed: int = 0) -> nn.Module:
    """Return the module `config.architectures` names, as transformers initialises it; the global seed is left alone."""
    import transformers

    (name,) = config.architectures
    bare = name.removesuffix("Mixer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == bare:
            model: Any = getattr(transformers, name)(config)
        else:
            model = getattr(transformers, f"{bare}Model")(config).layers[0].mixer
    return model.to(config.dtype).eval()


def pour(config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Return the module of `config` that holds `weights`, each of which it must have and nothing else."""
    model = fresh(config)
    model.load_state_dict(weights, strict=True)
    return model
