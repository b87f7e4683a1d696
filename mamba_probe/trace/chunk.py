"""One chunk that is not compressed, written as Zarr would write it: its bytes, then their CRC-32C; and files flushed.

Zarr copies a chunk several times on its way through codecs, under the interpreter's lock, so that four writers are no
faster than one and a recording has a third of the disk's rate. This writes from where the values lie. Nor does it wait
for the disk: a flush makes the disk empty its own cache, so the files of a block are flushed at once, before its entry.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
from google_crc32c import value as crc32c

__all__ = ["flush", "write_chunk"]

AT_ONCE = 16
"""Files that are flushed at a time: each does nothing but wait."""


def write_chunk(folder: Path, place: tuple[int, ...], values: np.ndarray) -> None:
    """Write the chunk at `place` of the array in `folder`, whole or not at all; it is on the disk after its `flush`.

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
            if hasattr(os, "posix_fadvise"):  # Linux begins to write it to the disk, and waits for nothing
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(file: int, data: np.ndarray) -> None:
    """All of it: the system may take less at a time."""
    left = data.data
    while len(left):
        left = left[os.write(file, left) :]


def flush(files: Iterable[Path]) -> None:
    """Have files on the disk, not only in the system's memory.

    Raises:
        OSError: one of them cannot be written, or is not there.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(_flush, files))


def _flush(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
