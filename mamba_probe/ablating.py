"""What a model loses when a part is taken out, one forward a part: the step sizes of a class of tokens, a layer, heads.

`mamba_probe.analyses.sinks` and `mamba_probe.analyses.ablation` measure what these collect. Source: ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from mamba_probe.arguments import whole, wholes
from mamba_probe.edits import Edit, zero
from mamba_probe.hooks import HookPoint
from mamba_probe.losses import losses
from mamba_probe.trace.contract import unknown_name

__all__ = ["ablate_class", "ablate_units"]

MOST_HEADS = 64
"""Heads of a layer, up to which each is ablated unless told."""
OVER = ("batch", "token")

Mask = Bool[np.ndarray, "batch token"]


# -- the step sizes of a class of tokens ---------------------------------------------------------------------------


def ablate_class(
    probe: Any, inputs: Any, attention_mask: Any = None, *, classes: Mapping[str, Any] | xr.DataArray,
    n_random: int = 5, seed: int = 0, batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Take from each class of tokens what sets its step sizes apart: what that does to the loss.

    $$\Delta_t \leftarrow \frac{1}{|R|} \sum_{s \in R} \Delta_s \quad \text{for the row's tokens } t \text{ of the
    class, } R \text{ its other tokens,}$$

    in every layer and head, each with the means of that run. Beside it, as a null, the same for random tokens of the
    row, as many of them.

    Args:
        probe, inputs, attention_mask, batch_size: as in `mamba_probe.losses.losses`.
        classes: by name, which tokens (batch, token) belong to it; or what `sinks.classes(trace)` returned.
        n_random: random sets of tokens a class.
        seed: of these.

    Returns:
        loss and correct (batch, token) as they are; class_loss, class_correct (class, batch, token) with the class
        ablated; random_loss, random_correct (class, draw, batch, token); member (class, batch, token).

    Raises:
        ValueError: no class, one that no row has beside other tokens (a row it holds whole is left),
            a mask of another shape, a layer without
            step sizes to change, and what `losses` refuses.

    >>> import mamba_probe as mp
    >>> task = mp.tasks.mqar(batch=2, length=64, seed=0)
    >>> with mp.attach(mp.load("zoo:trained-mqar-mamba2")) as probe:
    ...     found = ablate_class(probe, task, classes={"value": task.role == "value"}, n_random=1)
    >>> found["correct"].mean().item(), found["class_correct"].mean().item() < 0.1
    (1.0, True)
    """
    n_random, seed = whole("n_random", n_random, 1), whole("seed", seed)  # without random tokens there is no null
    names = [name for name in probe.hook_names() if name.endswith("mixer.hook_delta")]
    if not names:
        raise ValueError("no layer of this model selects its step sizes (S4D's are constant): there is none to ablate")
    _one_direction(probe)
    intact = losses(probe, inputs, attention_mask, batch_size=batch_size)
    masks = _masks(classes, intact["valid"].values)
    found: dict[str, list[xr.Dataset]] = {"class": [], "random": []}
    for index, mask in enumerate(masks.values()):
        found["class"].append(_without(probe, inputs, attention_mask, names, mask, intact, batch_size))
        for draw in range(n_random):
            random = _random(mask, intact["valid"].values, (seed, index, draw))
            found["random"].append(_without(probe, inputs, attention_mask, names, random, intact, batch_size))
    shape = {"class": (len(masks),), "random": (len(masks), n_random)}
    dims = {"class": ("class",), "random": ("class", "draw")}
    joined = {name: _joined(name, found[name], dims[name], shape[name]) for name in found}
    member = ("class", *OVER), np.stack(list(masks.values())), {"long_name": "whether of the class", "units": "1"}
    coords = {"class": list(masks), "draw": np.arange(n_random)}
    what = "delta of the class set to the mean of the row's other tokens, in every layer and head"
    given = intact["valid"].values
    alone = int((given.sum(1) == 1).sum())
    what += f" ({alone} row(s) of one token left as they are)" if alone else ""
    attrs = {"kind": "class ablation", "ablated": what, "n_random": n_random, "seed": seed}
    return intact.assign(joined["class"] | joined["random"] | {"member": member}).assign_coords(coords).assign_attrs(
        attrs | {"null": "the same for as many random tokens of each row", "n_forward": 1 + len(masks) * (1 + n_random)}
    )  # fmt: skip


def _one_direction(probe: Any) -> None:
    several = [adapter.layer for adapter in probe._adapters if adapter.sizes.directions]
    if several:
        raise ValueError(f"layers {several} scan in several directions: which one's part is taken out is not defined")


def _masks(classes: Mapping[str, Any] | xr.DataArray, valid: Mask) -> dict[str, Mask]:
    """By name, which valid tokens belong to each class."""
    if isinstance(classes, xr.DataArray):
        if classes.dims != ("class", *OVER):
            raise ValueError(
                f"classes has dims ('class', 'batch', 'token'), as sinks.classes(trace); got {classes.dims}"
            )
        classes = dict(zip(classes["class"].values.tolist(), classes.values, strict=True))
    if not isinstance(classes, Mapping) or not classes:
        raise ValueError(f"classes is a non-empty mapping of names to (batch, token) masks; got {classes!r}")
    found = {}
    for name, given in classes.items():
        mask = np.asarray(given)
        if mask.shape != valid.shape or mask.dtype != bool:
            raise ValueError(
                f"class {name!r} needs booleans (batch, token) = {valid.shape}; got {mask.dtype} {mask.shape}"
            )
        found[str(name)] = mask = mask & valid
        filled = np.flatnonzero(mask.any(1) & (mask.sum(1) == valid.sum(1)))
        found[str(name)] = kept = mask & (mask.sum(1) < valid.sum(1))[:, None]
        if not kept.any():
            what = f"every token of row {filled[0]}, which leaves none to take a mean of" if len(filled) else "no token"
            raise ValueError(f"class {name!r} holds {what}")
    return found


def _random(mask: Mask, valid: Mask, seed: tuple[int, ...]) -> Mask:
    """As many valid tokens of each row, drawn from all of them."""
    rng, found = np.random.default_rng(seed), np.zeros_like(mask)
    for row, chosen in enumerate(mask):
        found[row, rng.choice(np.flatnonzero(valid[row]), chosen.sum(), replace=False)] = True
    return found


def _without(
    probe: Any,
    inputs: Any,
    attention_mask: Any,
    names: list[str],
    mask: Mask,
    intact: xr.Dataset,
    batch_size: int | None,
) -> xr.Dataset:
    """Losses with the step sizes at `mask` set to the mean of the row's others."""
    others = intact["valid"].values & ~mask

    def levelled(delta: Tensor, hook: HookPoint) -> Tensor:
        start = hook.ctx.setdefault("row", 0)  # pieces of the batch come one after another
        hook.ctx["row"] = stop = start + len(delta)
        weight, chosen = (delta.new_tensor(each[start:stop, :, None]) for each in (others, mask))
        mean = (delta * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return delta.where(chosen == 0, mean)

    return losses(probe, inputs, attention_mask, fwd_hooks=[(names, levelled)], batch_size=batch_size)


def _joined(
    name: str, found: Sequence[xr.Dataset], dims: tuple[str, ...], shape: tuple[int, ...]
) -> dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]]:
    """loss and correct of several runs, by the axes that number them."""
    return {
        f"{name}_{quantity}": (
            (*dims, *OVER),
            np.stack([each[quantity].values for each in found]).reshape(*shape, *found[0][quantity].shape),
            found[0][quantity].attrs,
        )
        for quantity in ("loss", "correct")
    }


# -- layers, heads, groups of channels -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A layer as a whole, or consecutive heads of it (Mamba-1, S4D: channels)."""

    kind: str
    layer: int
    first: int
    size: int
    word: str
    n_channels: int
    """Channels that it has: a head of Mamba-2 has several."""

    @property
    def name(self) -> str:
        if self.kind == "layer":
            return f"layer {self.layer}"
        last = self.first + self.size - 1
        which = f"{self.word} {self.first}" if self.size == 1 else f"{self.word}s {self.first}-{last}"
        return f"layer {self.layer} {which}"

    @property
    def pool(self) -> tuple[int, int]:
        """From which layer's channels its null is drawn (-1: all layers'), and how many."""
        return -1 if self.kind == "layer" else self.layer, self.n_channels


def ablate_units(
    probe: Any, inputs: Any, attention_mask: Any = None, *, layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None, group: int | None = None, n_random: int = 3, seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Take out one unit after another: what that does to the loss.

    A layer: its mixer's output is 0. Heads (Mamba-2) or channels (Mamba-1, S4D): what the scan reads out for them,
    before the gate, is 0: $y_t[h] = 0$ at every token; Mamba-2's norm then rescales the others. Beside it, as a null,
    as many channels drawn at random: for heads from the same layer, for a layer from all of them.

    Args:
        probe, inputs, attention_mask, batch_size: as in `mamba_probe.losses.losses`.
        layers: the model's own numbers; None is all.
        heads: indices of heads (channels) to ablate, each alone, in each of the layers; () is none. None: every one
            of a layer that has 64 or fewer, and none of others.
        group: in place of heads: consecutive ones, this many at a time (the last group of a layer may have fewer).
        n_random: random sets for each number of channels.
        seed: of these.

    Returns:
        loss and correct (batch, token) as they are; unit_loss, unit_correct (unit, batch, token), units with
        coordinates kind, layer, first, size and pool; random_loss, random_correct (pool, draw, batch, token). A unit
        without a null has pool -1: a layer of a model with one.

    Raises:
        ValueError: an unknown layer or head, both heads and group, a layer without a hook point at its output, and what
            `losses` refuses.

    >>> import mamba_probe as mp
    >>> with mp.attach(mp.load("zoo:trained-mqar-mamba2")) as probe:
    ...     found = ablate_units(probe, mp.tasks.mqar(batch=4, length=64, seed=0), n_random=1)
    >>> found["unit"].values.tolist()[:3], found["unit_correct"].sel(unit="layer 0").mean().item()
    (['layer 0', 'layer 0 head 0', 'layer 0 head 1'], 0.0)
    """
    n_random, seed = whole("n_random", n_random, 1), whole("seed", seed)  # without random channels there is no null
    _one_direction(probe)
    units = _units(probe, layers, heads, group)
    alone = len(probe.layers) == 1
    pools = list(dict.fromkeys(unit.pool for unit in units if not (alone and unit.kind == "layer")))

    def run(edits: Sequence[Edit] = (), hooks: Sequence[Any] = ()) -> xr.Dataset:
        return losses(probe, inputs, attention_mask, edits=edits, fwd_hooks=hooks, batch_size=batch_size)

    intact = run()
    ablated = [run(**_taken_out(unit)) for unit in units]
    random = [
        run(_scattered(probe, pool, (seed, index, draw)))
        for index, pool in enumerate(pools) for draw in range(n_random)
    ]  # fmt: skip
    found = _joined("unit", ablated, ("unit",), (len(units),))
    if random:
        found |= _joined("random", random, ("pool", "draw"), (len(pools), n_random))
    coords = {name: ("unit", [getattr(unit, name) for unit in units]) for name in ("kind", "layer", "first", "size")}
    coords |= {"unit": [unit.name for unit in units], "unit_pool": ("unit", [_place(unit, pools) for unit in units])}
    attrs = {"kind": "unit ablation", "n_random": n_random, "seed": seed, "n_forward": 1 + len(units) + len(random)}
    attrs |= {"ablated": "a layer's mixer output, or what its scan reads out for some heads (channels), is 0"}
    attrs |= {"null": "as many channels drawn at random: of the same layer, and for a layer of all layers"}
    return intact.assign(found).assign_coords(coords).assign_attrs(attrs)


def _place(unit: _Unit, pools: list[tuple[int, int]]) -> int:
    return pools.index(unit.pool) if unit.pool in pools else -1


def _units(probe: Any, layers: Sequence[int] | None, heads: Sequence[int] | None, group: int | None) -> list[_Unit]:
    if heads is not None and group is not None:
        raise ValueError(f"give heads or group, and not both; got heads={heads!r} and group={group!r}")
    group = None if group is None else whole("group, a number of consecutive heads or channels,", group, 1)
    adapters = {adapter.layer: adapter for adapter in probe._adapters}
    found: list[_Unit] = []
    for layer in adapters if layers is None else wholes("layers", layers):
        if layer not in adapters:
            raise unknown_name("layer", str(layer), [str(known) for known in adapters])
        sizes = adapters[layer].sizes
        if f"blocks.{layer}.hook_mixer_out" not in probe.hook_names():
            raise ValueError(f"layer {layer} has no hook point hook_mixer_out, so its output cannot be taken out")
        word = "head" if sizes.family == "mamba2" else "channel"
        layer_unit = _Unit("layer", layer, 0, sizes.n_heads, word, sizes.n_heads * sizes.head_channels)
        found.append(layer_unit)
        for first, size in _spans(sizes.n_heads, heads, group, word, layer):
            found.append(replace(layer_unit, kind=word, first=first, size=size, n_channels=size * sizes.head_channels))
    return found


def _spans(
    n_heads: int, heads: Sequence[int] | None, group: int | None, word: str, layer: int
) -> list[tuple[int, int]]:
    """First head and number of heads of each unit of a layer."""
    if group is not None:
        return [(first, min(group, n_heads - first)) for first in range(0, n_heads, group)]
    if heads is None:
        return [(head, 1) for head in range(n_heads)] if n_heads <= MOST_HEADS else []
    chosen = np.asarray(wholes("heads", heads), dtype=int)
    if len(np.unique(chosen)) < len(chosen):
        raise ValueError(f"heads needs distinct integers, indices of {word}s; got {heads!r}")
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < n_heads:
        raise ValueError(f"heads {chosen.tolist()}: layer {layer} has {word}s 0 to {n_heads - 1}")
    return [(head, 1) for head in chosen.tolist()]


def _taken_out(unit: _Unit) -> dict[str, Any]:
    if unit.kind == "layer":
        return {"hooks": [(f"blocks.{unit.layer}.hook_mixer_out", lambda out, hook: out * 0)]}
    return {"edits": [zero("y", unit.layer, **{unit.word: range(unit.first, unit.first + unit.size)})]}


def _scattered(probe: Any, pool: tuple[int, int], seed: tuple[int, ...]) -> list[Edit]:
    """Edits that take out as many channels, drawn from one layer's, or from all (-1)."""
    layer, size = pool
    sizes = {adapter.layer: adapter.sizes for adapter in probe._adapters if layer in (-1, adapter.layer)}
    each = [(at, head, inner) for at, one in sizes.items()
            for head in range(one.n_heads) for inner in range(one.head_channels)]  # fmt: skip
    chosen = np.random.default_rng(seed).choice(len(each), size, replace=False)
    edits: dict[tuple[int, int], list[int]] = {}
    for at, head, inner in (each[index] for index in sorted(chosen.tolist())):
        key, index = ((at, head), inner) if sizes[at].family == "mamba2" else ((at, -1), head)
        edits.setdefault(key, []).append(index)
    return [
        zero("y", at, channel=inside) if head == -1 else zero("y", at, head=head, head_channel=inside)
        for (at, head), inside in edits.items()
    ]
