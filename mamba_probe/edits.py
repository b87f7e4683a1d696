"""Edits: what an experimenter changes inside a mixer while it runs; the change goes through the recurrence.

    with probe.edit(mp.freeze("delta", layer=3), mp.ablate("conv", layer=0), mp.scale("B", 2.0, layer=5, token=7)):
        model(input_ids)

What can be edited, as the scan receives it, with the axes of its tensor:

| quantity | axes | and what follows |
|---|---|---|
| delta | batch, token, channel (head) | the decay and the write of that token |
| A_bar | batch, token, channel, state (head) | the decay alone; 1 keeps the state, 0 forgets it; the write stays |
| B, C | batch, token, group, state | the write; what is read |
| x, z, y | batch, token, channel (head, head_channel) | what is written; the gate before SiLU; what is read, ungated |
| h | batch, token, channel, state (head, head_channel, state) | the state after a token, read there and carried on |

`freeze` holds one of them but h at one value for all tokens of a row (its mean over the row's valid tokens unless a
value is given). `assign`, `scale`, `clamp` and `zero` change entries, `swap` puts those of another run in their place.
`ablate` takes a part out: the convolution becomes the identity (the current token passes, bias and older taps do not),
the gate is open (its factor is 1), the decay is gone (A_bar is 1: nothing is forgotten, and writes stay delta B),
delta, B or C is 0. Edits act in the order in which they are given, each on what the one before it left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mamba_probe.arguments import array, wholes
from mamba_probe.other_run import OtherRun
from mamba_probe.trace.contract import unknown_name

__all__ = [
    "ABLATABLE", "AXES", "EDITABLE", "FREEZABLE", "HOOKS", "Edit", "Place", "ablate", "assign", "clamp",
    "first_token", "freeze", "scale", "swap", "zero",
]  # fmt: skip

AXES = {
    "delta": ("batch", "token", "head"),
    "A_bar": ("batch", "token", "head", "state"),
    "B": ("batch", "token", "group", "state"),
    "C": ("batch", "token", "group", "state"),
    "x": ("batch", "token", "head", "head_channel"),
    "z": ("batch", "token", "head", "head_channel"),
    "y": ("batch", "token", "head", "head_channel"),
    "h": ("batch", "token", "head", "head_channel", "state"),
}
"""Quantities, and the axes of their tensors in the scan's layout. A_bar of Mamba-2 has no state axis."""

HOOKS = {
    "delta": "hook_delta", "A_bar": "hook_A_bar", "B": "hook_B", "C": "hook_C", "x": "hook_ssm_input",
    "z": "hook_skip", "y": "hook_ssm_output", "h": "hook_h",
}  # fmt: skip
"""Hook points at these quantities, see `mamba_probe.hooks`."""

FREEZABLE = tuple(name for name in AXES if name != "h")
ABLATABLE = ("delta", "B", "C", "conv", "gate", "decay")
EDITABLE = (*AXES, "conv", "gate", "decay")

Indices = int | Sequence[int]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands that edits act on."""

    layer: int
    valid: Tensor | None = None
    """(batch, token) of the call, or None where nothing is masked."""
    start: int | None = 0
    """The first token of the tensor as the sequence counts it; None where the sequence's beginning was not seen."""


@dataclass(frozen=True)
class Edit:
    """One change of one quantity, in one layer or in all of them, at all entries or at some. Made by `freeze` and its
    siblings."""

    kind: Literal["freeze", "ablate", "assign", "scale", "clamp", "zero", "swap"]
    target: str
    layer: int | None = None
    value: Any = None
    where: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Axes and the indices on them; what is not named is taken whole."""
    alters: ClassVar[bool] = True
    """Whether a recording must say that it acted."""

    def __repr__(self) -> str:
        parts = [self.target]
        if self.layer is not None:
            parts.append(f"layer={self.layer}")
        parts += [f"{axis}={at[0] if len(at) == 1 else list(at)}" for axis, at in self.where]
        if self.value is not None:
            parts.append(f"value={_shown(self.value)}")
        return f"{self.kind}({', '.join(parts)})"

    def acts_on(self, target: str, layer: int) -> bool:
        """Whether this edit changes `target` in `layer`."""
        return self.target == target and self.layer in (None, layer)

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens it acts on; None for all."""
        return dict(self.where).get("token")

    @property
    def counts(self) -> bool:
        """Whether it must know which token of the sequence is which."""
        return self.tokens is not None or self.kind == "swap"

    def apply(self, tensor: Tensor, place: Place) -> Tensor:
        """The edited `tensor` (batch, token, ...); itself where none of its entries is to be changed."""
        index, picked = self._index(tensor, place)
        if index is None:
            return tensor
        block = tensor[index] if self.where else tensor
        changed = self._changed(block, tensor, place, index, picked)
        return tensor.index_put(index, changed.to(tensor.dtype)) if self.where else changed

    def _index(self, tensor: Tensor, place: Place) -> tuple[tuple[Tensor, ...] | None, dict[int, list[int]]]:
        """Indices of the entries in this tensor, that broadcast to a block; and which of those named are here, by axis.
        None where none is."""
        named, picked, lists = dict(self.where), {}, []
        for axis, (name, size) in enumerate(zip(AXES.get(self.target, ()), tensor.shape, strict=False)):
            asked = named.get(name, named.get("channel") if name == "head" else None)
            if asked is None:
                lists.append(torch.arange(size))
                continue
            here = _within(self, asked, place.start, size) if name == "token" else _bounded(self, name, asked, size)
            if not here:
                return None, {}
            picked[axis] = [asked.index(at + (place.start or 0 if name == "token" else 0)) for at in here]
            lists.append(torch.tensor(here))
        mesh = [each.to(tensor.device).view(-1, *[1] * (len(lists) - 1 - axis)) for axis, each in enumerate(lists)]
        return tuple(mesh) if self.where else (), picked

    def _changed(
        self, block: Tensor, tensor: Tensor, place: Place, index: tuple[Tensor, ...], picked: dict[int, list[int]]
    ) -> Tensor:
        if self.target == "decay":
            return torch.ones_like(block)
        if self.kind in ("ablate", "zero"):
            return torch.zeros_like(block)
        if self.kind == "scale":
            return block * self._given(block, self.value, tensor, picked)
        if self.kind == "clamp":
            if block.is_complex():
                raise ValueError(f"{self!r}: {self.target} of layer {place.layer} is complex and has no order")
            return block.clamp(*self.value)
        if self.kind == "freeze" and self.value is None:
            mean = _mean_over_tokens(tensor, place.valid, self)
            return mean[index] if self.where else mean
        if self.kind == "swap":
            other = self._of_another_run(tensor, place)
            return other[index] if self.where else other
        return self._given(block, self.value, tensor, picked)

    def _of_another_run(self, tensor: Tensor, place: Place) -> Tensor:
        """Another run's tensor at the tokens of `tensor`; zero at those that are not swapped."""
        start, size = first_token(self, place.start), tensor.shape[1]
        at = range(size) if self.tokens is None else _within(self, self.tokens, start, size)
        found = self.value.at(place.layer, tensor, [start + token for token in at]).to(tensor)
        if len(found) not in (1, len(tensor)):
            raise ValueError(f"{self!r}: the other run has {len(found)} rows, this one has {len(tensor)}")
        missing = ~torch.isfinite(found).flatten(2).all(-1).expand(len(tensor), -1)
        if place.valid is not None:
            missing &= place.valid.to(missing.device)[:, list(at)]
        if missing.any():
            row, token = missing.nonzero()[0].tolist()
            raise ValueError(
                f"{self!r}: the other run has padding, or no number, at token {start + at[token]} of row {row}"
            )
        whole = torch.zeros_like(tensor)
        whole[:, list(at)] = found.nan_to_num(0.0)
        return whole

    def _given(self, block: Tensor, value: Any, tensor: Tensor, picked: dict[int, list[int]]) -> Tensor:
        """A value of the user's as the entries of `block` take it: of named indices only those that are here.

        Where channels are heads, of one channel each, it has no axis for that one.
        """
        if torch.as_tensor(value).is_complex() and not block.is_complex():
            raise ValueError(f"{self!r}: {self.target} is real here, and the value complex")
        value = torch.as_tensor(value, dtype=block.dtype, device=block.device)
        if AXES[self.target][3:4] == ("head_channel",) and tensor.shape[3] == 1 and 0 < value.ndim < block.ndim:
            value = value.unsqueeze(3 - block.ndim)
        for axis, here in picked.items():
            at = axis - block.ndim
            asked = len(dict(self.where)[_axis_name(self, axis)])
            if value.ndim >= -at and value.shape[at] == asked != len(here):
                value = value.index_select(at, torch.tensor(here, device=value.device))
        try:
            return value.expand_as(block).clone()
        except RuntimeError as error:
            raise ValueError(
                f"{self!r}: the value needs a shape that broadcasts to (batch, token, ...) = {tuple(block.shape)}"
                f" ({', '.join(AXES[self.target][: block.ndim])}); got {tuple(value.shape)}"
            ) from error


def _axis_name(edit: Edit, axis: int) -> str:
    name = AXES[edit.target][axis]
    return "channel" if name == "head" and "channel" in dict(edit.where) else name


def first_token(action: Any, start: int | None) -> int:
    """Where a call starts in its sequence, of which an edit or a hook names tokens; refused where that is unknown."""
    if start is None:
        raise ValueError(
            f"{action!r}: this call continues a sequence whose beginning the probe has not seen, so it cannot tell"
            " which token is which: enter the block before the prompt runs"
        )
    return start


def _within(edit: Edit, asked: Sequence[int], start: int | None, size: int) -> list[int]:
    start = first_token(edit, start)
    return [token - start for token in asked if start <= token < start + size]


def _bounded(edit: Edit, name: str, asked: Sequence[int], size: int) -> list[int]:
    if max(asked) >= size:
        raise ValueError(f"{edit!r}: there are {size} along {name}, 0 .. {size - 1}")
    return list(asked)


def _check_value(edit: Edit) -> None:
    """Numbers; a step size and a decay are not negative."""
    if edit.value is None or isinstance(edit.value, OtherRun):
        return
    for bound in edit.value if edit.kind == "clamp" else (edit.value,):
        value = _numbers(edit, 0.0 if bound is None else bound)
        if not torch.isfinite(value).all():
            raise ValueError(f"{edit!r}: the value holds NaN or infinity")
        if edit.target in ("delta", "A_bar") and not value.is_complex() and bool((value < 0).any()):
            what = "a step size" if edit.target == "delta" else "a decay"
            raise ValueError(f"{edit!r}: {edit.target} is {what} and cannot be negative; got {value.min().item():g}")


def _numbers(edit: Edit, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.device.type != "meta" and value.layout is torch.strided:
        return value
    found = value if isinstance(value, complex | np.ndarray) else np.asarray(array(f"{edit!r}: the value", value))
    if np.asarray(found).dtype.kind not in "fiubc" or (edit.kind == "clamp" and np.ndim(found)):
        raise ValueError(f"{edit!r}: the value is a number, or an array of numbers; got {type(value).__name__}")
    return torch.as_tensor(found)


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


def _shown(value: Any) -> Any:
    if isinstance(value, OtherRun):
        return "another run's"
    shape = tuple(getattr(value, "shape", ()))
    return f"an array {shape}" if shape and not isinstance(value, Tensor) else f"a tensor {shape}" if shape else value


def _made(
    kind: Any, target: str, layer: int | None, value: Any, where: Mapping[str, Any], known: Sequence[str]
) -> Edit:
    if not isinstance(target, str) or target not in known:
        able = [verb for verb, names in (("frozen", FREEZABLE), ("ablated", ABLATABLE)) if target in list(names)]
        able += ["assigned, scaled, clamped, zeroed or swapped"] * (target in list(AXES))
        hint = f" (it can be {able[0]})" if able else ""
        raise ValueError(f"{unknown_name(f'quantity to {kind}', target, tuple(known))}{hint}")
    if layer is not None and not isinstance(layer, int):
        raise ValueError(f"layer is an int or None (all layers); got {layer!r}. Pass one edit a layer.")
    axes = (*AXES.get(target, ()), "channel") if "head" in AXES.get(target, ()) else AXES.get(target, ())
    for axis in where:
        if axis not in axes:
            raise unknown_name(f"axis of {target}", axis, axes or ("none: it is taken out whole",))
    chosen = tuple((axis, _indices(axis, at)) for axis, at in where.items() if at is not None)
    if target == "h" and "token" not in dict(chosen):
        raise ValueError(
            f"{kind} of h needs token=...: the states after these tokens; an edit of all of them is one of A_bar and B"
        )
    edit = Edit(kind, target, layer, value, chosen)
    _check_value(edit)
    return edit


def _indices(axis: str, at: Indices) -> tuple[int, ...]:
    one = np.ndim(at) == 0 if isinstance(at, int | np.integer | np.ndarray | Tensor) else False
    chosen = wholes(axis, [_plain(at)] if one else at)
    if not chosen or min(chosen) < 0:
        raise ValueError(f"{axis} is an index from 0 on, or several; got {at!r}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{axis} names an index twice: {at!r}")
    return tuple(chosen)


def _plain(value: Any) -> Any:
    """A numpy integer as Python's."""
    return value.item() if getattr(value, "shape", None) == () else value


def freeze(target: str, layer: int | None = None, *, value: float | Tensor | None = None, **where: Indices) -> Edit:
    """Hold a quantity constant over the tokens of each row.

    Args:
        target: "delta", "A_bar", "B", "C", "x", "z" or "y".
        layer: the model's own layer number; None is every probed layer.
        value: what to hold it at, broadcast to the axes of the quantity (see the head of this module); None is the mean
            over the row's valid tokens, future ones included.
        where: axis=index or indices: only these entries (channel, head, head_channel, group, state, token, batch).

    Raises:
        ValueError: a quantity that cannot be frozen, or an axis that it has not.

    >>> freeze("delta", layer=3)
    freeze(delta, layer=3)
    """
    return _made("freeze", target, layer, value, where, FREEZABLE)


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
    return _made("ablate", target, layer, None, {}, ABLATABLE)


def assign(target: str, value: Any, layer: int | None = None, **where: Indices) -> Edit:
    """Set entries of a quantity to a value.

    Args:
        target: a quantity (see the head of this module); h needs token=...
        value: a number, or an array that broadcasts to the chosen entries, on all axes of the quantity.
        layer: the model's own layer number; None is every probed layer.
        where: axis=index or indices, all of those not named. Tokens count from the sequence's first, padding and
            generated ones included. "channel" is Mamba-1's, "head" and "head_channel" are Mamba-2's.

    Raises:
        ValueError: a quantity that cannot be edited, an axis that it has not, an index below 0.

    >>> assign("A_bar", 0.0, layer=2, token=9)
    assign(A_bar, layer=2, token=9, value=0.0)
    """
    return _made("assign", target, layer, value, where, tuple(AXES))


def scale(target: str, factor: Any, layer: int | None = None, **where: Indices) -> Edit:
    """Multiply entries of a quantity; arguments as `assign`.

    >>> scale("delta", 0.5, channel=[3, 4])
    scale(delta, channel=[3, 4], value=0.5)
    """
    return _made("scale", target, layer, factor, where, tuple(AXES))


def clamp(
    target: str, low: float | None = None, high: float | None = None, layer: int | None = None, **where: Indices
) -> Edit:
    """Hold entries of a quantity within bounds, of which one may be None; other arguments as `assign`.

    Raises:
        ValueError: no bound, or what `assign` refuses.

    >>> clamp("A_bar", high=0.9)
    clamp(A_bar, value=(None, 0.9))
    """
    if low is None and high is None:
        raise ValueError(f"clamp of {target} needs low=..., high=... or both")
    return _made("clamp", target, layer, (low, high), where, tuple(AXES))


def zero(target: str, layer: int | None = None, **where: Indices) -> Edit:
    """Set entries of a quantity to 0; arguments as `assign`.

    >>> zero("h", layer=0, token=4)
    zero(h, layer=0, token=4)
    """
    return _made("zero", target, layer, None, where, tuple(AXES))


def swap(target: str, source: Any, layer: int | None = None, **where: Indices) -> Edit:
    """Put another run's values in the place of this one's, entry by entry.

    Args:
        target: a quantity (see the head of this module); h needs token=...
        source: what the other run left: a trace (`probe.record` with that variable), or the cache of `run_with_cache`.
            Rows and tokens are those of this run; a trace of one row goes to all.
        layer: the model's own layer number; None is every probed layer.
        where: as in `assign`.

    Raises:
        ValueError: a source without that quantity, and what `assign` refuses.
    """
    return _made("swap", target, layer, OtherRun(target, HOOKS.get(str(target), ""), source), where, tuple(AXES))
