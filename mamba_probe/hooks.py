"""Edits: what an experimenter changes inside a mixer while it runs.

    with probe.edit(mp.freeze("delta", layer=3), mp.ablate("conv", layer=0)):
        model(input_ids)

`freeze` holds delta, B or C at one value for all tokens of a row (its mean over the row's valid tokens unless a value
is given): the layer becomes time-invariant in that quantity. `ablate` takes a part out: the convolution becomes the
identity (the current token passes, bias and older taps do not), the gate is open (its factor is 1), the decay is gone
(A_bar is 1: nothing is forgotten, and writes stay delta B), delta, B or C is 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mamba_probe.trace.contract import unknown_name

__all__ = ["ABLATABLE", "FREEZABLE", "Edit", "ablate", "freeze"]

FREEZABLE = ("delta", "B", "C")
ABLATABLE = ("delta", "B", "C", "conv", "gate", "decay")


@dataclass(frozen=True)
class Edit:
    """One change of one quantity, in one layer or in all of them. Made by `freeze` and `ablate`."""

    kind: Literal["freeze", "ablate"]
    target: str
    layer: int | None = None
    value: float | Tensor | None = None

    def __repr__(self) -> str:
        place = "" if self.layer is None else f", layer={self.layer}"
        given = isinstance(self.value, Tensor) and self.value.ndim
        value = f"a tensor {tuple(torch.as_tensor(self.value).shape)}" if given else self.value
        return f"{self.kind}({self.target}{place}" + ("" if self.value is None else f", value={value}") + ")"

    def acts_on(self, target: str, layer: int) -> bool:
        """Whether this edit changes `target` in `layer`."""
        return self.target == target and self.layer in (None, layer)

    def apply(self, tensor: Tensor, valid: Tensor | None) -> Tensor:
        """The edited `tensor` (batch, token, ...); `valid` (batch, token) tells which tokens a mean is taken over."""
        if self.kind == "ablate":
            return torch.zeros_like(tensor)
        if self.value is not None:
            return self._given(tensor)
        return _mean_over_tokens(tensor, valid, self)

    def _given(self, tensor: Tensor) -> Tensor:
        value = torch.as_tensor(self.value, dtype=tensor.dtype, device=tensor.device)
        if not torch.isfinite(value).all():
            raise ValueError(f"{self!r}: the value holds NaN or infinity")
        if self.target == "delta" and bool((value < 0).any()):
            raise ValueError(f"{self!r}: delta is a step size and cannot be negative; got {value.min().item():g}")
        try:
            return value.expand_as(tensor).clone()
        except RuntimeError as error:
            raise ValueError(
                f"{self!r}: the value needs a shape that broadcasts to (batch, token, ...) = {tuple(tensor.shape)};"
                f" got {tuple(value.shape)}"
            ) from error


def _mean_over_tokens(tensor: Tensor, valid: Tensor | None, edit: Edit) -> Tensor:
    if tensor.shape[1] == 1:
        raise ValueError(
            f"{edit!r} to the mean needs a whole sequence, and this call has one token (a decoding step?):"
            " pass value=... to hold a value of your own"
        )
    weight = torch.ones(tensor.shape[:2], device=tensor.device) if valid is None else valid.to(tensor.device)
    weight = weight.to(tensor.dtype)[(...,) + (None,) * (tensor.ndim - 2)]
    mean = (tensor * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return mean.expand_as(tensor).clone()


def _checked(kind: str, target: str, known: tuple[str, ...], layer: int | None) -> None:
    if target not in known:
        other = {"freeze": ABLATABLE, "ablate": FREEZABLE}[kind]
        hint = f" (it can be {'ablated' if kind == 'freeze' else 'frozen'})" if target in other else ""
        raise ValueError(f"{unknown_name(f'quantity to {kind}', target, known)}{hint}")
    if layer is not None and not isinstance(layer, int):
        raise ValueError(f"layer is an int or None (all layers); got {layer!r}. Pass one edit a layer.")


def freeze(target: str, layer: int | None = None, *, value: float | Tensor | None = None) -> Edit:
    """Hold delta, B or C constant over the tokens of each row.

    Args:
        target: "delta", "B" or "C".
        layer: the model's own layer number; None is every probed layer.
        value: what to hold it at, broadcast to (batch, token, head) for delta and (batch, token, group, state) for B
            and C; None is the mean over the row's valid tokens, future ones included.

    Raises:
        ValueError: a quantity that cannot be frozen.

    >>> freeze("delta", layer=3)
    freeze(delta, layer=3)
    """
    _checked("freeze", target, FREEZABLE, layer)
    return Edit("freeze", target, layer, value)


def ablate(target: str, layer: int | None = None) -> Edit:
    """Take a part out: "conv" to the identity, "gate" open, "decay" gone (A_bar 1), "delta", "B" or "C" to zero.

    Args:
        target: "conv", "gate", "decay", "delta", "B" or "C".
        layer: the model's own layer number; None is every probed layer.

    Raises:
        ValueError: a quantity that cannot be ablated.

    >>> ablate("conv")
    ablate(conv)
    """
    _checked("ablate", target, ABLATABLE, layer)
    return Edit("ablate", target, layer)
