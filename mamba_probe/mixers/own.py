"""The blocks of `mamba_probe.blocks`: Mamba-1 and Mamba-2, read as transformers' mixers are, and S4D.

S4D: [x, z] = in_proj u;  x = silu(conv x);  h = exp(delta A) h + delta phi1(delta A) B x;  y = 2 Re(C h) + D x;
out = out_proj(y silu(z)), with constant delta, A, B and C.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.scan import selective_scan
from mamba_probe.kernels.scan.naive import write_scale
from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes, causal_conv, masked
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.mamba2 import Mamba2Adapter
from mamba_probe.mixers.tap import NO_LIMITS, Tap

__all__ = ["OwnMamba2Adapter", "OwnMambaAdapter", "S4DAdapter"]


class _Own(MixerAdapter):
    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Our functions in the place of the block's: the scan has the tap's own signature."""
        return {"selective_scan": tap.scan, "causal_conv1d_fn": tap.conv(module["causal_conv1d_fn"])}

    def _wide(self, A_log: Tensor) -> Tensor:
        return A_log if A_log.dtype == torch.float64 else A_log.float()


class OwnMambaAdapter(_Own, MambaAdapter):
    """Reads and takes over `mamba_probe.blocks.MambaBlock`."""

    class_path = ("mamba_probe.blocks", "MambaBlock")


class OwnMamba2Adapter(_Own, Mamba2Adapter):
    """Reads and takes over `mamba_probe.blocks.Mamba2Block`, whose norm may be a gate alone."""

    class_path = ("mamba_probe.blocks", "Mamba2Block")

    @property
    def sizes(self) -> Sizes:
        """Heads, channels, groups and states."""
        of = self.mixer.sizes
        per_head = of["d_inner"] // of["n_heads"]
        return Sizes("mamba2", of["n_heads"], per_head, of["n_groups"], of["d_state"], of["d_model"])

    @property
    def _limits(self) -> tuple[float, float]:
        return NO_LIMITS


class S4DAdapter(_Own):
    """Reads and takes over `mamba_probe.blocks.S4DBlock`."""

    class_path = ("mamba_probe.blocks", "S4DBlock")
    family = "s4d"
    discretization = "zoh"
    editable = ("conv", "gate", "decay", "x", "z", "y", "h")
    hooked = ("x", "z", "y", "h")  # the others are constants
    backends = ("naive", "cpu")

    @property
    def sizes(self) -> Sizes:
        """Channels and states; each channel is a head and a group."""
        of = self.mixer.sizes
        return Sizes("s4d", of["d_inner"], 1, of["d_inner"], of["d_state"], of["d_model"])

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        mixer = self.mixer
        in_x, in_z = mixer.in_proj.weight.split(self.sizes.n_heads)
        constants = {name: labelled for name, labelled in self.statics().items() if not name.endswith("_bar")}
        return constants | {
            "D": (("channel",), mixer.D),
            "in_proj_x": (("channel", "model"), in_x),
            "in_proj_z": (("channel", "model"), in_z),
            "conv": (("channel", "lag"), mixer.conv1d.weight[:, 0].flip(-1)),
            "conv_bias": (("channel",), mixer.conv1d.bias),
            "out_proj": (("model", "channel"), mixer.out_proj.weight),
        }

    def statics(self) -> dict[str, Labelled]:
        """Delta, A, B and C, and what follows from them: A_bar and B_bar."""
        with torch.no_grad():
            delta, A, B, C = self.mixer.kernel()
            A_bar, B_bar = torch.exp(delta[:, None] * A), write_scale(delta, A, self.discretization) * B
        constants: dict[str, Labelled] = {"delta": (("channel",), delta)}
        for name, matrix in {"A": A, "B": B, "C": C, "A_bar": A_bar, "B_bar": B_bar}.items():
            constants[name] = (("channel", "state"), matrix)
        return constants

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        w = {name: tensor.detach().double() for name, tensor in self.mixer.state_dict().items()}
        x, z = F.linear(masked(hidden.double(), valid), w["in_proj.weight"]).chunk(2, -1)
        x = masked(causal_conv(x, w["conv1d.weight"][:, 0].flip(-1), w["conv1d.bias"]), valid)
        A = torch.complex(-torch.exp(w["kernel.log_A_real"]), w["kernel.A_imag"])
        B, C = torch.ones_like(A), torch.view_as_complex(w["kernel.C"])
        delta = torch.exp(w["kernel.log_dt"]).expand(x.shape)
        result = selective_scan(
            x[..., None], delta, A, B, C, w["D"], z[..., None], discretization="zoh", backend="naive"
        )
        per_token = {"B": B.expand(*x.shape[:2], -1, -1), "C": C.expand(*x.shape[:2], -1, -1)}
        return {"delta": delta, "out": F.linear(result.y[..., 0], w["out_proj.weight"])} | per_token
