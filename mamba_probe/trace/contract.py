"""Checks of a Dataset against the schema, in one place: what was needed, what came, what to do."""

from difflib import get_close_matches

import xarray as xr

from mamba_probe.trace.schema import FAMILIES, SCHEMA_VERSION, VARIABLES

__all__ = ["nearest", "require", "unknown_name", "validate"]


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
    """Check that `trace` is a trace and holds `names`.

    Args:
        trace: what `probe.record` or `mp.open_trace` returned.
        names: variables of the schema, or coordinates.

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
    for name, spec in VARIABLES.items():
        if name in trace.data_vars and trace[name].dims != spec.dims(family):
            need, came = ", ".join(spec.dims(family)), ", ".join(map(str, trace[name].dims))
            if not need:
                raise ValueError(f"`{name}` is no variable of {family} traces; got it with dims ({came})")
            raise ValueError(f"`{name}` needs dims ({need}); got ({came})")
