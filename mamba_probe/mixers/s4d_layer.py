"""The standalone S4D layer, `mamba_probe.formats.s4d.S4D`: what it is given goes straight into the scan.

h = exp(delta A) h + delta phi1(delta A) B u;  y = 2 Re(C h) + D u;  out = GLU(output_linear GELU(y)), with constant
delta, A, B and C; no projection in, no convolution, no gate of the scan: in a trace x is u, and there is no z.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers.base import Labelled, Sizes, masked
from mamba_probe.mixers.own import S4DAdapter
from mamba_probe.mixers.tap import Tap

__all__ = ["S4DLayerAdapter"]


class S4DLayerAdapter(S4DAdapter):
    """Reads and takes over `mamba_probe.formats.s4d.S4D`, of either layout; its channels are the model's features.

    In its weights glu_value and glu_gate (model, channel), with glu_value_bias and glu_gate_bias, are the halves of
    output_linear: out = v sigmoid(g), where v and g are what they make of GELU(y).
    """

    class_path = ("mamba_probe.formats.s4d", "S4D")
    editable = ("decay", "x", "y", "h")
    hooked = ("x", "y", "h")

    @property
    def sizes(self) -> Sizes:
        """Channels and states; each channel is a head and a group."""
        channel, state = self.mixer.kernel.A_imag.shape
        return Sizes("s4d", channel, 1, channel, state, channel, gated=False)

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Our scan, which has the tap's own signature."""
        return {"selective_scan": tap.scan}

    def taken(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, token, model) as the layer takes them, and the other way round."""
        return hidden.mT if self.mixer.transposed else hidden

    def given(self, returned: Any) -> Tensor:
        """The output (batch, token, model), without the place of upstream's state."""
        return self.taken(returned[0])

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the layer's scan.

        Raises:
            ValueError: the layer alone, transposed: what a probe is handed is (batch, token, model).
        """
        if self.mixer.transposed and not self.name:
            raise ValueError(
                "a probe is handed (batch, token, model), and this bare S4D takes (batch, channel, token): set"
                ' layer.transposed = False (it has no weights), or load with "transposed": false in config.json'
            )
        super().take_over(tap)

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        constants = {name: labelled for name, labelled in self.statics().items() if not name.endswith("_bar")}
        mixing = self.mixer.output_linear[0]
        value, gate = mixing.weight[..., 0].chunk(2)
        value_bias, gate_bias = mixing.bias.chunk(2)
        return constants | {
            "D": (("channel",), self.mixer.D),
            "glu_value": (("model", "channel"), value),
            "glu_gate": (("model", "channel"), gate),
            "glu_value_bias": (("model",), value_bias),
            "glu_gate_bias": (("model",), gate_bias),
        }

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        w = {name: tensor.detach().double() for name, tensor in self.mixer.state_dict().items()}
        x = masked(hidden.double(), valid)
        A = torch.complex(-torch.exp(w["kernel.log_A_real"]), w["kernel.A_imag"])
        B, C = torch.ones_like(A), torch.view_as_complex(w["kernel.C"])
        delta = torch.exp(w["kernel.log_dt"]).expand(x.shape)
        y = selective_scan(x[..., None], delta, A, B, C, w["D"], discretization="zoh", backend="naive").y[..., 0]
        mixed = F.linear(F.gelu(y), w["output_linear.0.weight"][..., 0], w["output_linear.0.bias"])
        per_token = {"B": B.expand(*x.shape[:2], -1, -1), "C": C.expand(*x.shape[:2], -1, -1)}
        return {"delta": delta, "out": F.glu(mixed, -1)} | per_token
