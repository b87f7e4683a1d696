"""What a result says: one sentence and a short table, each number with its null and its interval."""

from dataclasses import dataclass, replace

import xarray as xr

from mamba_probe.analyses.common.analysis import Row, analyses

__all__ = ["Finding", "finding"]

STATED = ("estimator", "null", "interval", "reduces_over")
"""What every result states."""


@dataclass(frozen=True)
class Finding:
    """The answer of one analysis."""

    title: str
    question: str
    reading: str
    """How to read its numbers, in plain words."""
    sentence: str
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    """Estimator, null, interval and what is reduced over, as the result states them."""
    drawn: bool = True
    """Whether its picture shows numbers, and not only that there are none."""
    beside: str = ""
    """What the same analysis says of the reference."""


def finding(name: str, result: xr.Dataset, beside: xr.Dataset | None = None) -> Finding:
    """The finding of a result of the analysis `name`, with the reference's numbers where its result is given."""
    analysis = analyses()[name]
    sentence, rows = analysis.says(result)
    other, others = analysis.says(beside) if beside is not None else ("", [])
    if beside is not None:
        rows = _paired(rows, others)
    stated = dict.fromkeys((*STATED, *analysis.notes))
    notes = tuple((key.replace("_", " "), str(result.attrs[key])) for key in stated if result.attrs.get(key))
    return Finding(
        analysis.title, analysis.question, analysis.reading, _capital(sentence), tuple(rows), notes,
        analysis.drawn(result), _capital(other),
    )  # fmt: skip


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _paired(rows: list[Row], others: list[Row]) -> list[Row]:
    """Each row with the reference's value: of its only layer, or of the layer of the same number."""
    values, layers = {(row.quantity, row.layer): row.value for row in others}, {row.layer for row in others}
    only = next(iter(layers)) if len(layers) == 1 else None
    return [
        replace(row, beside=values.get((row.quantity, row.layer if only is None else only), "not measured"))
        for row in rows
    ]
