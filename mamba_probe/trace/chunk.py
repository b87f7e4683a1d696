"""One chunk that is not compressed, written as Zarr would write it: its bytes, then their CRC-32C.

Zarr copies a chunk several times on its way through codecs, under the interpreter's lock, so that four writers are no
faster than one and a recording has a third of the disk's rate. This writes from where the values lie.
"""

import os
from pathlib import Path
from uuid import uuid4

import numpy as np
from google_crc32c import value as crc32c

__all__ = ["write_chunk"]


def write_chunk(folder: Path, place: tuple[int, ...], values: np.ndarray) -> None:
    """Write the chunk at `place` of the array in `folder`, whole and on the disk or not at all.

    Args:
        folder: of the Zarr array, of little-endian values with no codec but crc32c.
        place: of the chunk, one number a dimension.
        values: of the chunk's full shape.

    Raises:
        OSError: it cannot be written.
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    data.flags.writeable = False  # what the checksum asks
    target = folder.joinpath("c", *map(str, place))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            _write(file.fileno(), data)
            _write(file.fileno(), np.frombuffer(crc32c(data).to_bytes(4, "little"), np.uint8))
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(file: int, data: np.ndarray) -> None:
    """All of it: the system may take less at a time."""
    left = data.data
    while len(left):
        left = left[os.write(file, left) :]
