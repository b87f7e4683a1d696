"""What a result says: one sentence and a short table, each number with its null and its interval."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import xarray as xr

from mamba_probe.analyses.common.analysis import Row, analyses

__all__ = ["Finding", "described", "finding"]

MOST_TOLD = 12
"""Rows of its table that the text of a picture has; the table below it has all."""

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
    picture: str = ""
    """How to read its picture."""

    @property
    def headline(self) -> Row | None:
        """The first number that has both a null and an interval, else a null, else any; None of an empty table."""
        return max(self.rows, key=lambda row: (row.null not in ("", "none"), bool(row.interval)), default=None)


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
        analysis.drawn(result), _capital(other), analysis.picture,
    )  # fmt: skip


def described(found: Finding, models: Sequence[str]) -> str:
    """What the picture of a finding shows, in words and numbers, for who does not see it.

    Arguments:
        found: what is drawn.
        models: the model's name, and the reference's where it is drawn on the right.

    >>> row = Row("entropy, nats", "1.2", null="2", interval="1 to 1.4", layer=0)
    >>> described(Finding("Attention", "", "", "It is narrow.", (row,), ()), ["a"])
    'Attention of a. It is narrow. In numbers: layer 0: entropy, nats 1.2 (null 2; 95 % interval 1 to 1.4).'
    """
    told = "; ".join(_told(row, models[1:]) for row in found.rows[:MOST_TOLD])
    more = len(found.rows) - MOST_TOLD
    rest = f"; {more} more in the table below" if more > 0 else ""
    numbers = f" In numbers: {told}{rest}." if told else ""
    return f"{found.title} of {', and on the right of '.join(models)}. {found.sentence}{numbers}"


def _told(row: Row, other: Sequence[str]) -> str:
    known = {"null": row.null, "95 % interval": row.interval} | {f"of {name}": row.beside for name in other}
    said = "; ".join(f"{what} {value}" for what, value in known.items() if value)
    return f"{row.what} {row.value}{f' ({said})' if said else ''}"


def _capital(sentence: str) -> str:
    """A whole sentence: its first letter large, a full stop at its end."""
    ended = sentence if sentence.endswith((".", "?", "!")) or not sentence else f"{sentence}."
    return ended[:1].upper() + ended[1:]


def _paired(rows: list[Row], others: list[Row]) -> list[Row]:
    """Each row with the reference's value: of its only layer, or of the layer of the same number."""
    values, layers = {(row.quantity, row.layer): row.value for row in others}, {row.layer for row in others}
    only = next(iter(layers)) if len(layers) == 1 else None
    return [
        replace(row, beside=values.get((row.quantity, row.layer if only is None else only), "not measured"))
        for row in rows
    ]
