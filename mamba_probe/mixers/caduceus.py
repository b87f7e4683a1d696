"""Caduceus' layers: two of mamba_ssm's Mamba, one of them on the flipped sequence, also on the reverse complement.

BiMambaWrapper  L(u) = M(u) + flip M_b(flip u), or their product
RCPSWrapper     out = [L(u_1), rc L(rc u_2)], with [u_1, u_2] = u;  rc flips tokens and features
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.mixers.base import Labelled, MixerAdapter, Sizes
from mamba_probe.mixers.bidirectional import Bidirectional, Half, of_both, side_by_side
from mamba_probe.mixers.mamba_ssm import MambaSsmAdapter
from mamba_probe.mixers.takeover import Seen
from mamba_probe.mixers.tap import Tap

__all__ = ["BiMambaAdapter", "RCPSAdapter"]

_INNER = ("mamba_fwd", "mamba_rev")


class _Wrapper(Bidirectional):
    """A module whose halves are calls of modules inside it."""

    inner: Mapping[str, MixerAdapter]
    """Adapters of those, by the names that the module has them under."""
    family = "mamba"

    @property
    def parts(self) -> tuple[MixerAdapter, ...]:
        """Adapters of the mixers inside this one."""
        return tuple(self.inner.values())

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Nothing of its own: its modules are taken over."""
        return {}

    def take_over(self, tap: Tap) -> None:
        """Put halves of `tap` in the place of the inner mixers' scans."""
        super().take_over(tap)
        half = Half(tap)
        for part in self.parts:
            part.take_over(half)

    def release(self) -> None:
        """Restore the library's own forward, of the inner mixers too."""
        super().release()
        for part in self.parts:
            part.release()

    def native(self, hidden: Tensor, **options: Any) -> Any:
        """What the library's own forward makes of hidden states, with that of the inner mixers."""
        untouched = {name: part.native for name, part in self.inner.items()}
        return type(self.mixer).forward(Seen(self.mixer, untouched, {}), hidden, **options)


class BiMambaAdapter(_Wrapper):
    """Reads and takes over Caduceus' `BiMambaWrapper`, from wherever its code was loaded.

    In the weights in_proj_* and out_proj* have a direction only where they are not tied.
    """

    class_path = ("caduceus.modeling_caduceus", "BiMambaWrapper")

    def __init__(self, mixer: nn.Module, name: str, place: int = 0):
        self.inner = {which: MambaSsmAdapter(getattr(mixer, which), f"{name}.{which}", place) for which in _INNER}
        super().__init__(mixer, name, self.inner["mamba_fwd"].layer)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is of that name and holds two of mamba_ssm's Mamba."""
        parts = [getattr(module, name, None) for name in _INNER]
        return type(module).__qualname__ == cls.class_path[1] and all(
            isinstance(part, nn.Module) and MambaSsmAdapter.matches(part) for part in parts
        )

    @property
    def sizes(self) -> Sizes:
        """Those of either inner mixer; two directions."""
        return replace(self.parts[0].sizes, directions=("forward", "backward"))

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        first, second = (part.mixer for part in self.parts)
        tied = tuple(name for name in ("in_proj", "out_proj") if _same(getattr(first, name), getattr(second, name)))
        return of_both(self.parts[0].weights(), self.parts[1].weights(), shared=tied)

    def statics(self) -> dict[str, Labelled]:
        """The trace's variables that are constant in this family."""
        return of_both(self.parts[0].statics(), self.parts[1].statics())

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        first, second = self.parts[0].oracle(hidden, None), self.parts[1].oracle(hidden.flip(1), None)
        outs = first["out"], second["out"].flip(1)
        out = outs[0] * outs[1] if self.mixer.bidirectional_strategy == "ew_multiply" else outs[0] + outs[1]
        return side_by_side(first, second, directed=False) | {"out": out}


class RCPSAdapter(_Wrapper):
    """Reads and takes over Caduceus' `RCPSWrapper` around a BiMambaWrapper: it runs on both strands.

    A trace has four directions: forward and backward of the strand as given, rc_forward and rc_backward of its reverse
    complement, all at the tokens' own places. Weights are those of every direction as they act on all features.
    """

    class_path = ("caduceus.modeling_rcps", "RCPSWrapper")
    takes = "x"

    def __init__(self, mixer: Any, name: str, place: int = 0):
        if not BiMambaAdapter.matches(mixer.submodule):
            raise ValueError(
                f"{name or 'the mixer'}: an RCPSWrapper around a {type(mixer.submodule).__name__} of one direction is"
                " not supported: Caduceus' own has bidirectional=True"
            )
        self.inner = {"submodule": BiMambaAdapter(mixer.submodule, f"{name}.submodule", place)}
        super().__init__(mixer, name, self.parts[0].layer)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module` is of that name and holds Caduceus' layer."""
        inner = type(getattr(module, "submodule", None)).__qualname__
        return type(module).__qualname__ == cls.class_path[1] and inner == BiMambaAdapter.class_path[1]

    @property
    def sizes(self) -> Sizes:
        """Those of the inner layer, of twice as many features and directions."""
        sizes = self.parts[0].sizes
        return replace(sizes, width=2 * sizes.width, directions=(*sizes.directions, "rc_forward", "rc_backward"))

    def weights(self) -> dict[str, Labelled]:
        """Static weights by our names, with their dimensions (without layer)."""
        return {name: _on_strands(*labelled) for name, labelled in self.parts[0].weights().items()}

    def statics(self) -> dict[str, Labelled]:
        """The trace's variables that are constant in this family."""
        return {name: _on_strands(*labelled) for name, labelled in self.parts[0].statics().items()}

    def oracle(self, hidden: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """delta, B, C and out of one forward in float64 from the weights alone, by the sequential recurrence."""
        given, other = hidden.chunk(2, -1)
        first, second = self.parts[0].oracle(given, None), self.parts[0].oracle(other.flip(1, 2), None)
        out = torch.cat([first["out"], second["out"].flip(1, 2)], -1)
        return side_by_side(first, second, directed=True) | {"out": out}


def _on_strands(dims: tuple[str, ...], tensor: Tensor) -> Labelled:
    """A weight in the directions of both strands: the second has the second half of the features, flipped."""
    if "direction" not in dims:
        dims, tensor = (*dims, "direction"), torch.stack([tensor, tensor], -1)
    strands = tensor, tensor
    if "model" in dims:
        axis, none = dims.index("model"), torch.zeros_like(tensor)
        strands = torch.cat([tensor, none], axis), torch.cat([none, tensor.flip(axis)], axis)
    return dims, torch.cat(strands, -1)


def _same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have the very same parameters."""
    return [id(each) for each in first.parameters()] == [id(each) for each in second.parameters()]
