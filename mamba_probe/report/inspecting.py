"""What a model is to the probe, as tables."""

from collections.abc import Iterator, Sequence

from rich.table import Column, Table
from torch import nn

from mamba_probe.estimate import estimate
from mamba_probe.hooks import parsed
from mamba_probe.mixers import MixerAdapter, find_mixers
from mamba_probe.planning import checked_plan, grouped
from mamba_probe.trace.memory import readable
from mamba_probe.trace.schema import DEFAULT_VARIABLES, VARIABLES

__all__ = ["described", "points"]


def described(model: nn.Module, rows: int, length: int) -> Iterator[Table]:
    """Yield a table of the layers that a probe takes over, and for each group of equal ones one of what it can record.

    Arguments:
        model: as `mp.attach` takes it; nothing of it runs.
        rows, length: of the recording that is weighed.

    Raises:
        ValueError: no supported mixer.
    """
    adapters = find_mixers(model)
    yield _layers(adapters)
    for sizes, layers in grouped(adapters).items():
        yield _variables(adapters, sizes, layers, rows, length)


def points(names: Sequence[str]) -> Table:
    """Hook points, one row for all layers that have the same.

    Arguments:
        names: those of `probe.hook_names()`.

    >>> table = points(["blocks.0.hook_mixer_in", "blocks.2.hook_mixer_in"])
    >>> [list(column.cells) for column in table.columns]
    [['0, 2'], ['blocks.{layer}.hook_mixer_in']]
    """
    by_layer: dict[int, list[str]] = {}
    for name in names:
        layer, place, _ = parsed(name)
        by_layer.setdefault(layer, []).append(f"blocks.{{layer}}.{place}")
    table = Table(Column("layers", justify="right"), "names", title="Hook points")
    for places in dict.fromkeys(map(tuple, by_layer.values())):
        layers = ", ".join(str(layer) for layer, found in by_layer.items() if tuple(found) == places)
        table.add_row(layers, "\n".join(places))
    return table


def _layers(adapters: Sequence[MixerAdapter]) -> Table:
    table = Table(Column("layer", justify="right"), "module", "class", "sizes", "edits", title="Layers")
    for adapter in adapters:
        edits = ", ".join(adapter.editable)
        table.add_row(str(adapter.layer), adapter.name, type(adapter.mixer).__name__, str(adapter.sizes), edits)
    return table


def _variables(adapters: Sequence[MixerAdapter], sizes: str, layers: tuple[int, ...], rows: int, length: int) -> Table:
    first = next(adapter for adapter in adapters if adapter.layer in layers)
    names = first.sizes.variables
    plan = checked_plan(adapters, grouped(adapters), names, layers, None, None, length)
    dtype = next(first.mixer.parameters()).dtype
    weighed = estimate(plan, rows, length, dtype, first.sizes.width).variables
    total = readable(sum(size for name, size in weighed.items() if name in DEFAULT_VARIABLES))
    table = Table(
        "variable", "dimensions", "what it is", Column(f"{rows} x {length} tokens", justify="right"),
        title=f"What {len(layers)} layer(s) can record ({sizes})",
        caption=f"{', '.join(DEFAULT_VARIABLES)}, recorded by default: {total}, uncompressed",
    )  # fmt: skip
    for name in names:
        table.add_row(name, ", ".join(VARIABLES[name].dims(first.family)), VARIABLES[name].long_name,
                      readable(weighed[name]))  # fmt: skip
    return table
