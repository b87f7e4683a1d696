"""Which analyses there are: folders with an entry.py, and files without an underscore; none of them is imported.

It stands outside of `common`, which loads xarray and more: a shell completes these names at each press of a key.
"""

from importlib.util import find_spec
from pathlib import Path

__all__ = ["modules", "names"]

PACKAGE = "mamba_probe.analyses"


def modules() -> dict[str, str]:
    """The module that holds each analysis' `ANALYSIS`, by name, in alphabetical order.

    >>> modules()["memory_horizon"]
    'mamba_probe.analyses.memory_horizon.entry'
    """
    spec = find_spec(PACKAGE)
    places = [Path(path) for path in (spec.submodule_search_locations if spec else None) or ()]
    folders = (entry.parent.name for at in places for entry in at.glob("*/entry.py"))
    files = (file.stem for at in places for file in at.glob("[!_]*.py"))
    found = {name: f"{PACKAGE}.{name}.entry" for name in folders} | {name: f"{PACKAGE}.{name}" for name in files}
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Their names.

    >>> "sinks" in names()
    True
    """
    return list(modules())
