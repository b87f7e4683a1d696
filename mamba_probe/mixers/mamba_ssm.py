"""mamba_ssm's own modules, Mamba and Mamba2, where that package is installed; it is never imported from here.

Their forward hands a whole sequence to one fused kernel (`use_fast_path`, `use_mem_eff_path`) or to one kernel after
another, and a single token to the method `step`. Probed, it never takes the fused one, and our scan is in the place of
the others; the convolution is causal_conv1d's where that is installed, plain torch elsewhere. Equations: see
`mamba_probe.mixers.mamba` and `.mamba2`.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.mamba2 import Mamba2Adapter
from mamba_probe.mixers.takeover import Seen, rebind
from mamba_probe.mixers.tap import NO_LIMITS, OPEN_GATE, Call, Tap

__all__ = ["MambaSsm2Adapter", "MambaSsmAdapter", "Upstream", "UpstreamMamba2", "convolutions", "ssd"]

UNTRACED = ("seqlen", "seq_idx", "cu_seqlens")
"""Options of Mamba2's forward under which rows are no sequences."""


class Upstream(MixerAdapter):
    """A mixer whose forward goes on to methods of its own: it is run on a `Seen`, and carries no hooks."""

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the mixer's scan; `release` undoes it."""
        MixerAdapter.take_over(self, tap)

    def release(self) -> None:
        """Restore the library's own forward."""
        MixerAdapter.release(self)

    def _norm_instead(self, tap: Tap) -> dict[str, Any]:
        """The norm that takes the gate, where there is one."""
        return {}


class _MambaSsm(Upstream):
    """What both modules share: no mask, a cache in `inference_params`, and the method `step`."""

    fused: ClassVar[str]
    """The option by which forward takes the fused kernel."""
    steps: ClassVar[tuple[str, str]] = ("causal_conv1d_update", "selective_state_update")
    in_stream = False  # its blocks hand on the stream and what is to be added to it apart

    def opened(self, given: Mapping[str, Any]) -> Call:
        """A Call for what its forward was given, by name.

        Raises:
            ValueError: packed or flattened sequences.
        """
        packed = [name for name in UNTRACED if given.get(name) is not None]
        if packed:
            raise ValueError(
                f"layer {self.layer}: {', '.join(packed)} packs several sequences into a row, which a trace cannot"
                " hold: pass (batch, token, model), a sequence a row"
            )
        cache = given.get("inference_params")
        return Call(self.layer, continues=cache is not None and cache.seqlen_offset > 0)

    def masks(self, mask: Tensor | None) -> dict[str, Any]:
        """What its forward is called with for an attention mask: it takes none."""
        return {}

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the module's scan, and of that of `step` where it is called by hand."""
        by_hand = MethodType(_by_hand(tap, self.mixer, self.seen(tap)), self.mixer)
        super().take_over(tap)
        self.mixer.step = by_hand

    def release(self) -> None:
        """Restore the library's own forward and step."""
        if self.tap is not None:
            del self.mixer.step
        super().release()

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Our functions by the name of the library's that they replace, those of `step` left out."""
        return {name: ours for name, ours in self._ours(tap, module).items() if name not in self.steps}

    def seen(self, tap: Tap) -> Any:
        """The module, its fused kernel declined and its step ours."""
        step = type(self.mixer).step
        ours = self._ours(tap, step.__globals__)
        methods = {"step": rebind(step, {name: ours[name] for name in self.steps})}
        return Seen(self.mixer, {self.fused: False} | self._norm_instead(tap), methods)

    def _ours(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Our functions, those of `step` included."""
        installed = module if self.mixer.conv1d.weight.is_cuda else {}
        return convolutions(tap, *(installed.get(name) for name in ("causal_conv1d_fn", "causal_conv1d_update")))


class MambaSsmAdapter(_MambaSsm, MambaAdapter):
    """Reads and takes over `mamba_ssm.modules.mamba_simple.Mamba`."""

    class_path = ("mamba_ssm.modules.mamba_simple", "Mamba")
    fused = "use_fast_path"

    @property
    def called(self) -> tuple[str, ...]:
        """None: forward takes in_proj's weight from it, and hands x_proj the tokens of all rows as one row."""
        return ()

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is mamba_ssm's class; forks of that path that scan more than once have more parameters."""
        return super().matches(module) and set(module._parameters) == {"A_log", "D"}

    def _ours(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        scan, step = self._scans(tap).values()
        return super()._ours(tap, module) | {"selective_scan_fn": scan, "selective_state_update": step}

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix by which a projection acts; of in_proj the weight itself, which forward takes from it."""
        projection = getattr(self.mixer, name)
        return (projection.weight, projection.bias) if name == "in_proj" else super().linear(name)


class UpstreamMamba2(Upstream, Mamba2Adapter):
    """A Mamba-2 mixer with upstream's options: D by channel, a gate before or after the norm, or a gate alone."""

    @property
    def _skip(self) -> Labelled:
        heads = (self.sizes.n_heads, self.sizes.head_channels)
        by_channel = self.mixer.D_has_hdim
        return (("head", "head_channel"), self.mixer.D.unflatten(0, heads)) if by_channel else super()._skip

    @property
    def _norms(self) -> bool:
        return self.mixer.rmsnorm

    @property
    def _epsilon(self) -> float:
        return self.mixer.norm.eps

    @property
    def _limits(self) -> tuple[float, float]:
        low, high = self.mixer.dt_limit
        return low, high

    @property
    def _norms_first(self) -> bool:
        return self.mixer.norm_before_gate

    def _norm_instead(self, tap: Tap) -> dict[str, Any]:
        return {"norm": _gated_norm(tap, self.mixer.norm, self.sizes)} if self.mixer.rmsnorm else {}


class MambaSsm2Adapter(_MambaSsm, UpstreamMamba2):
    """Reads and takes over `mamba_ssm.modules.mamba2.Mamba2`."""

    class_path = ("mamba_ssm.modules.mamba2", "Mamba2")
    takes = "u"
    fused = "use_mem_eff_path"

    @property
    def sizes(self) -> Sizes:
        """Heads, channels, groups and states."""
        mixer = self.mixer
        return Sizes("mamba2", mixer.nheads, mixer.headdim, mixer.ngroups, mixer.d_state, mixer.d_model)

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the module's scan.

        Raises:
            ValueError: a gated MLP beside the heads, or heads shared out over processes.
        """
        mixer = self.mixer
        if mixer.d_ssm != mixer.d_inner:
            raise ValueError(
                f"layer {self.layer}: Mamba2 with d_ssm={mixer.d_ssm} below expand * d_model = {mixer.d_inner} is not"
                " supported: the rest is a gated MLP inside the mixer, which no trace holds"
            )
        if mixer.process_group is not None:
            raise ValueError(
                f"layer {self.layer}: Mamba2 with a process_group is not supported: each process has some of the heads."
                " Load the model whole, in one process"
            )
        super().take_over(tap)

    def opened(self, given: Mapping[str, Any]) -> Call:
        """A Call for what its forward was given, by name.

        Raises:
            ValueError: packed or flattened sequences, or single tokens where D is by channel.
        """
        call = super().opened(given)
        if call.continues and self.mixer.D_has_hdim:
            raise ValueError(
                f"layer {self.layer}: mamba_ssm's step takes no D by channel (D_has_hdim): it fails without a probe,"
                " too. Run whole sequences"
            )
        return call

    def _ours(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        return super()._ours(tap, module) | ssd(tap)


def convolutions(
    tap: Tap, along: Callable[..., Tensor] | None, at: Callable[..., Tensor] | None
) -> dict[str, Callable[..., Tensor]]:
    """causal_conv1d's functions, for a sequence and for one token, with the tap on them; plain torch where None."""
    tapped, tapped_at = (
        tap.conv(_convolved if along is None else along),
        tap.conv(_of_one(_shifted if at is None else at)),
    )

    def causal_conv1d_fn(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str, seq_idx: None = None
    ) -> Tensor:
        return tapped(x, weight, bias, activation=activation)

    def causal_conv1d_update(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        return tapped_at(x[..., None], conv_state, weight, bias, activation=activation)[..., 0]

    return {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}


def _of_one(at: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`at`, which takes (batch, channel), for (batch, channel, 1): a tap knows what is convolved with its tokens."""

    def update(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return at(x[..., 0], *args, **options)[..., None]

    return update


def _gated_norm(tap: Tap, norm: nn.Module, sizes: Sizes) -> Callable[[Tensor, Tensor], Tensor]:
    """The mixer's norm, which takes the gate; it is noted on its way, and open where an edit takes it out."""

    def normed(y: Tensor, gate: Tensor) -> Tensor:
        by_head = len(gate), -1, sizes.n_heads, sizes.head_channels
        if tap.touches("z"):
            gate = tap.edited("z", gate.reshape(by_head)).reshape(gate.shape)
        if tap.call is not None and tap.listener is not None:
            tap.call.tensors["z"] = gate.reshape(by_head)
        return norm(y, torch.full_like(gate, OPEN_GATE) if tap.taken_out("gate") else gate)

    return normed


def ssd(tap: Tap, *, step_limits: tuple[float, float] = NO_LIMITS) -> dict[str, Callable[..., Any]]:
    """Our scan and step in the place of mamba_ssm's; delta is held to `step_limits` in single steps."""

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMITS, return_final_states: bool = False, **_absent: Any,
    ) -> Any:  # fmt: skip
        result = tap.scan(
            _wide(x), dt, A, B, C, D, None if z is None else _wide(z), delta_bias=dt_bias, delta_softplus=dt_softplus,
            delta_limits=(dt_limit[0], dt_limit[1]),
        )  # fmt: skip
        y = result.y.to(x.dtype)
        return (y, result.last_state) if return_final_states else y

    def selective_state_update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
        dt_bias: Tensor | None = None, dt_softplus: bool = False,
    ) -> Tensor:  # fmt: skip
        """The library repeats dt, A and the bias along a head's channels (and the state): one of each is enough."""
        result = tap.scan(
            _wide(x)[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], D,
            None if z is None else _wide(z)[:, None], delta_bias=None if dt_bias is None else dt_bias[:, 0],
            delta_softplus=dt_softplus, delta_limits=step_limits, initial_state=state,
        )  # fmt: skip
        state.copy_(result.last_state.to(state.dtype))
        return result.y[:, 0].to(x.dtype)

    return {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "selective_state_update": selective_state_update,
    }


def _by_hand(tap: Tap, mixer: Any, seen: Seen) -> Callable[..., Any]:
    """`step`, called by nobody's forward: edited, and refused while somebody records."""
    owner = id(mixer)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) != owner:  # a copy of the mixer
            return type(self).step(self, *args, **kwargs)
        if tap.listener is not None:
            raise ValueError(
                f"layer {tap.layer}: step() was called by hand while recording, and a trace would lack it: call the"
                " model with inference_params, as its generate() does"
            )
        return seen.step(*args, **kwargs)

    return step


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    """x (batch, channel, token) convolved by weight (channel, tap), and SiLU."""
    taps = weight.shape[-1]
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=len(weight))[..., : x.shape[-1]])


def _shifted(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str) -> Tensor:
    """x (batch, channel) enters the window conv_state (batch, channel, tap), which is summed by weight, and SiLU."""
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1))
    summed = (conv_state * weight).sum(-1)
    return F.silu(summed if bias is None else summed + bias).to(x.dtype)


def _wide(hidden: Tensor) -> Tensor:
    """In fp32 at least: the recurrence is wide, and only what leaves it is rounded."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()
