"""Kernels whose span is wanted, held in memory or, where they are too many for that, in a temporary file."""

import tempfile
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["IN_MEMORY", "Span"]

IN_MEMORY = 2**22
"""Most numbers that a span holds in memory (32 MiB)."""


class Span:
    """Kernels in a basis, which come a block at a time and are read a few functions of the basis at a time.

    More than `IN_MEMORY` numbers go, 8 bytes each, to a file without a name in the directory for temporary files
    (TMPDIR), whose place is free again once it is closed. What is read is the same to the bit.

    Args:
        most: how many kernels may come.
        size: of the basis.

    >>> span = Span(2, 4)
    >>> span.add(np.array([[1.0, 2.0, 3.0, 4.0]]))
    >>> len(span), span.functions(1, 3).tolist()
    (1, [[2.0, 3.0]])
    """

    def __init__(self, most: int, size: int) -> None:
        self.size, self._length = size, 0
        self._held: np.ndarray | None = None
        self._file: Any = None
        if most * size > IN_MEMORY:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # `close` closes it
        else:
            self._held = np.empty((most, size))

    def __len__(self) -> int:
        return self._length

    def add(self, coefficient: Float[np.ndarray, "kernel coefficient"]) -> None:
        """Take in the next kernels.

        Raises:
            OSError: the file cannot grow.
        """
        if self._held is not None:
            self._held[self._length : self._length + len(coefficient)] = coefficient
        else:
            self._write(memoryview(coefficient.astype(np.float64, copy=False).tobytes()))
        self._length += len(coefficient)

    def _write(self, left: memoryview) -> None:
        try:
            self._file.seek(8 * self.size * self._length)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"the kernels of a span do not fit into a temporary file in {tempfile.gettempdir()} ({error.strerror}):"
                " pass a smaller n_span, or let TMPDIR name a directory with more room",
            ) from error

    def functions(self, first: int, end: int) -> Float[np.ndarray, "kernel function"]:
        """Coefficients of the functions from `first` to the one before `end`, of every kernel that came.

        Raises:
            OSError: the file is shorter than what was written.
        """
        if self._held is not None:
            return self._held[: self._length, first:end]
        found = np.empty((self._length, end - first))
        for kernel, row in enumerate(found):
            self._file.seek(8 * (kernel * self.size + first))
            if self._file.readinto(row) != row.nbytes:
                raise OSError(f"kernel {kernel} of a span cannot be read back from its temporary file: it is too short")
        return found

    def close(self) -> None:
        """Let go of the kernels."""
        self._held, self._length = np.empty((0, self.size)), 0
        if self._file is not None:
            self._file.close()
