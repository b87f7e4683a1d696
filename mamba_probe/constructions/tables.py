"""The weights of one block under their own names, and the modules they are poured into.

Symbols, for input u (token, model), with lag 0 the current token; Mamba-1:

    x = silu(conv * (in_proj_x u) + conv_bias)      z = in_proj_z u
    delta = softplus(dt_proj x_proj_dt x + dt_bias)  B = x_proj_B x  C = x_proj_C x
    h <- exp(-exp(A_log) delta) h + delta B x        out = out_proj (silu(z) (C h + D x))

S4D is the same with delta = exp(log_dt), B = 1 and C constant, a real A = -exp(log_A_real), and zoh; a state counts
twice in the sum of y, for itself and its conjugate, so that C = 1/2 reads it once.
Mamba-2, in one group; channels are those of head 0, then of head 1, ...:

    x = silu(conv_x * (in_proj_x u) + conv_x_bias), and so B and C       z = in_proj_z u
    delta = softplus(in_proj_dt u + dt_bias), one a head, of the current token alone
    h <- exp(-exp(A_log) delta) h + delta B x        y = silu(z) (C h + D x)
    out = out_proj (norm y / sqrt(mean y^2 + epsilon))
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mamba_probe import blocks

__all__ = [
    "INVERSE_SOFTPLUS_ONE", "SILU_ONE", "Mamba2Table", "MambaTable", "S4DTable", "Table", "check_dtype", "fresh",
    "mixer_of", "own_mixer_of", "pour", "silu",
]  # fmt: skip

CONV_KERNEL = 4
CHUNK = 64  # tokens Mamba-2's scan takes at a time; any number gives the same output
INVERSE_SOFTPLUS_ONE = math.log(math.expm1(1.0))  # softplus of it is 1


def silu(value: float) -> float:
    """Return `value` / (1 + exp(-`value`))."""
    return value / (1 + math.exp(-value))


SILU_ONE = silu(1.0)


class Table(ABC):
    """Weights by name, float64, each annotated with its dimensions."""

    D: Float[np.ndarray, " head"]

    @classmethod
    def zeros(cls, model: int, channel: int, **sizes: int) -> Self:
        """Return a block of these sizes (and state, rank or head), every weight zero but a norm's scale."""
        sizes |= {"model": model, "channel": channel, "lag": CONV_KERNEL}
        dims = {name: hint.dim_str.split() for name, hint in cls.__annotations__.items()}
        table = cls(**{name: np.zeros([sizes[dim] for dim in of]) for name, of in dims.items()})
        if "norm" in dims:
            vars(table)["norm"][:] = 1
        return table

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights under upstream's names and in its layout."""

    @property
    @abstractmethod
    def own(self) -> dict[str, Any]:
        """Kind and sizes of our own block that holds these weights, see `mamba_probe.blocks.build`."""

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights under upstream's names, as transformers' mixers and ours load them."""
        return {name: torch.tensor(array.copy(), dtype=dtype) for name, array in self.arrays().items()}


@dataclass(frozen=True, eq=False)
class MambaTable(Table):
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

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights under upstream's names and in its layout."""
        return {
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

    @property
    def own(self) -> dict[str, Any]:
        """Kind and sizes of our own block that holds these weights."""
        model, channel = self.out_proj.shape
        states = {"d_state": self.A_log.shape[1], "dt_rank": self.dt_proj.shape[1]}
        return {"kind": "mamba1", "d_model": model, "d_inner": channel, "d_conv": CONV_KERNEL, **states}

    def config(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Return the transformers `MambaConfig` of these sizes, with further `settings`."""
        from transformers import MambaConfig

        (channel, model), (rank, _), (state, _) = self.in_proj_x.shape, self.x_proj_dt.shape, self.x_proj_B.shape
        sizes = {"hidden_size": model, "expand": channel // model, "state_size": state, "time_step_rank": rank}
        fixed = {"num_hidden_layers": 1, "conv_kernel": CONV_KERNEL, "use_bias": False, "dtype": dtype}
        return MambaConfig(**sizes, **fixed, **settings)


@dataclass(frozen=True, eq=False)
class Mamba2Table(Table):
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

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights under upstream's names and in its layout."""
        projections = [self.in_proj_z, self.in_proj_x, self.in_proj_B, self.in_proj_C, self.in_proj_dt]
        return {
            "A_log": self.A_log,
            "D": self.D,
            "conv1d.weight": np.concatenate([self.conv_x, self.conv_B, self.conv_C])[:, None, ::-1],
            "conv1d.bias": np.concatenate([self.conv_x_bias, self.conv_B_bias, self.conv_C_bias]),
            "dt_bias": self.dt_bias,
            "in_proj.weight": np.concatenate(projections),
            "norm.weight": self.norm,
            "out_proj.weight": self.out_proj,
        }

    @property
    def own(self) -> dict[str, Any]:
        """Kind and sizes of our own block that holds these weights."""
        (model, channel), state, head = self.out_proj.shape, len(self.in_proj_B), self.D.size
        return {
            "kind": "mamba2",
            "d_model": model,
            "d_inner": channel,
            "d_conv": CONV_KERNEL,
            "d_state": state,
            "n_heads": head,
        }

    def config(self, dtype: torch.dtype, **settings: Any) -> Any:
        """Return the transformers `Mamba2Config` of these sizes, with further `settings`."""
        from transformers import Mamba2Config

        (channel, model), (state, _), head = self.in_proj_x.shape, self.in_proj_B.shape, self.D.size
        sizes = {"hidden_size": model, "expand": channel // model, "state_size": state, "num_heads": head}
        fixed = {"head_dim": channel // head, "n_groups": 1, "chunk_size": CHUNK, "conv_kernel": CONV_KERNEL}
        layers = {"num_hidden_layers": 1, "use_bias": False, "dtype": dtype}
        return Mamba2Config(**sizes, **fixed, **(layers | settings))


@dataclass(frozen=True, eq=False)
class S4DTable(Table):
    """The weights of an S4D block with real A and C, float64; all zero until written."""

    in_proj_x: Float[np.ndarray, "channel model"]
    in_proj_z: Float[np.ndarray, "channel model"]
    conv: Float[np.ndarray, "channel lag"]
    conv_bias: Float[np.ndarray, " channel"]
    log_dt: Float[np.ndarray, " channel"]
    log_A_real: Float[np.ndarray, "channel state"]
    C: Float[np.ndarray, "channel state"]
    D: Float[np.ndarray, " channel"]
    out_proj: Float[np.ndarray, "model channel"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights under upstream's names and in its layout."""
        return {
            "D": self.D,
            "conv1d.weight": self.conv[:, None, ::-1],
            "conv1d.bias": self.conv_bias,
            "in_proj.weight": np.concatenate([self.in_proj_x, self.in_proj_z]),
            "kernel.log_dt": self.log_dt,
            "kernel.log_A_real": self.log_A_real,
            "kernel.A_imag": np.zeros_like(self.log_A_real),
            "kernel.C": np.stack([self.C, np.zeros_like(self.C)], axis=-1),
            "out_proj.weight": self.out_proj,
        }

    @property
    def own(self) -> dict[str, Any]:
        """Kind and sizes of our own block that holds these weights."""
        (model, channel), state = self.out_proj.shape, self.C.shape[1]
        return {"kind": "s4d", "d_model": model, "d_inner": channel, "d_conv": CONV_KERNEL, "d_state": state}


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype in which the constructions are not meant to hold."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")


def fresh(config: Any, seed: int = 0) -> nn.Module:
    """Return the module that `config` describes, initialised; the global seed is left alone.

    A dict is that of `mamba_probe.blocks`; otherwise `config.architectures` names a class of transformers.
    """
    import transformers

    if isinstance(config, dict):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return blocks.build(config).eval()
    (name,) = config.architectures
    bare = name.removesuffix("Mixer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == bare:
            model: Any = getattr(transformers, name)(config)
        else:
            model = getattr(transformers, f"{bare}Model")(config).layers[0].mixer
            model.config = config  # Mamba2Mixer keeps none
    return model.to(config.dtype).eval()


def pour(config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """Return the module of `config` that holds `weights`, each of which it must have and nothing else."""
    model = fresh(config).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=True)
    return model


def mixer_of(table: MambaTable | Mamba2Table, dtype: torch.dtype) -> nn.Module:
    """Return transformers' bare mixer that holds `table`."""
    name = "MambaMixer" if isinstance(table, MambaTable) else "Mamba2Mixer"
    return pour(table.config(dtype, architectures=[name]), table.state_dict(dtype))


def own_mixer_of(table: Table, dtype: torch.dtype, gated_norm: bool = True) -> nn.Module:
    """Return our own block (`mamba_probe.blocks`) that holds `table`; Mamba-2 may do without its norm."""
    weights, own = table.state_dict(dtype), table.own
    if not gated_norm:
        own["gated_norm"] = False
        del weights["norm.weight"]
    return pour({"mixers": [own], "vocab_size": None}, weights)
