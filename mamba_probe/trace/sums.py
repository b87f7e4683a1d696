"""What the chunks of a netCDF file must give when they are read.

Each has a checksum, but what HDF5 notes of where they lie has none: one flipped bit there and a fill value, or zeros,
whose checksum is zero, are read in place of what was written.
"""

import json
import zlib
from collections.abc import Iterator
from typing import Any

__all__ = ["CHECKED_BYTES", "SUMS", "check_sums", "parts", "sums_of"]

SUMS = "values_crc32"
"""The attribute of a netCDF file that holds a CRC-32 of what is read of each variable in chunks."""
CHECKED_BYTES = 2**26
"""Most bytes of a file whose values are compared with it when it is opened; `verify` compares those of any."""


def sums_of(file: Any) -> str:
    """A CRC-32 of the numbers of each variable in chunks of an open HDF5 file, by name, as JSON."""
    summed = [name for name in file if file[name].chunks is not None and file[name].dtype.kind in "biuf"]
    return json.dumps({name: _sum(file[name]) for name in sorted(summed)})


def check_sums(noted: str | None, file: Any) -> None:
    """Compare what is read of an open HDF5 file with what was read when it was written; older files noted nothing.

    Raises:
        ValueError: it is something else, of which variables.
    """
    if noted is None:
        return
    was, found = json.loads(noted), json.loads(sums_of(file))
    changed = sorted(name for name in was | found if was.get(name) != found.get(name))
    if changed:
        raise ValueError(
            f"{', '.join(changed)} gives other values than were written: a bit was flipped in what HDF5 notes of its"
            " chunks. Restore it from a copy, or record it again"
        )


def parts(variable: Any) -> Iterator[tuple[slice, ...]]:
    """Where the chunks of an HDF5 dataset lie; all of it where it has none."""
    if variable.chunks is None or not variable.size:
        return iter([tuple(slice(0, n) for n in variable.shape)])
    return variable.iter_chunks()


def _sum(variable: Any) -> int:
    found = 0
    for at in parts(variable):
        found = zlib.crc32(variable[at].tobytes(), found)
    return found
