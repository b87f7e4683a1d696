"""transformers' MambaMixer (S6): A per channel and state, delta per channel.

[x, z] = in_proj u;  x = silu(conv x);  [dt, B, C] = x_proj x;  delta = softplus(dt_proj dt + bias)
h = exp(delta A) h + delta B x;  y = C h + D x;  out = out_proj(y silu(z))
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes, causal_conv, masked, no_shortcut
from mamba_probe.mixers.tap import Tap

__all__ = ["MambaAdapter"]


class MambaAdapter(MixerAdapter):
    """Reads and takes over `transformers.models.mamba.modeling_mamba.MambaMixer`."""

    class_path = ("transformers.models.mamba.modeling_mamba", "MambaMixer")
    family = "mamba"

    @property
    def sizes(self) -> Sizes:
        (channel, state), width = self.mixer.A_log.shape, self.mixer.in_proj.weight.shape[1]
        return Sizes("mamba", channel, 1, 1, state, width)

    @property
    def _sections(self) -> list[int]:
        """Sizes of dt, B and C along x_proj's rows."""
        return [self.mixer.dt_proj.weight.shape[1], self.sizes.n_states, self.sizes.n_states]

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        return {
            "mamba_selective_scan": _scan(tap),
            "mamba_selective_state_update": _step(tap),
            "causal_conv1d_fn": tap.conv(module["causal_conv1d_fn"]),
            "causal_conv1d_update": tap.conv(module["causal_conv1d_update"]),
            "mamba_inner_fn": no_shortcut,
        }

    def weights(self) -> dict[str, Labelled]:
        mixer, sizes = self.mixer, self.sizes
        in_x, in_z = mixer.in_proj.weight.split(sizes.n_heads)
        dt, B, C = mixer.x_proj.weight.split(self._sections)
        labelled = {
            "A": (("channel", "state"), -torch.exp(self._wide(mixer.A_log))),
            "D": (("channel",), mixer.D),
            "dt_bias": (("channel",), mixer.dt_proj.bias),
            "in_proj_x": (("channel", "model"), in_x),
            "in_proj_z": (("channel", "model"), in_z),
            "conv": (("channel", "lag"), mixer.conv1d.weight[:, 0].flip(-1)),
            "x_proj_dt": (("rank", "channel"), dt),
            "x_proj_B": (("state", "channel"), B),
            "x_proj_C": (("state", "channel"), C),
            "dt_proj": (("channel", "rank"), mixer.dt_proj.weight),
            "out_proj": (("model", "channel"), mixer.out_proj.weight),
        }
        if mixer.conv1d.bias is not None:
            labelled["conv_bias"] = (("channel",), mixer.conv1d.bias)
        return labelled

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        mixer = self.mixer
        w = {name: tensor.detach().double() for name, tensor in mixer.state_dict().items()}
        x, z = F.linear(masked(hidden.double(), valid), w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, -1)
        x = masked(causal_conv(x, w["conv1d.weight"][:, 0].flip(-1), w.get("conv1d.bias")), valid)
        dt, B, C = F.linear(x, w["x_proj.weight"]).split(self._sections, -1)
        result = selective_scan(
            x[..., None], F.linear(dt, w["dt_proj.weight"]), -torch.exp(w["A_log"]), B[:, :, None], C[:, :, None],
            w["D"], z[..., None], delta_bias=w["dt_proj.bias"], delta_softplus=True,
            emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        out = F.linear(result.y[..., 0], w["out_proj.weight"], w.get("out_proj.bias"))
        return {"delta": result.emission.delta, "B": B[:, :, None], "C": C[:, :, None], "out": out}


def _scan(tap: Tap) -> Callable[..., Any]:
    def mamba_selective_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **_options: Any,
    ) -> Any:  # fmt: skip
        result = tap.scan(
            hidden_states.transpose(1, 2)[..., None], dt.transpose(1, 2), A,
            B.transpose(1, 2)[:, :, None], C.transpose(1, 2)[:, :, None],
            D, None if z is None else z.transpose(1, 2)[..., None],
            delta_bias=delta_bias, delta_softplus=delta_softplus,
        )  # fmt: skip
        y = result.y[..., 0].transpose(1, 2)
        return (y, result.last_state[:, :, 0]) if return_last_state else y

    return mamba_selective_scan


def _step(tap: Tap) -> Callable[..., Tensor]:
    def mamba_selective_state_update(
        state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, **_options: Any,
    ) -> Tensor:  # fmt: skip
        result = tap.scan(
            hidden_states[:, None, :, None], dt[:, None], A, B[:, None, None], C[:, None, None],
            None if D is None else D.float(), None if z is None else z[:, None, :, None],
            delta_bias=dt_bias, delta_softplus=dt_softplus, initial_state=state[:, :, None],
        )  # fmt: skip
        state.copy_(result.last_state[:, :, 0].to(state.dtype))
        return result.y[:, 0, :, 0]

    return mamba_selective_state_update
