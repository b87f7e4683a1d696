"""transformers' Mamba2Mixer (SSD): one scalar A and delta a head.

[z, xBC, dt] = in_proj u;  xBC = silu(conv xBC);  delta = clamp(softplus(dt + bias))
h = exp(delta A) h + delta B x;  y = C h + D x;  out = out_proj(norm(y silu(z)))
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes, convolved, double, masked, no_shortcut
from mamba_probe.mixers.tap import OPEN_GATE, Tap

__all__ = ["Mamba2Adapter", "acting_gate"]


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

    @property
    def _skip(self) -> Labelled:
        """D."""
        return ("head",), self.mixer.D

    @property
    def _norms(self) -> bool:
        """Whether there is a norm, or a gate alone."""
        return getattr(self.mixer.norm, "weight", None) is not None

    @property
    def _norms_first(self) -> bool:
        """Whether the norm comes before the gate, not after it."""
        return False

    @property
    def _epsilon(self) -> float:
        """Of the norm."""
        return self.mixer.norm.variance_epsilon

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        return {
            "mamba2_chunk_scan": _scan(tap),
            "mamba2_selective_state_update": _step(tap),
            "causal_conv1d_fn": tap.conv(module["causal_conv1d_fn"]),
            "causal_conv1d_update": tap.conv(module["causal_conv1d_update"]),
            "mamba2_split_conv1d_scan_combined": no_shortcut,
        }

    def take_over(self, tap: Tap) -> None:
        super().take_over(tap)
        self._watch_gate(tap)

    def release(self) -> None:
        if self.tap is not None:
            for part in self.mixer.modules():  # all: what we hooked may have been wrapped since
                for hooks in (part._forward_pre_hooks, part._forward_hooks):
                    for key in [key for key, hook in hooks.items() if hook.__module__.startswith(__package__)]:
                        del hooks[key]
        super().release()

    def _watch_gate(self, tap: Tap) -> None:
        """The gate acts after the scan, in the mixer's norm: it is met on its way in."""
        heads = (self.sizes.n_heads, self.sizes.head_channels)

        def at_norm(_norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            scan_output, gate = args
            return scan_output, acting_gate(tap, gate, heads)

        self.mixer.norm.register_forward_pre_hook(at_norm)

    def weights(self) -> dict[str, Labelled]:
        mixer, heads = self.mixer, (self.sizes.n_heads, self.sizes.head_channels)
        rows, bias = self._in_proj(torch.promote_types(mixer.conv1d.weight.dtype, torch.float32))
        out, out_bias = self.linear("out_proj")
        labelled = self.statics() | {
            "D": self._skip,
            "dt_bias": (("head",), mixer.dt_bias),
            "out_proj": (("model", "head", "head_channel"), out.unflatten(1, heads)),
        }
        labelled |= self._apart("in_proj", rows, ("z", "x", "B", "C", "dt"), "model")
        labelled |= self._apart("conv", mixer.conv1d.weight[:, 0].flip(-1), ("x", "B", "C"), "lag")
        if bias is not None:
            labelled |= self._apart("in_proj_bias", bias, ("z", "x", "B", "C", "dt"))
        if mixer.conv1d.bias is not None:
            labelled |= self._apart("conv_bias", mixer.conv1d.bias, ("x", "B", "C"))
        if out_bias is not None:
            labelled["out_proj_bias"] = (("model",), out_bias)
        if self._norms:
            name = "norm_before_gate" if self._norms_first else "norm"
            labelled[name] = (("head", "head_channel"), mixer.norm.weight.unflatten(0, heads))
        return labelled

    def statics(self) -> dict[str, Labelled]:
        return {"A": (("head",), -torch.exp(self._wide(self.mixer.A_log)))}

    def _apart(self, name: str, rows: Tensor, parts: Sequence[str], *dims: str) -> dict[str, Labelled]:
        """`rows` cut into what they make, `name` before each part; `dims` are those of one row."""
        sizes = self.sizes
        per_head = {"head": sizes.n_heads, "head_channel": sizes.head_channels}
        per_group = {"group": sizes.n_groups, "state": sizes.n_states}
        layout = {"z": per_head, "x": per_head, "B": per_group, "C": per_group, "dt": {"head": sizes.n_heads}}
        cut = rows.split([prod(layout[part].values()) for part in parts])
        return {
            f"{name}_{part}": ((*layout[part], *dims), piece.unflatten(0, tuple(layout[part].values())))
            for part, piece in zip(parts, cut, strict=True)
        }

    def _parts(self) -> list[int]:
        """Sizes of x, B, C and dt along in_proj's rows (z, as long as x, comes first)."""
        sizes = self.sizes
        grouped = sizes.n_groups * sizes.n_states
        return [sizes.n_heads * sizes.head_channels, grouped, grouped, sizes.n_heads]

    def _in_proj(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Rows and bias of z, x, B, C and dt, as they act on the mixer's input."""
        weight, bias = self.linear("in_proj")
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        mixer, sizes, parts = self.mixer, self.sizes, self._parts()
        z, xBC, dt = self._projected(hidden, valid)
        xBC = masked(convolved(mixer.conv1d, xBC), valid)
        x, B, C = xBC.split(parts[:3], -1)
        B, C = (t.unflatten(-1, (sizes.n_groups, sizes.n_states)) for t in (B, C))
        result = selective_scan(
            x.unflatten(-1, (sizes.n_heads, sizes.head_channels)), dt, -torch.exp(double(mixer.A_log)), B, C,
            double(self._skip[1]), delta_bias=double(mixer.dt_bias), delta_softplus=True, delta_limits=self._limits,
            emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        out = F.linear(self._gated(result.y.flatten(2), z), *self.linear64("out_proj"))
        return {"delta": result.emission.delta, "B": B, "C": C, "out": out}

    def _projected(self, hidden: Tensor, valid: Tensor | None) -> Sequence[Tensor]:
        """z, xBC and dt in float64 as they go on from in_proj."""
        parts = self._parts()
        projected = F.linear(masked(hidden.double(), valid), *self._in_proj(torch.float64))
        return projected.split([parts[0], sum(parts[:3]), parts[3]], -1)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """What enters out_proj, in float64."""
        gate = F.silu(z)
        if not self._norms:
            return y * gate
        return self._normed(y) * gate if self._norms_first else self._normed(y * gate)

    def _normed(self, y: Tensor) -> Tensor:
        norm = self.mixer.norm
        grouped = y.unflatten(-1, (self.sizes.n_groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self._epsilon)
        return grouped.flatten(2) * double(norm.weight)


def acting_gate(tap: Tap, gate: Tensor, heads: tuple[int, int]) -> Tensor:
    """`gate` (batch, token, channel), noted on its way, and open where an edit takes it out."""
    if tap.call is None:  # a copy of the mixer, with its hooks
        return gate
    if tap.touches("z"):
        gate = tap.edited("z", gate.unflatten(-1, heads)).flatten(-2)
    if tap.listener is not None:
        tap.call.tensors["z"] = gate.unflatten(-1, heads)
    return torch.full_like(gate, OPEN_GATE) if tap.taken_out("gate") else gate


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
        y = result.y[:, 0] if z is None else result.y[:, 0] * F.silu(z)  # noted and opened before, see `_watch_gate`
        return y.to(hidden_states.dtype)

    return mamba2_selective_state_update


def _wide(hidden: Tensor) -> Tensor:
    """x in fp32 at least, as the library's own scan computes and returns it: the norm that follows wants it wide."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()
