"""What is found of a trained model, where nothing is demanded of it: words that neither hold nor fail."""

import math
from collections.abc import Mapping
from typing import Any

from mamba_probe.reproduce.table import REPORTED, Cell, Row

__all__ = ["BETWEEN", "LIES", "NO_CIRCUIT", "OUTSIDE", "SHOWN", "UNSHOWN", "found", "lies", "way"]

BETWEEN, OUTSIDE = "between", "NOT between"
SHOWN, UNSHOWN = "shown", "not shown"
NO_CIRCUIT = "no circuit"
LIES = "value, or an end of its interval, between null and ideal"
Interval = tuple[float, float]


def lies(value: float, interval: Interval, null: float, ideal: float) -> str:
    """Say whether a value lies between its null and its ideal, or its interval reaches there.

    >>> lies(0.8, (0.7, 0.9), 0.1, 1.0), lies(-0.2, (-0.3, -0.1), 0.1, 1.0), lies(0.0, (-0.1, 0.2), 0.1, 1.0)
    ('between', 'NOT between', 'between')
    """
    if math.isnan(value) or math.isnan(null) or math.isnan(ideal):
        return REPORTED
    low, high = sorted((null, ideal))
    least, most = (value if math.isnan(end) else end for end in interval)
    return BETWEEN if min(least, value) <= high and max(most, value) >= low else OUTSIDE


def way(value: float, null: float, ideal: float) -> float:
    """Return how far from the null to the ideal a value is: 0 and 1 at these; NaN where they are one.

    >>> way(0.75, null=0.5, ideal=1.0)
    0.5
    """
    return (value - null) / (ideal - null) if ideal != null else math.nan


def found(
    cell: Cell, quantity: str, value: float, interval: Interval, verdict: str, criterion: str,
    said: Mapping[str, Any], **more: Any,
) -> Row:  # fmt: skip
    """Return the row of a finding.

    Arguments:
        cell: whose table it stands in.
        quantity: what the value is.
        value, interval: the number and its 95 % interval over rows, NaN without one.
        verdict: what is found.
        criterion: what the verdict hangs on.
        said: of the checkpoint.
        more: the rest of the row.
    """
    low, high = interval
    kept = {"interval": "none", "bound": math.nan} if math.isnan(low) else {"bound": math.nan}
    rest: dict[str, Any] = {"interval": "bootstrap 95 % over sequences", **kept, **said, **more}
    return Row(
        table=cell.table, quantity=quantity, value=value, low=low, high=high, criterion=criterion, verdict=verdict,
        **rest,
    )  # fmt: skip
