"""Vim's Mamba: two Mamba-1 scans of one in_proj's x and z, one of them of the flipped sequence, and one out_proj.

[x, z] = in_proj u;  y = S(x, z) + flip S_b(flip x, flip z);  out = out_proj y, halved where it divides

S is a MambaMixer's convolution, projections and gated scan; S_b has its own weights ("v2"), or but its own A ("v1").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers.base import Labelled, Sizes, convolved, double
from mamba_probe.mixers.bidirectional import Bidirectional, Half, of_both, side_by_side
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.mamba_ssm import convolutions
from mamba_probe.mixers.tap import Call, Tap

__all__ = ["VimAdapter"]


class VimAdapter(Bidirectional, MambaAdapter):
    """Reads and takes over Vim's `mamba_ssm.modules.mamba_simple.Mamba`, bimamba_type "v2" or "v1".

    In "v1" both directions share everything but A, the convolution from the first token to the last too. In the weights
    out_proj is that of the sum of both directions, if_divide_out's 1/2 and init_layer_scale's factor multiplied in.
    """

    class_path = ("mamba_ssm.modules.mamba_simple", "Mamba")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is mamba_ssm's class as Vim has it, with a second A."""
        return super().matches(module) and "A_b_log" in module._parameters

    @property
    def sizes(self) -> Sizes:
        """Channels and states; two directions."""
        return replace(super().sizes, directions=("forward", "backward"))

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Ours in the place of its fused kernels, which hold its scans; its slow path has but the forward one."""
        half = Half(tap)
        convolve = convolutions(half, module["causal_conv1d_fn"] if self.mixer.conv1d.weight.is_cuda else None, None)
        inner = _Inner(half, convolve["causal_conv1d_fn"])
        return {
            "mamba_inner_fn_no_out_proj": inner.one_way,
            "bimamba_inner_fn": inner.both_ways,
            "selective_scan_fn": self._one_way_only,
        }

    def _one_way_only(self, *_args: Any, **_options: Any) -> NoReturn:
        raise ValueError(
            f"layer {self.layer}: with use_fast_path=False Vim's own code leaves the backward scan out, so that nothing"
            " here is bidirectional: set use_fast_path = True, as its checkpoints were trained"
        )

    @property
    def _ways(self) -> tuple["_Way", "_Way"]:
        mixer, suffix = self.mixer, "_b" if self.mixer.bimamba_type == "v2" else ""
        shared = {"in_proj": mixer.in_proj, "out_proj": mixer.out_proj}
        own = {name: getattr(mixer, name) for name in ("conv1d", "x_proj", "dt_proj", "D", "A_log")}
        back = {name: getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
        return _Way(shared | own), _Way(shared | back | {"A_log": mixer.A_b_log})

    @property
    def _factor(self) -> Tensor | float:
        """Of the sum of both directions after out_proj, its bias left out."""
        divided = self.mixer.bimamba_type == "v2" and self.mixer.if_divide_out
        return getattr(self.mixer, "gamma", 1.0) / (2 if divided else 1)

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        forward, backward = self._ways
        found = of_both(forward.weights(), backward.weights(), shared=("in_proj", "out_proj"))
        dims, out = found["out_proj"]
        found["out_proj"] = (dims, out * torch.as_tensor(self._factor)[..., None])
        if "out_proj_bias" in found:
            found["out_proj_bias"] = (("model",), self.mixer.out_proj.bias * getattr(self.mixer, "gamma", 1.0))
        return found

    def statics(self) -> dict[str, Labelled]:
        """The trace's variables that are constant in this family."""
        forward, backward = self._ways
        return of_both(forward.statics(), backward.statics())

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        forward, backward = self._ways
        x, z = F.linear(hidden.double(), *forward.linear64("in_proj")).chunk(2, -1)
        first = forward.scanned(convolved(forward.mixer.conv1d, x), z)
        flipped = x.flip(1) if self.mixer.bimamba_type == "v2" else convolved(forward.mixer.conv1d, x).flip(1)
        if self.mixer.bimamba_type == "v2":
            flipped = convolved(backward.mixer.conv1d, flipped)
        found = side_by_side(first, backward.scanned(flipped, z.flip(1)), directed=False)
        weights = self.weights()
        out = F.linear(found.pop("y").sum(-1), double(weights["out_proj"][1]))
        return found | {"out": out + double(weights["out_proj_bias"][1]) if "out_proj_bias" in weights else out}


class _Way(MambaAdapter):
    """One direction of Vim's Mamba, read as a mixer of its own; of every projection forward takes the weight itself."""

    def __init__(self, parts: Mapping[str, Any]):
        self.mixer = SimpleNamespace(**parts)

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix by which a projection acts, (out, in), and its bias."""
        projection = getattr(self.mixer, name)
        return projection.weight, projection.bias

    def scanned(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """delta, B, C and gated y of the scan of x (batch, token, channel), float64, after the convolution."""
        dt, B, C = F.linear(x, self.linear64("x_proj")[0]).split(self._sections, -1)
        result = selective_scan(
            x[..., None], F.linear(dt, double(self.mixer.dt_proj.weight)), -torch.exp(double(self.mixer.A_log)),
            B[:, :, None], C[:, :, None], double(self.mixer.D), z[..., None],
            delta_bias=double(self.mixer.dt_proj.bias), delta_softplus=True, emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        return {"delta": result.emission.delta, "B": B[:, :, None], "C": C[:, :, None], "y": result.y[..., 0]}


class _Inner:
    """In the place of Vim's fused kernels: convolution, projections and our scan, in which a half of the call runs."""

    def __init__(self, half: Half, convolve: Callable[..., Tensor]):
        self._half, self._convolve = half, convolve

    def one_way(
        self, xz: Tensor, conv: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, A: Tensor,
        _B: None, _C: None, D: Tensor, **options: Any,
    ) -> Tensor:  # fmt: skip
        """`mamba_inner_fn_no_out_proj`, called on the sequence and then on the flipped one: gated y."""
        x, z = xz.chunk(2, dim=1)
        x, dt, B, C = self._projected(x, conv, conv_bias, x_proj, dt_proj)
        return self._scanned(x, dt, A, B, C, D, z.mT, options).mT

    def both_ways(
        self, xz: Tensor, conv: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor, out_proj: Tensor,
        out_bias: Tensor | None, A: Tensor, A_b: Tensor, _B: None, _C: None, D: Tensor, **options: Any,
    ) -> Tensor:  # fmt: skip
        """`bimamba_inner_fn`: what one convolution and projection made, scanned both ways; through out_proj."""
        x, z = xz.chunk(2, dim=1)
        moving = [*self._projected(x, conv, conv_bias, x_proj, dt_proj), z.mT]
        ways = []
        for matrix, flipped in ((A, False), (A_b, True)):
            x, dt, B, C, gate = (tensor.flip(1) if flipped else tensor for tensor in moving)
            y = self._scanned(x, dt, matrix, B, C, D, gate, options)
            ways.append(y.flip(1) if flipped else y)
        return F.linear(ways[0] + ways[1], out_proj, out_bias)

    def _projected(
        self, x: Tensor, conv: Tensor, conv_bias: Tensor | None, x_proj: Tensor, dt_proj: Tensor
    ) -> Sequence[Tensor]:
        """x after the convolution, dt, B and C, (batch, token, ...)."""
        x = self._convolve(x, conv[:, 0], conv_bias, activation="silu").mT
        rank, n_states = dt_proj.shape[1], (len(x_proj) - dt_proj.shape[1]) // 2
        dt, B, C = F.linear(x, x_proj).split([rank, n_states, n_states], -1)
        return x, F.linear(dt, dt_proj), B, C

    def _scanned(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        half = self._half
        half.call = Call(half.layer)
        try:
            result = half.scan(x[..., None], dt, A, B[:, :, None], C[:, :, None], D, z[..., None], **options)
            half.receive(half.call)
        finally:
            half.call = None
        return result.y[..., 0].to(x.dtype)
