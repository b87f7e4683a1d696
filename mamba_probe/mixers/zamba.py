"""transformers' ZambaMambaMixer: several Mamba-1 heads side by side, each with its own x_proj, dt_proj and scan.

[x, z] = in_proj u, interleaved;  x = silu(conv x);  in each head  [dt, B, C] = x_proj x;  delta = softplus(dt_proj dt
+ bias);  h = exp(delta A) h + delta B x;  y = C h + D x;  out = out_proj(y silu(z)) over all heads

A trace has the channels of all heads in a row, as conv1d and out_proj have them, and one group of B and C a head:
channel c is head_channel c % (channels / heads) of head c // (channels / heads). Its x is row 2 c of in_proj, its z row
2 c + 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import ScanResult, selective_scan
from mamba_probe.mixers.base import Labelled, Sizes, convolved, double, masked
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.tap import Call, Tap

__all__ = ["ZambaAdapter"]


class ZambaAdapter(MambaAdapter):
    """Reads and takes over `transformers.models.zamba.modeling_zamba.ZambaMambaMixer`.

    Its weights are a MambaMixer's over the channels of all heads, but for x_proj, which sees one head's channels:
    x_proj_dt_by_head (head, rank, head_channel), x_proj_B_by_head and x_proj_C_by_head (head, state, head_channel).
    """

    class_path = ("transformers.models.zamba.modeling_zamba", "ZambaMambaMixer")
    shortcuts = ()
    hooked = ()  # a scan a head: no tensor is that of the layer

    @property
    def sizes(self) -> Sizes:
        """Channels of all heads, and a group of B and C a head."""
        heads, per_head, state = self.mixer.A_log.shape
        return Sizes("mamba", heads * per_head, 1, heads, state, self.mixer.in_proj.in_features)

    @property
    def _sections(self) -> list[int]:
        return [self.mixer.dt_proj_weight.shape[-1], self.sizes.n_states, self.sizes.n_states]

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """A MambaMixer's, but that the scans of the heads are brought together."""
        return super().replacements(tap, module) | self._scans(_HeadByHead(tap, self.sizes))

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        mixer = self.mixer
        dt, B, C = mixer.x_proj_weight.split(self._sections, 1)
        by_head = ("head", "state", "head_channel")
        labelled = {
            "D": (("channel",), mixer.D.flatten()),
            "dt_bias": (("channel",), mixer.dt_proj_bias.flatten()),
            "x_proj_dt_by_head": (("head", "rank", "head_channel"), dt),
            "x_proj_B_by_head": (by_head, B),
            "x_proj_C_by_head": (by_head, C),
            "dt_proj": (("channel", "rank"), mixer.dt_proj_weight.flatten(0, 1)),
        }
        return self.statics() | labelled | self._around()

    def statics(self) -> dict[str, Labelled]:
        """The trace's variables that are constant in this family."""
        return {"A": (("channel", "state"), -torch.exp(self._wide(self.mixer.A_log)).flatten(0, 1))}

    def _x_and_z(self, rows: Tensor) -> Sequence[Tensor]:
        return rows[::2], rows[1::2]

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        mixer = self.mixer
        x, z = (F.linear(masked(hidden.double(), valid), *self.linear64("in_proj"))[..., i::2] for i in (0, 1))
        x = masked(convolved(mixer.conv1d, x), valid)
        by_head = x.unflatten(-1, mixer.D.shape)
        projected = torch.einsum("bthp,hrp->bthr", by_head, double(mixer.x_proj_weight))
        dt, B, C = projected.split(self._sections, -1)
        result = selective_scan(
            x[..., None], torch.einsum("bthr,hpr->bthp", dt, double(mixer.dt_proj_weight)).flatten(2),
            -torch.exp(double(mixer.A_log)).flatten(0, 1), B, C, double(mixer.D).flatten(), z[..., None],
            delta_bias=double(mixer.dt_proj_bias).flatten(), delta_softplus=True,
            emit=Emit(("delta",)), backend="naive",
        )  # fmt: skip
        assert result.emission.delta is not None
        out = F.linear(result.y[..., 0], *self.linear64("out_proj"))
        return {"delta": result.emission.delta, "B": B, "C": C, "out": out}


@dataclass
class _OneHead(Tap):
    """The tap of one head: its channels are `size` of all `n_heads * size`, from head * size on."""

    head: int = 0
    n_heads: int = 1
    size: int = 0

    def edited(self, target: str, tensor: Tensor, at: int = 0) -> Tensor:
        """See `Tap`: an edit is given all heads, zero but for this one, so that its value means what it says."""
        if not self.touches(target):
            return tensor
        here = tensor.shape[2]
        others = torch.zeros_like(tensor)
        whole = torch.cat([tensor if head == self.head else others for head in range(self.n_heads)], dim=2)
        return super().edited(target, whole, at).narrow(2, self.head * here, here)

    def _wanted(self, length: int) -> Emit | None:
        emit = super()._wanted(length)
        if emit is None or emit.channels is None:
            return emit
        start = self.head * self.size
        mine = [channel - start for channel in emit.channels if start <= channel < start + self.size]
        if mine:
            return replace(emit, channels=mine)
        return replace(emit, channels=None, variables=tuple(name for name in emit.variables if name in ("B", "C")))


@dataclass
class _HeadByHead:
    """In the place of a tap where the library scans head after head: the last head's scan completes the call."""

    tap: Tap
    sizes: Sizes

    def scan(self, *args: Any, **options: Any) -> ScanResult:
        """Our scan of the next head; see `Tap.scan`."""
        tap, call, n_heads = self.tap, self.tap.call, self.sizes.n_groups
        assert call is not None
        mine = Call(tap.layer, call.valid, call.continues, call.start)
        head, size = len(call.parts), self.sizes.n_heads // n_heads
        one = _OneHead(
            tap.layer, tap.backend, tap.edits, listener=tap.listener, call=mine, acted=tap.acted,
            head=head, n_heads=n_heads, size=size,
        )  # fmt: skip
        result = one.scan(*args, **options)
        call.parts.append(mine)
        if len(call.parts) == n_heads:
            _join(call)
        return result


def _join(call: Call) -> None:
    """Heads side by side: along the channels or groups of what was recorded, and along the channels of the states."""
    for name in dict.fromkeys(name for part in call.parts for name in part.tensors):
        call.tensors[name] = torch.cat([part.tensors[name] for part in call.parts if name in part.tensors], dim=2)
    for name in ("state_in", "state_out"):
        states = [getattr(part, name) for part in call.parts]
        setattr(call, name, None if states[0] is None else torch.cat(states, dim=1))
