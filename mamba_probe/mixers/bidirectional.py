"""Layers that scan both ways: what their adapters share.

What is of a scan is recorded with a dimension `direction`, last, and for every direction at the tokens' own places. In
all of these layers a call comes in two halves, of which the second takes the flipped sequence.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mamba_probe.kernels.emission import Emit
from mamba_probe.mixers.base import Labelled, MixerAdapter
from mamba_probe.mixers.tap import Call, Listener, Tap

__all__ = ["Bidirectional", "Half", "of_both", "side_by_side"]

ONE_WAY = ("u", "out")
"""What a call has that is of no direction."""


class Half(Tap):
    """The tap of one half of a layer's call, with the edits of the whole, and the listener that joins the halves."""

    def __init__(self, whole: Tap):
        self.whole, self.layer, self.backend, self.call = whole, whole.layer, whole.backend, None
        self.watchers, self.acted, self.seen, self.last = [], whole.acted, None, 0

    @property
    def edits(self) -> list[Any]:
        """Those of the whole."""
        return self.whole.edits

    @property
    def listener(self) -> Listener:
        """Itself."""
        return self

    @property
    def second(self) -> bool:
        """Whether this is the half that takes the flipped sequence."""
        return self.whole.call is not None and bool(self.whole.call.parts)

    @property
    def backward(self) -> bool:
        """Whether tokens come from the last to the first: the half of a half may have flipped them twice."""
        return self.second != getattr(self.whole, "backward", False)

    def edited(self, target: str, tensor: Tensor, at: int = 0) -> Tensor:
        """See `Tap`: an edit is given the tokens at their own places."""
        if not self.backward:
            return super().edited(target, tensor, at)
        if target == "h":  # of one token
            return super().edited(target, tensor, self.last - at)
        return super().edited(target, tensor.flip(1), at).flip(1)

    def _edited_states(self, length: int) -> list[int]:
        self.last, tokens = length - 1, super()._edited_states(length)
        return [self.last - token for token in reversed(tokens)] if self.backward else tokens

    def wants(self, layer: int, continues: bool, length: int) -> Emit | None:
        """See `Listener`: what is wanted of the whole, of its tokens as this half counts them."""
        listener = self.whole.listener
        emit = None if listener is None or self.whole.call is None else listener.wants(layer, continues, length)
        if emit is None or emit.tokens is None or not self.second:
            return emit
        return replace(emit, tokens=tuple(length - 1 - token for token in reversed(emit.tokens)))

    def receive(self, call: Call) -> None:
        """See `Listener`: a half; the second completes the call."""
        whole = self.whole.call
        if whole is None:  # somebody called the inner module by hand
            return
        whole.parts.append(call)
        if len(whole.parts) == 2:
            whole.tensors |= side_by_side(*(part.tensors for part in whole.parts), directed=bool(call.parts))


class Bidirectional(MixerAdapter):
    """What they share: no mask, no cache, and no hook point in the scan, since a name there means one tensor."""

    in_stream = False  # as in mamba_ssm's blocks

    @property
    def hooked(self) -> tuple[str, ...]:
        """Quantities of its scan that have a hook point."""
        return ()

    @property
    def called(self) -> tuple[str, ...]:
        """Projections that its forward calls as modules, so that hooks on them fire."""
        return ()

    def opened(self, given: Mapping[str, Any]) -> Call:
        """A Call for what its forward was given, by name.

        Raises:
            ValueError: a cache, which a scan from the last token to the first cannot continue.
        """
        if given.get("inference_params") is not None:
            raise ValueError(
                f"layer {self.layer} scans in both directions, and was given inference_params: a sequence that grows"
                " has no last token to scan from. Call it with the whole sequence, and without"
            )
        return Call(self.layer)

    def masks(self, mask: Tensor | None) -> dict[str, Any]:
        """What its forward is called with for an attention mask: it takes none."""
        return {}


def side_by_side(first: Mapping[str, Tensor], second: Mapping[str, Tensor], directed: bool) -> dict[str, Tensor]:
    """Both halves of every tensor (batch, token, ...) along `direction`, the second's tokens at their own places."""
    join = torch.cat if directed else torch.stack
    return {name: join([first[name], second[name].flip(1)], -1) for name in first if name not in ONE_WAY}


def of_both(
    first: Mapping[str, Labelled], second: Mapping[str, Labelled], shared: tuple[str, ...] = ()
) -> dict[str, Labelled]:
    """Weights of both directions; those whose names begin with `shared` once."""
    return {
        name: (dims, tensor)
        if name.startswith(shared)
        else ((*dims, "direction"), torch.stack([tensor, second[name][1]], -1))
        for name, (dims, tensor) in first.items()
    }
