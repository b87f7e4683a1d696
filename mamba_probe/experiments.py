"""What is done to a probed model while it runs: edits, hooks, and answers under them."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.arguments import listed
from mamba_probe.attaching import check_editable
from mamba_probe.edits import Edit
from mamba_probe.hooks import (
    AROUND,
    EMITTED,
    SCAN,
    WHOLE,
    ActivationCache,
    Function,
    GradientHook,
    HookPoint,
    ModuleHook,
    Names,
    Reader,
    ValueHook,
    names_of,
    paired,
    parsed,
    selected,
    watch,
)  # fmt: skip
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.mixers import MixerAdapter, Tap
from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name

__all__ = ["Experiments"]

Hooks = Sequence[tuple[Names, Function]]


class Experiments(AbstractContextManager["Any"]):
    """Edits, hooks and interventions of a `Probe`."""

    model: nn.Module
    _adapters: list[MixerAdapter]
    _taps: dict[int, Tap]

    @property
    @abstractmethod
    def attached(self) -> bool:
        """Whether the model's scans are ours at this moment."""

    def _check_attached(self) -> None:
        if not self.attached:
            raise ValueError("this probe is detached: attach again with mp.attach(model)")

    def _check_unedited(self, what: str) -> None:
        self._check_attached()
        if any(tap.edits for tap in self._taps.values()):
            raise ValueError(f"{what} starts from the unedited probe: leave the `edit` block first")

    # -- edits ---------------------------------------------------------------------------------------------------

    @contextmanager
    def edit(self, *edits: Edit) -> Iterator[Any]:
        """Apply `edits` (see `mamba_probe.edits`: freeze, ablate, assign, scale, clamp, zero, swap) to every call
        inside the block; blocks nest.

        Raises:
            ValueError: not an edit, a layer that is not probed, an axis or quantity that it has not; on leaving: an
                edit whose tokens no call of the model had.
        """
        self._check_attached()
        for edit in edits:
            if not isinstance(edit, Edit):
                raise ValueError(f"edit takes mp.freeze(...), mp.ablate(...) and their siblings; got {edit!r}")
            if edit.layer is not None and edit.layer not in self._taps:
                raise unknown_name("layer", edit.layer, [str(layer) for layer in self._taps])
            check_editable(edit, self._adapters)
        with self._acting(edits):
            earlier = [tap for tap in self._taps.values() if tap.ran]
            for tap in self._taps.values():
                tap.ran = False
                tap.acted.difference_update(map(id, edits))
            yield self
            for edit in edits:
                taps = [tap for layer, tap in self._taps.items() if edit.layer in (None, layer)]
                if any(tap.ran for tap in taps) and not any(id(edit) in tap.acted for tap in taps):
                    raise ValueError(f"{edit!r} never acted: no call of the model had what it names")
            for tap in earlier:
                tap.ran = True

    @contextmanager
    def _acting(self, actions: Sequence[Any], readers: Sequence[Reader] = ()) -> Iterator[None]:
        before = {layer: (list(tap.edits), list(tap.watchers)) for layer, tap in self._taps.items()}
        for layer, tap in self._taps.items():
            tap.edits += [action for action in actions if action.layer in (None, layer)]
            tap.watchers += [reader for reader in readers if reader.layer == layer]
        try:
            yield
        finally:
            for layer, tap in self._taps.items():
                tap.edits, tap.watchers = before[layer]

    # -- hooks ---------------------------------------------------------------------------------------------------

    def hook_names(self) -> list[str]:
        """Every hook point of the probed layers, in order; `mamba_probe.hooks` says what stands where.

        `blocks.{layer}.mixer.hook_h` also has a name for each token, `blocks.{layer}.mixer.hook_h.{token}`.

        >>> import mamba_probe as mp
        >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        ...     probe.hook_names()[:3]
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_mixer_in', 'blocks.0.mixer.hook_in_proj']
        """
        return [
            name
            for adapter in self._adapters
            for name in names_of(adapter.layer, tuple(self._modules(adapter)), adapter.hooked)
        ]

    def _modules(self, adapter: MixerAdapter) -> dict[str, tuple[nn.Module, bool]]:
        """Modules with a hook point: and whether it is at their input."""
        found: dict[str, tuple[nn.Module, bool]] = {}
        block = self._block(adapter)
        if block is not None:
            found |= {"block in": (block, True), "block out": (block, False)}
        if adapter.plain:
            found |= {"mixer in": (adapter.mixer, True), "mixer out": (adapter.mixer, False)}
        inner = {name: (adapter.mixer.get_submodule(name), False) for name in adapter.called}
        return found | inner

    def _block(self, adapter: MixerAdapter) -> nn.Module | None:
        """The module around one mixer, where that is called, and with the residual stream."""
        mixer = adapter.name.removesuffix("._original_component")  # TransformerLens's name of what it wraps
        name = mixer.rpartition(".")[0]
        if not name or not (adapter.plain and adapter.in_stream):
            return None
        block = self.model.get_submodule(name)
        alone = sum(other.name.startswith(f"{name}.") for other in self._adapters) == 1
        return block if alone and type(block).forward is not nn.Module.forward else None

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[Any]:
        """Have functions called at hook points inside the block; blocks nest.

        Args:
            fwd_hooks: (name, function) pairs; a name, a list of names, or a function of a name (see `hook_names`). The
                function is called function(tensor, hook=point) and returns None, or a tensor that goes on in its place.
            bwd_hooks: the same with gradients, which come when the user's backward does.

        Raises:
            ValueError: an unknown name, a tensor of another shape, no gradient where one is asked for; on leaving: a
                hook that never fired.
        """
        with self._hooked(fwd_hooks, bwd_hooks) as points:
            yield self
            _check_fired(points)

    def run_with_hooks(
        self, inputs: Any = None, attention_mask: Any = None, *, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (),
        text: Sequence[str] | None = None, tokenizer: Any = None,
    ) -> Any:  # fmt: skip
        """Run the model once with hooks on.

        Args:
            inputs, attention_mask, text, tokenizer: as in `record`.
            fwd_hooks, bwd_hooks: as in `hooks`. Functions of bwd_hooks are called when the user goes backward from what
                this returns.

        Returns:
            The logits, or what the model returns where it gives none.

        Raises:
            ValueError: what `hooks` refuses; a forward hook that never fired.
        """
        with self._hooked(fwd_hooks, bwd_hooks) as points:
            found = self._run(inputs, attention_mask, text, tokenizer)
            _check_fired(points, backward=False)
        return found

    def run_with_cache(
        self, inputs: Any = None, attention_mask: Any = None, *, names_filter: Names = None,
        text: Sequence[str] | None = None, tokenizer: Any = None,
    ) -> tuple[Any, ActivationCache]:  # fmt: skip
        """Run the model once and keep what stands at hook points.

        Args:
            inputs, attention_mask, text, tokenizer: as in `record`.
            names_filter: a name, a list of names, a function that says of a name whether it is wanted, or None for all
                (hook_h and hook_B_bar, which are large, too).

        Returns:
            The logits (or what the model returns), and the tensors by name, detached.

        Raises:
            ValueError: an unknown name, or one that never fired.

        >>> import mamba_probe as mp
        >>> task = mp.tasks.mqar(batch=2, length=64, seed=0)
        >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        ...     logits, cache = probe.run_with_cache(task, names_filter="blocks.0.mixer.hook_delta")
        >>> cache["delta", 0].shape
        torch.Size([2, 64, 276])
        """
        found: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            found[hook.name] = tensor.detach().clone()

        names = selected(names_filter, self.hook_names())
        with self._hooked([(names, keep)], (), reading=True) as points:
            logits = self._run(inputs, attention_mask, text, tokenizer)
            _check_fired(points)
        return logits, ActivationCache({name: found[name] for name in names})

    def _run(self, inputs: Any, attention_mask: Any, text: Sequence[str] | None, tokenizer: Any) -> Any:
        given = checked_input(self.model, self._adapters[0].sizes.width, inputs, attention_mask, text, tokenizer)
        (piece,) = given.pieces(None)
        found = self.model(**piece)
        return getattr(found, "logits", found)

    @contextmanager
    def _hooked(self, forward: Hooks, backward: Hooks, *, reading: bool = False) -> Iterator[list[HookPoint]]:
        """The hooks are on; `reading`: their functions change nothing."""
        self._check_attached()
        known = self.hook_names()
        adapters = {adapter.layer: adapter for adapter in self._adapters}
        points: list[HookPoint] = []
        contexts: dict[str, dict[Any, Any]] = {}
        actions: list[Any] = []
        readers: list[Reader] = []
        with ExitStack() as block:
            for names, function, is_gradient in [*paired("fwd_hooks", forward), *paired("bwd_hooks", backward)]:
                for name in selected(names, known):
                    points.append(point := HookPoint(name, contexts.setdefault(name, {}), backward=is_gradient))
                    layer, place, token = parsed(name)
                    quantity, family = SCAN.get(place.removeprefix("mixer.")), adapters[layer].sizes.family
                    if quantity is None:
                        module, at_input = self._modules(adapters[layer])[AROUND[place]]
                        takes = adapters[layer].takes if module is adapters[layer].mixer else "hidden_states"
                        block.callback(_on_module(module, takes if at_input else None, point, function).remove)
                        actions += [] if reading or is_gradient else [ModuleHook(point)]
                    elif is_gradient:
                        _check_has_gradient(name, quantity, token)
                        actions.append(GradientHook(point, function, family))
                    elif token is None and (quantity in WHOLE or (reading and quantity in EMITTED)):
                        readers.append(Reader(point, function, family))
                    else:
                        actions.append(ValueHook(point, function, family, alters=not reading))
            block.enter_context(self._acting(actions, readers))
            yield points

    # -- answers -------------------------------------------------------------------------------------------------

    def intervene(
        self, task: Task, edits: Sequence[Edit | Sequence[Edit]], *, batch_size: int | None = None
    ) -> xr.Dataset:
        """Answers of the model to a task under each edit, and under none.

        Args:
            task: a generated task (`mp.tasks.mqar(...)`).
            edits: one entry an intervention: an edit, or several applied together.

        Returns:
            n_correct and n_query over `intervention`, whose first entry is "none".

        Raises:
            ValueError: not a task, an edit that `edit` refuses, or edits that are active ("none" would be edited).
        """
        if not isinstance(task, Task):
            raise ValueError(f"intervene takes a Task (mp.tasks.mqar(...)); got {type(task).__name__}")
        self._check_unedited("intervene")
        asked = listed("edits", edits, "edits, or of lists of them")
        groups = [(), *([each] if isinstance(each, Edit) else listed("edits", each, "edits") for each in asked)]
        given = checked_input(self.model, self._adapters[0].sizes.width, task, None, None, None)
        counts = []
        for group in groups:
            with self.edit(*group):
                counts.append(task.accuracy(self._predict(given, batch_size)))
        names = ["none", *(" + ".join(map(repr, group)) for group in groups[1:])]
        n_correct, n_query = np.array(counts).T
        return xr.Dataset(
            {"n_correct": ("intervention", n_correct), "n_query": ("intervention", n_query)},
            {"intervention": np.array(names, dtype=object)},
            provenance.of_model(self.model, "interventions")
            | {"task": task.name, "task_params": json.dumps(task.params)},
        )

    def _predict(self, given: ModelInput, batch_size: int | None) -> np.ndarray:
        with torch.no_grad():
            logits = [self.model(**piece).logits.argmax(-1).cpu() for piece in given.pieces(batch_size)]
        return torch.cat(logits).numpy()


def _check_fired(points: Sequence[HookPoint], *, backward: bool = True) -> None:
    silent = [point.name for point in points if not point.fired and (backward or not point.backward)]
    if silent:
        kind = "gradient hooks" if all(point.backward for point in points if not point.fired) else "hooks"
        raise ValueError(f"{kind} that never fired: {', '.join(dict.fromkeys(silent))}: nothing came to that place")


def _check_has_gradient(name: str, quantity: str, token: int | None) -> None:
    if quantity in WHOLE and token is None:
        instead = "name one token, as in mixer.hook_h.7" if quantity == "h" else "take those of hook_delta and hook_B"
        raise ValueError(f"{name} can only be read, and no gradient passes there: {instead}")


def _on_module(module: nn.Module, takes: str | None, point: HookPoint, function: Callable[..., Any]) -> Any:
    """The function on what a module is given, in the argument `takes` or the first, or on what it gives (None).

    Returns:
        A handle to remove it.
    """

    def changed(tensor: Tensor) -> Tensor | None:
        if not point.backward:
            return point.call(function, tensor)
        watch(point, function, tensor, lambda gradient: gradient)
        return None

    if takes is not None:

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            found = changed(args[0] if args else kwargs[takes])
            if found is None:
                return None
            return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, takes: found})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, out: Any) -> Any:
        found = changed(out[0] if isinstance(out, tuple) else out)
        if found is None:
            return None
        return (found, *out[1:]) if isinstance(out, tuple) else found

    return module.register_forward_hook(after)
