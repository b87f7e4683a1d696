"""Hook points: places in a probed model where a function of the user's is handed a tensor, and may give another back.

    logits, cache = probe.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_delta"))
    logits = probe.run_with_hooks(ids, fwd_hooks=[("blocks.3.mixer.hook_B", lambda B, hook: 2 * B)])

| name, after `blocks.{layer}.` | tensor | known from |
|---|---|---|
| hook_resid_pre, hook_resid_post | residual stream before and after the block | TransformerLens |
| hook_mixer_in, hook_mixer_out (mixer.hook_ssm_out) | the mixer's input, after the norm; its output | TransformerLens |
| mixer.hook_in_proj, mixer.hook_x_proj | what these projections give, whole | TransformerLens |
| mixer.hook_ssm_dt | delta before softplus, with its bias | TransformerLens |
| mixer.hook_delta | delta after softplus and limits | mamba-lens |
| mixer.hook_A_bar, mixer.hook_B, mixer.hook_C | the decay alone; B and C as the scan receives them | mamba-lens |
| mixer.hook_B_bar, mixer.hook_h | the write; the states after all tokens: to be read | mamba-lens |
| mixer.hook_h.{token} | the state after that token; what is given back is carried on | mamba-lens |
| mixer.hook_ssm_input, mixer.hook_skip | x as the scan receives it; the gate z before its SiLU | mamba-lens |
| mixer.hook_ssm_output | C h + D x, before the gate | mamba-lens |

mamba-lens writes its names without `mixer.`. TransformerLens' hook_conv (channels first, before the activation, taps
untrimmed) and mamba-lens' hook_y (C h without D x) are not offered, under their names or others. Tensors have a
trace's dimensions, (batch, token, ...); Mamba-1's B and C, of one group, have no axis for it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mamba_probe.arguments import listed
from mamba_probe.edits import HOOKS, Place
from mamba_probe.trace.contract import unknown_name

__all__ = [
    "ActivationCache", "GradientHook", "HookPoint", "ModuleHook", "Reader", "ValueHook", "names_of", "parsed",
    "selected",
]  # fmt: skip

SCAN = {"hook_ssm_dt": "dt"} | {name: quantity for quantity, name in HOOKS.items()} | {"hook_B_bar": "B_bar"}
"""Points in the scan, and the quantities that stand there."""

WHOLE = ("B_bar", "h")
"""Quantities that only the scan makes, of all tokens at once: to be read."""

EMITTED = ("delta", "A_bar", "B", "C", "B_bar", "h", "y")
"""Quantities that the scan emits, so that to read them changes nothing in how it computes."""

AROUND = {
    "hook_resid_pre": "block in", "hook_mixer_in": "mixer in", "hook_mixer_out": "mixer out",
    "mixer.hook_ssm_out": "mixer out", "hook_resid_post": "block out",
    "mixer.hook_in_proj": "in_proj", "mixer.hook_x_proj": "x_proj",
}  # fmt: skip
"""Points at modules, and which these are."""

ABSENT = {
    "hook_conv": "two tools mean two layouts by it; after its SiLU it is mixer.hook_ssm_input",
    "hook_y": "it is C h without D x elsewhere; C h + D x is mixer.hook_ssm_output",
    "hook_dt_proj": "delta before softplus, with its bias, is mixer.hook_ssm_dt",
    "hook_delta_1": "it is the first part of mixer.hook_x_proj",
    "hook_delta_2": "delta before softplus, with its bias, is mixer.hook_ssm_dt",
    "hook_inner_norm": "what enters it is mixer.hook_ssm_output, with the gate mixer.hook_skip",
    "hook_after_skip": "what it is made of is mixer.hook_ssm_output and mixer.hook_skip",
    "hook_out_proj": "the mixer's output is hook_mixer_out",
    "hook_normalized_input": "the mixer's input is hook_mixer_in",
    "hook_layer_input": "the block's input is hook_resid_pre, and an edit there enters the residual stream",
    "hook_ssm_state": "the states are mixer.hook_h, that after one token mixer.hook_h.{token}",
    "hook_ssm_write": "the write is mixer.hook_B_bar times mixer.hook_ssm_input",
    "hook_A": "A is a weight: probe.weights()",
}
"""Names of other tools that are not offered, and what to use instead."""

_NAME = re.compile(r"blocks\.(\d+)\.(.+?)(?:\.(\d+))?$")

Names = str | Sequence[str] | Callable[[str], bool] | None
Function = Callable[..., Any]


@dataclass
class HookPoint:
    """A place in the model; a hook is handed it beside the tensor, as `hook`."""

    name: str
    ctx: dict[Any, Any] = field(default_factory=dict)
    """The user's own: one for all functions at this name, kept while the hooks are on."""
    fired: int = 0
    """How often a function was called here."""
    backward: bool = False
    """Whether gradients are what comes."""

    def layer(self) -> int:
        """The model's own number of the layer."""
        return parsed(self.name)[0]

    def call(self, function: Function, tensor: Tensor) -> Tensor | None:
        """What `function` gives back, of the shape it was given."""
        self.fired += 1
        found = function(tensor, hook=self)
        if found is not None and (not isinstance(found, Tensor) or found.shape != tensor.shape):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the hook on {self.name} must return a tensor {tuple(tensor.shape)}, or None; got {came}")
        return found


def parsed(name: str) -> tuple[int, str, int | None]:
    """Layer, place in it, and token of a name.

    >>> parsed("blocks.3.mixer.hook_h.7")
    (3, 'mixer.hook_h', 7)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name of a hook point: blocks.{{layer}}.... (see probe.hook_names())")
    layer, place, token = match.groups()
    return int(layer), place, None if token is None else int(token)


def names_of(layer: int, modules: Sequence[str], quantities: Sequence[str]) -> list[str]:
    """Names of a layer that has these modules (of `AROUND`) and quantities (of `SCAN`), in the order of computation."""
    around = [name for name, module in AROUND.items() if module in modules]
    within = [f"mixer.{name}" for name, quantity in SCAN.items() if quantity in quantities]
    before = [name for name in around if AROUND[name] not in ("mixer out", "block out")]
    return [f"blocks.{layer}.{name}" for name in (*before, *within, *(name for name in around if name not in before))]


def paired(argument: str, given: Any) -> list[tuple[Names, Function, bool]]:
    """Each (names, function) pair of `fwd_hooks` or `bwd_hooks`, and whether it is one of gradients.

    Raises:
        ValueError: no list of such pairs.
    """
    pairs = listed(argument, given, "(names, function) pairs")
    for each in pairs:
        if not isinstance(each, tuple | list) or len(each) != 2 or not callable(each[1]):
            raise ValueError(f"{argument} is a list of (names, function) pairs; got {each!r} in it")
    return [(names, function, argument == "bwd_hooks") for names, function in pairs]


def selected(names: Names, known: Sequence[str]) -> list[str]:
    """The names that a filter means: all for None, one, several, or those for which a function is true.

    Raises:
        ValueError: an unknown name, no name at all, or a filter of another kind.
    """
    if names is None:
        return list(known)
    if callable(names):
        chosen = [name for name in known if names(name)]
        if not chosen:
            raise ValueError("the filter of names is true for none of the hook points: see probe.hook_names()")
        return chosen
    if not isinstance(names, str | Sequence) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"names are a name, a list of names, a function of a name, or None for all; got {names!r}")
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        _, place, token = parsed(name)
        bare = name if token is None else name[: -len(str(token)) - 1]
        if bare not in known or (token is not None and place != "mixer.hook_h"):
            instead = ABSENT.get(place.rpartition(".")[2])
            if instead is not None:
                raise ValueError(f"there is no hook point {name!r}: {instead}")
            raise unknown_name("hook point", name, tuple(known))
    return chosen


class ModuleHook:
    """A hook that stands at a module: it is noted where the layer is recorded, an `Action` that acts on nothing."""

    tokens, counts, alters = None, False, True

    def __init__(self, point: HookPoint):
        self.point, self.layer = point, point.layer()

    def __repr__(self) -> str:
        return f"hook({self.point.name})"

    def acts_on(self, target: str, layer: int) -> bool:
        """Never."""
        return False

    def apply(self, tensor: Tensor, place: Place) -> Tensor:
        """See `mamba_probe.mixers.tap.Action`."""
        return tensor


class _AtQuantity:
    """What hooks at a quantity of the scan share: an `Action` of its tap."""

    alters = False

    def __init__(self, point: HookPoint, function: Function, family: str):
        layer, place, token = parsed(point.name)
        self.point, self.function, self.family = point, function, family
        self.layer, self.quantity = layer, SCAN[place.removeprefix("mixer.")]
        self.tokens = None if token is None else (token,)

    def __repr__(self) -> str:
        return f"hook({self.point.name})"

    def acts_on(self, target: str, layer: int) -> bool:
        """Whether it stands at `target` of `layer`."""
        return (target, layer) == (self.quantity, self.layer)

    @property
    def counts(self) -> bool:
        """Whether it must know which token of the sequence is which."""
        return self.tokens is not None

    def _mine(self, place: Place) -> bool:
        return self.tokens is None or place.start == self.tokens[0]

    def _shown(self, tensor: Tensor) -> Tensor:
        """With the dimensions of a trace."""
        if self.quantity == "h":
            tensor = tensor[:, 0]
        return shown(self.quantity, tensor, self.family, self.tokens is not None)


class ValueHook(_AtQuantity):
    """Hands a function the tensor, and on what it gives back; `alters`: unless that is always None."""

    def __init__(self, point: HookPoint, function: Function, family: str, alters: bool = True):
        super().__init__(point, function, family)
        self.alters = alters

    def apply(self, tensor: Tensor, place: Place) -> Tensor:
        """See `mamba_probe.mixers.tap.Action`."""
        if not self._mine(place):
            return tensor
        found = self.point.call(self.function, self._shown(tensor))
        if found is None:
            return tensor
        if self.quantity in ("delta", "A_bar") and bool((found < 0).any()):
            raise ValueError(f"the hook on {self.point.name} returned values below 0: it is a step size, or a decay")
        return found.reshape(tensor.shape).to(tensor.dtype)


class GradientHook(_AtQuantity):
    """Hands a function the gradient by the tensor, when it is found, and on what it gives back."""

    def apply(self, tensor: Tensor, place: Place) -> Tensor:
        """See `mamba_probe.mixers.tap.Action`."""
        if not self._mine(place):
            return tensor
        watch(self.point, self.function, tensor, self._shown)
        return tensor


def watch(point: HookPoint, function: Function, tensor: Tensor, shown: Callable[[Tensor], Tensor]) -> None:
    """Have `function` called with the gradient by `tensor`.

    Raises:
        ValueError: no gradient will reach it.
    """
    if not tensor.requires_grad:
        raise ValueError(
            f"no gradient reaches {point.name}: run under torch.enable_grad(), with weights or an input before it that"
            " require gradients"
        )

    def given(gradient: Tensor) -> Tensor | None:
        found = point.call(function, shown(gradient))
        return None if found is None else found.reshape(gradient.shape).to(gradient.dtype)

    tensor.register_hook(given)


class Reader:
    """Hands a function what the scan emits: a `Watcher` of its tap."""

    def __init__(self, point: HookPoint, function: Function, family: str):
        self.layer, place, _ = parsed(point.name)
        self.name = SCAN[place.removeprefix("mixer.")]
        self.point, self.function, self.family = point, function, family

    def see(self, tensor: Tensor) -> None:
        """See `mamba_probe.mixers.tap.Watcher`."""
        if self.point.call(self.function, shown(self.name, tensor, self.family)) is not None:
            instead = "hook_h.{token}" if self.name == "h" else "hook_B or hook_delta"
            raise ValueError(f"{self.point.name} can only be read: return None, and edit at mixer.{instead}")


def shown(quantity: str, tensor: Tensor, family: str, one_token: bool = False) -> Tensor:
    """A tensor of the scan's layout with the dimensions of a trace; `one_token`: it has no token axis."""
    if family == "mamba2":
        return tensor
    head_channel = 2 if one_token else 3
    if quantity in ("x", "z", "y", "h"):
        return tensor.squeeze(head_channel)
    return tensor.squeeze(2) if quantity in "BC" and tensor.shape[2] == 1 else tensor


class ActivationCache(Mapping[str, Tensor]):
    """What `run_with_cache` found, by name: cache["blocks.3.mixer.hook_delta"], cache["delta", 3] or
    cache["resid_pre", -1].

    >>> cache = ActivationCache({"blocks.3.mixer.hook_delta": torch.zeros(2, 5, 8)})
    >>> cache["delta", 3].shape
    torch.Size([2, 5, 8])
    >>> cache
    ActivationCache(blocks.3.mixer.hook_delta (2, 5, 8))
    """

    def __init__(self, found: Mapping[str, Tensor]):
        self._found = dict(found)

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        name = key if isinstance(key, str) else self._named(*key)
        if name not in self._found:
            raise KeyError(f"{key!r}: the cache holds {', '.join(self._found) or 'nothing'}")
        return self._found[name]

    def _named(self, short: str, layer: int, part: str | None = None) -> str:
        layers = sorted({parsed(name)[0] for name in self._found})
        number = layers[layer] if -len(layers) <= layer < 0 else layer
        full = [f"blocks.{number}.{prefix}hook_{short}" for prefix in ((f"{part}.",) if part else ("mixer.", ""))]
        return next((name for name in full if name in self._found), full[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __repr__(self) -> str:
        each = [f"{name} {tuple(tensor.shape)}" for name, tensor in self._found.items()]
        more = [f"and {len(each) - 12} more"] * (len(each) > 12)
        return f"ActivationCache({', '.join(each[:12] + more)})"

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same on another device."""
        return ActivationCache({name: tensor.to(device) for name, tensor in self._found.items()})
