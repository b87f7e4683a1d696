"""transformers' Mamba2Mixer (SSD): one scalar A and delta a head.

[z, xBC, dt] = in_proj u;  xBC = silu(conv xBC);  delta = clamp(softplus(dt + bias))
h = exp(delta A) h + delta B x;  y = C h + D x;  out = out_proj(norm(y silu(z)))
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes, causal_conv, masked, no_shortcut
from mamba_probe.mixers.tap import OPEN_GATE, Tap

__all__ = ["Mamba2Adapter"]


class Mamba2Adapter(MixerAdapter):
    """Reads and takes over `transformers.models.mamba2.modeling_mamba2.Mamba2Mixer`."""

    class_path = ("transformers.models.mamba2.modeling_mamba2", "Mamba2Mixer")
    family = "mamba2"

    @property
    def sizes(self) -> Sizes:
        mixer = self.mixer
        return Sizes("mamba2", mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size, mixer.hidden_size)

    @property
    def _limits(self) -> tuple[float, float]:
        """Clamp of delta."""
        low, high = self.mixer.time_step_limit
        return low, high

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        return {
            "mamba2_chunk_scan": _scan(tap),
            "mamba2_selective_state_update": _step(tap),
            "causal_conv1d_fn": tap.conv(module["causal_conv1d_fn"]),
            "causal_conv1d_update": tap.conv(module["causal_conv1d_update"]),
            "mamba2_split_conv1d_scan_combined": no_shortcut,
        }

    def take_over(self, tap: Tap) -> None:
        """The gate acts after the scan, in the mixer's norm: it is noted, and opened by an edit, on its way in."""
        heads = (self.sizes.n_heads, self.sizes.head_channels)

        def at_norm(_norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            scan_output, gate = args
            if tap.call is not None and tap.listener is not None:
                tap.call.tensors["z"] = gate.unflatten(-1, heads)
            return (scan_output, torch.full_like(gate, OPEN_GATE) if tap.touches("gate") else gate)

        super().take_over(tap)
        self.mixer.norm.register_forward_pre_hook(at_norm)

    def release(self) -> None:
        if self.tap is not None:
            hooks = self.mixer.norm._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook.__module__ == __name__]:
                del hooks[key]
        super().release()

    def weights(self) -> dict[str, Labelled]:
        mixer, parts = self.mixer, self._parts()
        z, x, B, C, dt = mixer.in_proj.weight.split([parts[0], *parts])
        heads, groups = (self.sizes.n_heads, self.sizes.head_channels), (self.sizes.n_groups, self.sizes.n_states)
        conv_x, conv_B, conv_C = mixer.conv1d.weight[:, 0].flip(-1).split(parts[:3])
        per_head, per_group = ("head", "head_channel"), ("group", "state")
        labelled = {
            "A": (("head",), -torch.exp(self._wide(mixer.A_log))),
            "D": (("head",), mixer.D),
            "dt_bias": (("head",), mixer.dt_bias),
            "in_proj_x": ((*per_head, "model"), x.unflatten(0, heads)),
            "in_proj_z": ((*per_head, "model"), z.unflatten(0, heads)),
            "in_proj_B": ((*per_group, "model"), B.unflatten(0, groups)),
            "in_proj_C": ((*per_group, "model"), C.unflatten(0, groups)),
            "in_proj_dt": (("head", "model"), dt),
            "conv_x": ((*per_head, "lag"), conv_x.unflatten(0, heads)),
            "conv_B": ((*per_group, "lag"), conv_B.unflatten(0, groups)),
            "conv_C": ((*per_group, "lag"), conv_C.unflatten(0, groups)),
            "out_proj": (("model", *per_head), mixer.out_proj.weight.unflatten(1, heads)),
        }
        if "weight" in mixer.norm._parameters:
            labelled["norm"] = (per_head, mixer.norm.weight.unflatten(0, heads))
        if mixer.conv1d.bias is not None:
            bias_x, bias_B, bias_C = mixer.conv1d.bias.split(parts[:3])
            labelled |= {
                "conv_bias_x": (per_head, bias_x.unflatten(0, heads)),
                "conv_bias_B": (per_group, bias_B.unflatten(0, groups)),
                "conv_bias_C": (per_group, bias_C.unflatten(0, groups)),
            }
        return labelled

    def _parts(self) -> list[int]:
        """Sizes of x, B, C and dt along in_proj's rows (z, as long as x, comes first)."""
        sizes = self.sizes
        grouped = sizes.n_groups * sizes.n_states
        return [sizes.n_heads * sizes.head_channels, grouped, grouped, sizes.n_heads]

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        mixer, sizes, parts = self.mixer, self.sizes, self._parts()
        w = {name: tensor.detach().double() for name, tensor in mixer.state_dict().items()}
        projected = F.linear(masked(hidden.double(), valid), w["in_proj.weight"], w.get("in_proj.bias"))
        z, xBC, dt = projected.split([parts[0], sum(parts[:3]), parts[3]], -1)
        xBC = masked(causal_conv(xBC, w["conv1d.weight"][:, 0].flip(-1), w.get("conv1d.bias")), valid)
        x, B, C = xBC.split(parts[:3], -1)
        B, C = (t.unflatten(-1, (sizes.n_groups, sizes.n_states)) for t in (B, C))
        result = selective_scan(
            x.unflatten(-1, (sizes.n_heads, sizes.head_channels)), dt, -torch.exp(w["A_log"]), B, C, w["D"],
            delta_bias=w["dt_bias"], delta_softplus=True, delta_limits=self._limits,
            emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        normed = result.y.flatten(2) * F.silu(z)
        if "norm.weight" in w:
            grouped = normed.unflatten(-1, (sizes.n_groups, -1))
            grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
            normed = grouped.flatten(2) * w["norm.weight"]
        out = F.linear(normed, w["out_proj.weight"], w.get("out_proj.bias"))
        return {"delta": result.emission.delta, "B": B, "C": C, "out": out}


def _scan(tap: Tap) -> Callable[..., Any]:
    def mamba2_chunk_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
        D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False, **_options: Any,
    ) -> Any:  # fmt: skip
        result = tap.scan(
            _wide(hidden_states), dt, A, B, C, D, delta_bias=dt_bias, delta_softplus=dt_softplus,
            delta_limits=(dt_limit[0], dt_limit[1]), initial_state=initial_states,
        )  # fmt: skip
        return (result.y, result.last_state) if return_final_states else result.y

    return mamba2_chunk_scan


def _step(tap: Tap) -> Callable[..., Tensor]:
    def mamba2_selective_state_update(
        state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, **_options: Any,
    ) -> Tensor:  # fmt: skip
        """The library repeats dt, A, D and the bias along a head's channels (and the state): one of each is enough."""
        result = tap.scan(
            _wide(hidden_states)[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None],
            None if D is None else D[:, 0], delta_bias=None if dt_bias is None else dt_bias[:, 0],
            delta_softplus=dt_softplus, initial_state=state,
        )  # fmt: skip
        state.copy_(result.last_state.to(state.dtype))
        return result.y[:, 0].to(hidden_states.dtype)

    return mamba2_selective_state_update


def _wide(hidden: Tensor) -> Tensor:
    """x in fp32 at least, as the library's own scan computes and returns it: the norm that follows wants it wide."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()
