"""transformers' MambaMixer (S6): A per channel and state, delta per channel.

[x, z] = in_proj u;  x = silu(conv x);  [dt, B, C] = x_proj x;  delta = softplus(dt_proj dt + bias)
h = exp(delta A) h + delta B x;  y = C h + D x;  out = out_proj(y silu(z))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import ScanResult, selective_scan
from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes, convolved, double, masked, no_shortcut
from mamba_probe.mixers.tap import Tap

__all__ = ["MambaAdapter", "Scanner"]


class Scanner(Protocol):
    """What scans in the place of the library's functions: a tap, or several side by side."""

    scan: Callable[..., ScanResult]


class MambaAdapter(MixerAdapter):
    """Reads and takes over `transformers.models.mamba.modeling_mamba.MambaMixer`."""

    class_path = ("transformers.models.mamba.modeling_mamba", "MambaMixer")
    family = "mamba"
    shortcuts: ClassVar[tuple[str, ...]] = ("mamba_inner_fn",)
    """Fused kernels that its forward would call in place of the scan while training."""

    @property
    def sizes(self) -> Sizes:
        channel, state = self.mixer.A_log.shape
        return Sizes("mamba", channel, 1, 1, state, self.mixer.in_proj.in_features)

    @property
    def _sections(self) -> list[int]:
        """Sizes of dt, B and C along x_proj's rows."""
        return [self.mixer.dt_proj.weight.shape[1], self.sizes.n_states, self.sizes.n_states]

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        convolutions = {name: tap.conv(module[name]) for name in ("causal_conv1d_fn", "causal_conv1d_update")}
        return self._scans(tap) | convolutions | dict.fromkeys(self.shortcuts, no_shortcut)

    def _scans(self, scanner: Scanner) -> dict[str, Callable[..., Any]]:
        return {"mamba_selective_scan": _scan(scanner), "mamba_selective_state_update": _step(scanner)}

    def weights(self) -> dict[str, Labelled]:
        mixer = self.mixer
        dt, B, C = self.linear("x_proj")[0].split(self._sections)
        labelled = {
            "D": (("channel",), mixer.D),
            "dt_bias": (("channel",), mixer.dt_proj.bias),
            "x_proj_dt": (("rank", "channel"), dt),
            "x_proj_B": (("state", "channel"), B),
            "x_proj_C": (("state", "channel"), C),
            "dt_proj": (("channel", "rank"), mixer.dt_proj.weight),
        }
        return self.statics() | labelled | self._around()

    def statics(self) -> dict[str, Labelled]:
        return {"A": (("channel", "state"), -torch.exp(self._wide(self.mixer.A_log)))}

    def _around(self) -> dict[str, Labelled]:
        """Weights before x_proj and after the scan."""
        conv, (out, out_bias), (weight, bias) = self.mixer.conv1d, self.linear("out_proj"), self.linear("in_proj")
        in_x, in_z = self._x_and_z(weight)
        labelled: dict[str, Labelled] = {
            "in_proj_x": (("channel", "model"), in_x),
            "in_proj_z": (("channel", "model"), in_z),
            "conv": (("channel", "lag"), conv.weight[:, 0].flip(-1)),
            "out_proj": (("model", "channel"), out),
        }
        if bias is not None:
            bias_x, bias_z = self._x_and_z(bias)
            labelled |= {"in_proj_bias_x": (("channel",), bias_x), "in_proj_bias_z": (("channel",), bias_z)}
        if conv.bias is not None:
            labelled["conv_bias"] = (("channel",), conv.bias)
        if out_bias is not None:
            labelled["out_proj_bias"] = (("model",), out_bias)
        return labelled

    def _x_and_z(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows of in_proj, or of its bias, that make x, and those that make z."""
        return rows.chunk(2)

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        mixer = self.mixer
        x, z = self._projected(hidden, valid)
        x = masked(convolved(mixer.conv1d, x), valid)
        dt, B, C = self._normed(F.linear(x, self.linear64("x_proj")[0]).split(self._sections, -1))
        result = selective_scan(
            x[..., None], F.linear(dt, double(mixer.dt_proj.weight)), -torch.exp(double(mixer.A_log)),
            B[:, :, None], C[:, :, None], double(mixer.D), z[..., None], delta_bias=double(mixer.dt_proj.bias),
            delta_softplus=True, emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        out = F.linear(result.y[..., 0], *self.linear64("out_proj"))
        return {"delta": result.emission.delta, "B": B[:, :, None], "C": C[:, :, None], "out": out}

    def _projected(self, hidden: Tensor, valid: Tensor | None) -> Sequence[Tensor]:
        """x and z in float64 as they go on from in_proj."""
        return F.linear(masked(hidden.double(), valid), *self.linear64("in_proj")).chunk(2, -1)

    def _normed(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """dt, B and C in float64 as dt_proj and the scan take them, from what x_proj made."""
        return parts


def _scan(scanner: Scanner) -> Callable[..., Any]:
    def mamba_selective_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **_options: Any,
    ) -> Any:  # fmt: skip
        result = scanner.scan(
            hidden_states.transpose(1, 2)[..., None], dt.transpose(1, 2), A,
            B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None],
            D, None if z is None else z.transpose(1, 2)[..., None],
            delta_bias=delta_bias, delta_softplus=delta_softplus,
        )  # fmt: skip
        y = result.y[..., 0].transpose(1, 2)
        return (y, result.last_state[:, :, 0]) if return_last_state else y

    return mamba_selective_scan


def _step(scanner: Scanner) -> Callable[..., Tensor]:
    def mamba_selective_state_update(
        state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, **_options: Any,
    ) -> Tensor:  # fmt: skip
        result = scanner.scan(
            hidden_states[:, None, :, None], dt[:, None], A, B[:, None, None], C[:, None, None],
            None if D is None else D.float(), None if z is None else z[:, None, :, None],
            delta_bias=dt_bias, delta_softplus=dt_softplus, initial_state=state[:, :, None],
        )  # fmt: skip
        state.copy_(result.last_state[:, :, 0].to(state.dtype))
        return result.y[:, 0, :, 0]

    return mamba_selective_state_update
