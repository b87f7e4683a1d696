"""A result as a tidy table for pandas: a row a number, its interval and its nulls beside it."""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.frame import check_table, places

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["to_dataframe"]

VALUE, TEXT = "value", "text"
NULLABLE = {"i": "Int64", "u": "UInt64", "b": "boolean"}
"""Labels that stay what they are where a variable has no such dimension."""
_END = re.compile(r"_(low|high|p)$")
_NULL = re.compile(r"(?:^|(?<=_))(null_lti|null_shuffle|null_order|null|baseline|twin|other)(?:_|$)")
"""What a name has more than that of the number it belongs to: an end of its interval, or whose null it is."""


def to_dataframe(
    result: xr.Dataset, variables: str | Sequence[str] | None = None, *, max_memory: int | str | None = None
) -> "pd.DataFrame":
    """A result of any analysis, or of `mp.compare`, as one table.

    xarray's own `to_dataframe` has a row for each combination of all dimensions; here each variable has rows over its
    own dimensions alone. Source: the tidy form of H. Wickham, Tidy Data, J. Stat. Softw. 59 (2014).

    Args:
        result: what a `measure` returned.
        variables: which of its numbers; what belongs to them comes along. None: all.
        max_memory: bytes, or text as "8GB", that the table and its making may take; None: what is free now.

    Returns:
        Columns: variable; the dimensions (missing where a variable has them not) and the coordinates along them; value;
        low, high, p, and null, null_lti, null_shuffle, baseline, .. where the result has `X_low`, `null_X` and so on
        over dimensions of X, with ends of their own as null_low; text, of variables that hold words; units. What has
        no such X is a row of its own. A truth value is 1 or 0. What was not measured stays, as NaN.

    Raises:
        ValueError: a trace, an unknown variable, complex numbers, a table too large.

    >>> result = xr.Dataset({"layer_gain": ("layer", [2.0, 4.0]), "layer_gain_low": ("layer", [1.0, 3.0]),
    ...                      "layer_null_gain": ("layer", [1.0, 1.0]), "solved": ((), True)}, {"layer": [0, 7]})
    >>> to_dataframe(result).drop(columns="units")
         variable  layer  value  low  null
    0  layer_gain      0    2.0  1.0   1.0
    1  layer_gain      7    4.0  3.0   1.0
    2      solved   <NA>    1.0  NaN   NaN
    """
    import pandas as pd

    if not isinstance(result, xr.Dataset):
        raise ValueError(f"a result is an xarray.Dataset; got {type(result).__name__}")
    if "schema_version" in result.attrs and result.attrs.get("kind", "trace") == "trace":
        raise ValueError('this is a trace, not a result: pass trace.probe.to_dataframe(["delta"])')
    grouped = _grouped(result)
    if variables is not None:
        asked = [variables] if isinstance(variables, str) else list(variables)
        for name in asked:
            if name not in grouped:
                raise unknown_name("variable", name, tuple(grouped))
        grouped = {name: grouped[name] for name in asked}
    _check(result, grouped, max_memory)
    parts = [_rows(result, name, columns) for name, columns in grouped.items()]
    order = _order(result, grouped, list(dict.fromkeys(column for part in parts for column in part.columns)))
    return (
        pd.concat(parts, ignore_index=True).reindex(columns=order) if parts else pd.DataFrame(columns=pd.Index(order))
    )


def _order(result: xr.Dataset, grouped: Mapping[str, Any], found: Sequence[str]) -> list[str]:
    """Columns from left to right: what and where, its value and interval, its nulls, words, and units."""
    dims = [str(dim) for name in grouped for dim in result[name].dims]
    where = ["variable", *dims, *(column for column in found if column in result.coords)]
    last = [TEXT, "units"]
    nulls = [column for column in found if column not in last]
    known = {"variable", "units", *found}
    return [column for column in dict.fromkeys([*where, VALUE, "low", "high", "p", *nulls, *last]) if column in known]


def _grouped(result: xr.Dataset) -> dict[str, dict[str, str]]:
    """The variables by the number they belong to, and the column of each."""
    known = {str(name): set(array.dims) for name, array in result.data_vars.items()}
    places = {name: _place(name, known) for name in known}
    found: dict[str, dict[str, str]] = {name: {} for name in known if places[name] == (name, VALUE)}
    for name, (base, column) in places.items():
        found[base][column] = name
    return found


def _place(name: str, known: Mapping[str, set[Any]]) -> tuple[str, str]:
    """Which number a variable belongs to, and as what; itself, as its value, where there is none."""
    if name in ("low", "high", "null", "baseline") and known[name] <= known.get(VALUE, set()):
        return VALUE, name
    end = _END.search(name)
    stem, said = (name[: end.start()], [end[1]]) if end else (name, [])
    tags: list[str] = []
    while True:
        base = stem
        if (tags or said) and base in known and known[name] <= known[base] and _place(base, known) == (base, VALUE):
            return base, "_".join([*tags, *said])
        tag = _NULL.search(stem)
        if tag is None:
            return name, VALUE
        tags.append(tag[1])
        stem = (stem[: tag.start()] + stem[tag.end() :]).removesuffix("_")


def _check(result: xr.Dataset, grouped: Mapping[str, Mapping[str, str]], max_memory: int | str | None) -> None:
    """Refuse complex numbers, and what does not fit into memory."""
    rows, widest = 0, 0
    for name, columns in grouped.items():
        for each in columns.values():
            if result[each].dtype.kind == "c":
                raise ValueError(
                    f"`{each}` holds complex numbers, and a column of values real ones: pass"
                    f" result.assign({each}=abs(result.{each})), or variables= without it"
                )
        rows += prod(result[name].shape)
        widest = max(widest, len(columns))
    dims = {dim for name in grouped for dim in result[name].dims}
    coords = sum(1 for coord in result.coords.values() if set(coord.dims) <= dims)
    check_table(rows, 8 * (3 + len(dims) + coords + widest), len(dims), max_memory)


def _rows(result: xr.Dataset, name: str, columns: Mapping[str, str]) -> "pd.DataFrame":
    import pandas as pd

    array = result[name]
    dims = tuple(map(str, array.dims))
    found: dict[str, Any] = {"variable": name}
    for where, labels in places(result[[name]], dims).items():
        column = pd.Series(np.asarray(labels))
        found[where] = column.astype(NULLABLE[column.dtype.kind]) if column.dtype.kind in NULLABLE else column
    for column, each in columns.items():
        values = result[each].broadcast_like(array).transpose(*array.dims).values.ravel()
        text = values.dtype.kind not in "fiub"
        found[TEXT if text and column == VALUE else column] = values.astype(str if text else np.float64)
    return pd.DataFrame(found | {"units": array.attrs.get("units", "")}, index=range(array.size))
