"""What is read at once of an axis: a run of its indices after another."""

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["runs"]


def runs(length: int, ends: Sequence[int] | np.ndarray, most: int) -> Iterator[slice]:
    """Runs of at most `most` indices, each up to the end of a chunk; a chunk that is longer is cut into equal runs.

    Args:
        length: of the axis.
        ends: where the chunks of a store end, ascending; none where nothing is stored in chunks.
        most: at least 1.

    >>> [(part.start, part.stop) for part in runs(9, [2, 4, 6, 8, 9], 5)]
    [(0, 4), (4, 9)]
    >>> [(part.start, part.stop) for part in runs(9, [8, 9], 5)]
    [(0, 4), (4, 9)]
    """
    start, edges = 0, np.append(np.asarray(ends, dtype=int), length)
    while start < length:
        ahead = edges[edges > start] - start
        whole = ahead[ahead <= most]
        size = int(whole[-1]) if len(whole) else -(-int(ahead[0]) // -(-int(ahead[0]) // most))
        stop = min(start + size, length)
        yield slice(start, stop)
        start = stop
