"""Checks of a Dataset against the schema, in one place: what was needed, what came, what to do."""

from difflib import get_close_matches

import numpy as np
import xarray as xr

from mamba_probe.trace.schema import DIRECTIONS, FAMILIES, SCHEMA_VERSION, VARIABLES

__all__ = [
    "DIRECTED", "TOKEN_ORDER", "check_held", "check_same_direction", "directions", "nearest", "reordered", "require",
    "unknown_name", "validate",
]  # fmt: skip

TOKEN_ORDER = "token_order"
"""The attribute of a trace whose tokens are in the order in which a backward scan took them, then "reversed"."""
DIRECTED = "n_directions"
"""The attribute of a trace of layers that scan in several directions: how many."""


def nearest(name: object, known: list[str] | tuple[str, ...]) -> str:
    """A phrase with the known names closest to `name`, or all of them when none is close.

    >>> nearest("delt", ["delta", "B"])
    "did you mean 'delta'?"
    """
    close = get_close_matches(str(name), [str(k) for k in known], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known are: " + ", ".join(str(k) for k in known)


def unknown_name(kind: str, name: object, known: list[str] | tuple[str, ...]) -> ValueError:
    """The error for a name that does not exist, with the nearest ones that do."""
    return ValueError(f"unknown {kind} {name!r}: {nearest(name, known)}")


def require(trace: xr.Dataset, *names: str) -> None:
    """Check that an analysis can read `trace`, in which a token's past lies before it, and that it holds `names`.

    Args:
        trace: what `probe.record` or `mp.open_trace` returned.
        names: variables of the schema, or coordinates.

    Raises:
        ValueError: not a Dataset, not a trace, several directions or a backward one, rows that beam search reordered,
            or a variable that was not recorded.
    """
    check_held(trace, *names)
    if reordered(trace):
        raise ValueError(
            "rows of the trace were reordered while it was recorded (beam search), so that a row is no sequence: pass"
            " trace.probe.unrolled(), or trace.probe.unrolled(ids) with the ids that generate() returned"
        )
    held = directions(trace)
    if not held and DIRECTED in trace.attrs:
        raise ValueError(
            "the trace is of a layer that scans both ways, and lost the coordinate `direction`, which says which of its"
            ' scans this is: take one with trace.sel(direction="forward"), without drop=True'
        )
    if "direction" in trace.dims:
        raise ValueError(
            f"the trace holds the scans of {len(held)} direction(s), {', '.join(held)}, and an analysis reads one: pass"
            ' trace.sel(direction="forward"), or trace.probe.along("backward"), whose tokens are in the order that its'
            " scan took them in"
        )
    if any(DIRECTIONS[name] for name in held) and trace.attrs.get(TOKEN_ORDER) != "reversed":
        raise ValueError(
            f"the trace holds direction {held[0]}, whose scan took the tokens from the last to the first: what a token"
            f' remembers lies after it. Pass trace.probe.along("{held[0]}"), whose tokens are in the order of that scan'
        )


def check_same_direction(trace: xr.Dataset, weights: xr.Dataset) -> None:
    """Check that `weights` are of the direction of a trace that `require` took.

    Raises:
        ValueError: weights of several directions, or of another one than the trace's.
    """
    wanted, found = directions(trace), directions(weights)
    if wanted != found:
        raise ValueError(
            f"the weights are of direction {', '.join(found) or '(none)'}, the trace of"
            f" {', '.join(wanted) or '(none)'}: pass weights=weights.sel(direction=...) of the trace's direction"
        )


def directions(data: xr.Dataset) -> list[str]:
    """Which directions a trace, or weights, are of; none where their layers go one way only."""
    return [str(name) for name in np.atleast_1d(data["direction"].values)] if "direction" in data.coords else []


def reordered(trace: xr.Dataset) -> bool:
    """Whether a row of the trace goes on where another one was."""
    if "parent_row" not in trace.coords:
        return False
    check_held(trace, "prompt_id")
    parent = trace["parent_row"]
    return bool(((parent >= 0) & (parent != trace["prompt_id"])).any())


def check_held(trace: xr.Dataset, *names: str) -> None:
    """Check that `trace` is a trace, of any directions, and holds `names`.

    Raises:
        ValueError: not a Dataset, not a trace, or a variable that was not recorded.
    """
    validate(trace)
    missing = [name for name in names if name not in trace.variables]
    if missing:
        raise ValueError(
            f"the trace lacks {', '.join(f'`{m}`' for m in missing)}; it holds {sorted(map(str, trace.data_vars))}. "
            f"Record again with variables={tuple(sorted({*map(str, trace.data_vars), *missing} & set(VARIABLES)))}."
        )


def validate(trace: xr.Dataset) -> None:
    """Check version, family and the dimensions of every variable of the schema.

    Raises:
        ValueError: what was needed and what came.
    """
    if not isinstance(trace, xr.Dataset):
        raise ValueError(
            f"a trace is an xarray.Dataset; got {type(trace).__name__}. Use probe.record or mp.open_trace."
        )
    if trace.attrs.get("kind", "trace") != "trace":
        raise ValueError(f"this Dataset holds {trace.attrs['kind']}, not a trace")
    version, family = trace.attrs.get("schema_version"), trace.attrs.get("family")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"a trace needs attrs['schema_version'] == {SCHEMA_VERSION}; got {version!r}"
            f" in a Dataset of {sorted(map(str, trace.data_vars))}. Record it again with this version of mamba_probe."
        )
    if family not in FAMILIES:
        raise ValueError(f"a trace needs attrs['family'] in {FAMILIES}; got {family!r}")
    held = directions(trace)
    if ("direction" in trace.dims and not held) or not set(held) <= set(DIRECTIONS):
        raise ValueError(f"the coordinate `direction` needs names among {tuple(DIRECTIONS)}; got {held}")
    for name, spec in VARIABLES.items():
        dims = spec.dims(family, "direction" in trace.dims)
        if name in trace.data_vars and trace[name].dims != dims:
            need, came = ", ".join(dims), ", ".join(map(str, trace[name].dims))
            if not need:
                raise ValueError(f"`{name}` is no variable of {family} traces; got it with dims ({came})")
            raise ValueError(f"`{name}` needs dims ({need}); got ({came})")
