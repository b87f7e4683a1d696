"""From what a user asks to record to a checked plan: names, layers, tokens, channels."""

from collections.abc import Mapping, Sequence
from typing import Any

from mamba_probe.arguments import texts, wholes
from mamba_probe.mixers import MixerAdapter
from mamba_probe.recorder import Plan
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.schema import VARIABLES

__all__ = ["checked_plan", "grouped"]

ABSENT = {"delta_cumsum": "delta is constant", "z": "nothing gates the scan of these"}
"""Why layers lack a variable."""


def grouped(adapters: Sequence[MixerAdapter]) -> dict[str, tuple[int, ...]]:
    """Layers that can share one trace, equal in family and sizes, by what those are."""
    groups: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        key = str(adapter.sizes)
        groups[key] = (*groups.get(key, ()), adapter.layer)
    return groups


def checked_plan(
    adapters: Sequence[MixerAdapter], groups: Mapping[str, tuple[int, ...]], variables: Sequence[str],
    layers: Sequence[int] | None, tokens: Sequence[int] | None, channels: Sequence[int] | None, length: int | None,
) -> Plan:  # fmt: skip
    """The plan of a recording.

    Raises:
        ValueError: an unknown variable, layer, token or channel (nearest given), or layers of different sizes.
    """
    names = list(dict.fromkeys(texts("variables", variables)))
    for name in names:
        if name not in VARIABLES:
            raise unknown_name("variable", name, tuple(VARIABLES))
    known = [adapter.layer for adapter in adapters]
    chosen = known if layers is None else _indices(layers, "layer", known)
    by_layer = {adapter.layer: adapter.sizes for adapter in adapters}
    if len({by_layer[layer] for layer in chosen}) > 1:
        listing = "; ".join(f"layers {list(numbers)}: {sizes}" for sizes, numbers in groups.items())
        raise ValueError(f"layers of different sizes cannot share one trace. Pass layers= of one group: {listing}")
    sizes = by_layer[chosen[0]]
    absent = [name for name in names if name not in sizes.variables]
    if absent:
        why = "; ".join(ABSENT[name] for name in absent)
        raise ValueError(f"{sizes.family} layers have no {', '.join(absent)}: {why}. Known: {list(sizes.variables)}")
    heads = None if channels is None else tuple(_indices(channels, "channel", range(sizes.n_heads)))
    kept = None if tokens is None else tuple(_indices(tokens, "token", range(length or 0)))
    gaps = kept is not None and kept[-1] - kept[0] >= len(kept)
    if gaps and sizes.family != "s4d" and "delta_cumsum" not in names:
        names.append("delta_cumsum")  # the gaps' step sizes would be lost
    return Plan(sizes, tuple(names), tuple(chosen), kept, heads)


def _indices(asked: Any, kind: str, known: Sequence[int]) -> list[int]:
    """`asked`, increasing, each of them known."""
    values = wholes(f"{kind}s (None is all)", asked)
    if not values:
        raise ValueError(f"{kind}s is empty; pass None for all")
    unknown = [value for value in values if value not in known]
    if unknown:
        if isinstance(known, range):
            raise ValueError(f"unknown {kind} {unknown[0]}: expected 0..{len(known) - 1}")
        close = sorted(known, key=lambda k: abs(k - unknown[0]))[:3]
        raise ValueError(f"unknown {kind} {unknown[0]!r}: nearest are {close} of {len(known)} probed")
    return sorted(set(values))
