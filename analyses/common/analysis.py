"""What an analysis is to a recorded run: how it is measured, said and drawn. Each file, or folder's entry.py, has one.

The command line, the report and their tables know the analyses by these entries alone; see docs/adding-an-analysis.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import xarray as xr

from mamba_probe.analyses._names import modules
from mamba_probe.analyses.common.words import FEW, Row, listed, name_layers, number, shown, span

__all__ = ["FEW", "Analysis", "Panel", "Row", "analyses", "listed", "name_layers", "number", "shown", "span"]


@dataclass(frozen=True)
class Panel:
    """A part of a picture: draw(result, ax), and which axes ("x", "y", "xy", "") are alike beside a reference's."""

    draw: Callable[..., Any]
    alike: str = ""


def _nothing(_run: Any) -> str:
    return ""


def _drawn(_result: xr.Dataset) -> bool:
    return True


@dataclass(frozen=True)
class Analysis:
    """An analysis of a recorded run.

    Attributes:
        title, question: as the report heads it.
        reading: how to read its numbers, in plain words.
        of_run: measures a `mamba_probe.run.Run` with a seed.
        says: the finding in one sentence, and its table.
        panels: what to draw, from above, for the model's result and, after it, a reference's.
        lacks: what a run lacks to be measured, in words; "" where nothing.
        drawn: whether the picture of a result shows numbers, and not only that there are none.
        notes: attributes of a result that its table states beside estimator, null, interval and reduces_over.
        apart: whether a reference is drawn in a picture of its own.
        picture: how to read the picture: what stands where, and how the nulls look.
    """

    title: str
    question: str
    reading: str
    of_run: Callable[[Any, int], xr.Dataset]
    says: Callable[[xr.Dataset], tuple[str, list[Row]]]
    panels: Callable[[Sequence[xr.Dataset]], Sequence[Panel]]
    lacks: Callable[[Any], str] = _nothing
    drawn: Callable[[xr.Dataset], bool] = _drawn
    notes: tuple[str, ...] = ()
    apart: bool = False
    picture: str = ""


@cache
def analyses() -> Mapping[str, Analysis]:
    """Every analysis by name, in alphabetical order: folders with an entry.py, and files, beside this one.

    >>> "memory_horizon" in analyses()
    True
    """
    return {name: import_module(module).ANALYSIS for name, module in modules().items()}
