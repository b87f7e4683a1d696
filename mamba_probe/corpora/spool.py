"""Numbers that are written one after another and then read anywhere, on disk: memory does not grow with them."""

import tempfile
import weakref
from typing import Any

import numpy as np
from jaxtyping import Int

__all__ = ["Spool"]


class Spool:
    """A nameless temporary file of whole numbers, gone with the last reader.

    >>> spool = Spool(np.int32)
    >>> spool.write(np.arange(3)), spool.write([7])
    (None, None)
    >>> spool.read().tolist()
    [0, 1, 2, 7]
    """

    def __init__(self, dtype: Any):
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="mamba_probe_")  # noqa: SIM115 - it lives as long as the spool
        weakref.finalize(self, self._file.close)  # what is mapped stays
        self.size = 0

    def write(self, values: Any) -> None:
        """Append them."""
        array = np.asarray(values, dtype=self._dtype)
        self._file.write(array.tobytes())
        self.size += array.size

    def read(self) -> Int[np.ndarray, " n"]:
        """All of them, read from the file when they are used."""
        self._file.flush()
        if not self.size:
            return np.zeros(0, self._dtype)
        return np.memmap(self._file, self._dtype, mode="r", shape=(self.size,))
