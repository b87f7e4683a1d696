"""What every adapter of a mixer family provides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Signature, signature
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mamba_probe.edits import EDITABLE
from mamba_probe.hooks import SCAN
from mamba_probe.kernels.scan import BACKENDS
from mamba_probe.mixers.linear import affine
from mamba_probe.mixers.seat import clear, seat, seated
from mamba_probe.mixers.takeover import innermost, rebind
from mamba_probe.mixers.tap import Call, Tap
from mamba_probe.trace.schema import VARIABLES

__all__ = ["Labelled", "MixerAdapter", "Sizes", "causal_conv", "convolved", "double", "masked", "no_shortcut"]

Labelled = tuple[tuple[str, ...], Tensor]
"""A tensor with the names of its dimensions."""


@dataclass(frozen=True)
class Sizes:
    """What must agree for layers to share one trace."""

    family: str
    n_heads: int
    head_channels: int
    n_groups: int
    n_states: int
    width: int
    gated: bool = True
    directions: tuple[str, ...] = ()
    """Of a layer that scans in several, their names; see `mamba_probe.trace.schema.DIRECTIONS`."""

    def dims(self, name: str) -> tuple[str, ...]:
        """Dimensions of a variable in a trace of such layers; none where they have no such variable."""
        return VARIABLES[name].dims(self.family, bool(self.directions))

    @property
    def variables(self) -> tuple[str, ...]:
        """What of the schema such a layer has."""
        return tuple(name for name, spec in VARIABLES.items() if spec.dims(self.family) and (self.gated or name != "z"))

    def __str__(self) -> str:
        if self.family != "mamba2":
            groups = f" in {self.n_groups} groups" if self.family == "mamba" and self.n_groups > 1 else ""
            gate = "" if self.gated else ", no gate"
            ways = f", {len(self.directions)} directions" if self.directions else ""
            return f"{self.family}: {self.n_heads} channels{groups}, state {self.n_states}{gate}{ways}"
        return f"mamba2: {self.n_heads} heads of {self.head_channels}, {self.n_groups} group(s), state {self.n_states}"


class MixerAdapter(ABC):
    """One mixer of one model: its sizes, its weights by our names, and the takeover of its scan.

    A mixer without a number of its own has that of its `place` among the model's mixers.
    `class_path` names the mixer's class; `editable` what an edit may target, `backends` those of our scan it can use.
    """

    class_path: ClassVar[tuple[str, str]]
    family: ClassVar[str]
    discretization: ClassVar[str] = "euler"
    editable: ClassVar[tuple[str, ...]] = EDITABLE
    backends: ClassVar[tuple[str, ...]] = BACKENDS
    hooked: ClassVar[tuple[str, ...]] = tuple(SCAN.values())
    """Quantities of its scan that have a hook point."""
    takes: ClassVar[str] = "hidden_states"
    """What its forward calls the hidden states."""
    in_stream: ClassVar[bool] = True
    """Whether the block around it takes and gives the residual stream, and not a part of it."""

    def __init__(self, mixer: nn.Module, name: str, place: int = 0):
        self.mixer: Any = mixer
        self.name = name
        number = getattr(mixer, "layer_idx", None)
        self.layer = place if number is None else int(number)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is exactly the class this adapter knows."""
        return (type(module).__module__, type(module).__qualname__) == cls.class_path

    @property
    @abstractmethod
    def sizes(self) -> Sizes:
        """Heads, channels, groups and states."""

    @abstractmethod
    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Our functions by the name of the library's that they replace; `module` is where those are found."""

    @abstractmethod
    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""

    def _wide(self, A_log: Tensor) -> Tensor:
        """A_log as the mixer takes it: transformers rounds it to float32 whatever the model is."""
        return A_log.float()

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix by which a projection of the mixer acts, (out, in), and its bias."""
        return affine(getattr(self.mixer, name), self.mixer.conv1d.weight)

    def linear64(self, name: str) -> tuple[Tensor, Tensor | None]:
        """`linear` for the oracle, float64 and detached."""
        weight, bias = self.linear(name)
        return double(weight), None if bias is None else double(bias)

    @abstractmethod
    def statics(self) -> dict[str, Labelled]:
        """The trace's variables that are constant in this family."""

    @abstractmethod
    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""

    def taken(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, token, model) as the mixer's forward takes them, and what it takes as (batch, ...)."""
        return hidden

    def given(self, returned: Any) -> Tensor:
        """The output (batch, token, model), of what the mixer's forward returns."""
        return returned

    def opened(self, given: Mapping[str, Any]) -> Call:
        """A Call for what its forward was given, by name."""
        cache, mask = given.get("cache_params"), given.get("attention_mask")
        continues = cache is not None and cache.has_previous_state(self.layer)
        return Call(self.layer, None if mask is None else mask.bool(), continues)

    def masks(self, mask: Tensor | None) -> dict[str, Any]:
        """What its forward is called with for an attention mask, which it need not know where there is none."""
        return {} if mask is None else {"attention_mask": mask}

    def native(self, hidden: Tensor, **options: Any) -> Any:
        """What the library's own forward makes of hidden states, while a tap stands in the mixer too."""
        return type(self.mixer).forward(self.mixer, hidden, **options)

    @property
    def called(self) -> tuple[str, ...]:
        """Projections that its forward calls as modules, so that hooks on them fire."""
        return tuple(name for name in ("in_proj", "x_proj") if isinstance(getattr(self.mixer, name, None), nn.Module))

    @property
    def plain(self) -> bool:
        """Whether it takes and gives (batch, token, model)."""
        return type(self).taken is MixerAdapter.taken

    @property
    def parts(self) -> tuple["MixerAdapter", ...]:
        """Adapters of the mixers inside this one, where it is made of such."""
        return ()

    def seen(self, tap: Tap) -> Any:
        """What its forward is given as `self`."""
        return self.mixer

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the mixer's scan; `release` undoes it."""
        forward = type(self.mixer).forward
        assert isinstance(forward, FunctionType)
        if self.takes not in signature(forward).parameters:
            has = ", ".join(list(signature(forward).parameters)[1:])
            raise ValueError(
                f"{type(self.mixer).__qualname__}.forward has no argument {self.takes!r}, which {type(self).__name__}"
                f" says are its hidden states; it has {has}: set `takes`"
            )
        bound = rebind(forward, self.replacements(tap, innermost(forward).__globals__))
        seat(self.mixer, _tapped(bound, tap, signature(forward), self))

    @property
    def tap(self) -> Tap | None:
        """The tap that stands in the mixer, of whichever probe."""
        return getattr(seated(self.mixer), "tap", None)

    def release(self) -> None:
        """Restore the library's own forward; a mixer that is not taken stays as it is."""
        if self.tap is not None:
            clear(self.mixer)


def _tapped(forward: FunctionType, tap: Tap, takes: Signature, adapter: MixerAdapter) -> FunctionType:
    """`forward` with a Call open while it runs; an exception leaves none behind. A copy of the mixer is not probed."""

    owner, seen = id(adapter.mixer), adapter.seen(tap)

    def probed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) != owner:
            return type(self).forward(self, *args, **kwargs)
        given = takes.bind(self, *args, **kwargs).arguments
        call = tap.begin(adapter.opened(given), adapter.taken(given[adapter.takes]).shape[1])
        try:
            out = forward(seen, *args, **kwargs)
            if tap.listener is not None:
                if call.A is None and not call.parts:
                    raise ValueError(
                        f"layer {tap.layer}: {type(self).__qualname__}.forward ran without tap.scan, so it reaches its"
                        " scan by an attribute or by `self`, where `replacements` are not found: call a function of"
                        " its own module by its plain name, or give it a Seen (mamba_probe/mixers/takeover.py)"
                    )
                hidden = adapter.taken(given[adapter.takes])
                call.tensors |= {"u": hidden, "out": _by_token(adapter.given(out), hidden, tap.layer)}
                tap.listener.receive(call)
            return out
        finally:
            tap.call = None

    probed_forward.tap = tap  # type: ignore[attr-defined]
    return probed_forward


def _by_token(out: Tensor, hidden: Tensor, layer: int) -> Tensor:
    """`out` as (batch, token, model), also where a release drops the token axis of a single token."""
    if out.shape == hidden.shape:
        return out
    if len(hidden) > 1 or out.shape != hidden[:, 0].shape:
        raise ValueError(
            f"layer {layer}: the library's mixer made {tuple(out.shape)} of {tuple(hidden.shape)}, which mixes the rows"
            " from here on: Falcon-H1 with a norm does so at single tokens in transformers up to 5.22. Record one row"
            " at a time, or install 5.23."
        )
    return out[:, None]


def masked(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Hidden states with padding set to zero, as the library does before in_proj and after the convolution."""
    return hidden if valid is None else hidden * valid[..., None].to(hidden.dtype)


def double(tensor: Tensor) -> Tensor:
    """A weight for the oracle: float64 and detached."""
    return tensor.detach().double()


def convolved(conv: Any, hidden: Tensor) -> Tensor:
    """`causal_conv` of float64 `hidden` by a mixer's conv1d."""
    return causal_conv(hidden, double(conv.weight)[:, 0].flip(-1), None if conv.bias is None else double(conv.bias))


def causal_conv(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution and SiLU of hidden (batch, token, channel) by weight (channel, lag), lag 0 now."""
    length = hidden.shape[1]
    lags = weight.shape[1]
    padded = torch.nn.functional.pad(hidden, (0, 0, lags - 1, 0))
    out = sum(padded[:, lags - 1 - lag : lags - 1 - lag + length] * weight[:, lag] for lag in range(lags))
    assert isinstance(out, Tensor)
    return torch.nn.functional.silu(out if bias is None else out + bias)


def no_shortcut(*_args: Any, **_options: Any) -> None:
    """In place of a fused kernel that would never reach the scan: the library then takes its plain path."""
