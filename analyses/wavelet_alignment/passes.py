"""Passes over a row: it is read once for as many queries as may hold kernels for their spans."""

from collections.abc import Generator

import numpy as np
from jaxtyping import Int

from mamba_probe.analyses.wavelet_alignment import span
from mamba_probe.analyses.wavelet_alignment.kernels import Kernels
from mamba_probe.analyses.wavelet_alignment.statistics import Query, Settings

__all__ = ["HELD", "ON_DISK", "SPANNING", "of_row"]

SPANNING = ("real", "null")
"""Variants whose numbers the result has by kernel and of the span; of the others it has those of layers."""

HELD = 2**24
"""Numbers of kernels held at once, for spans and read-outs; one query may take more."""

ON_DISK = 32
"""Numbers of a span in a temporary file that count as one in memory: at most 4 GiB of files at once; one query may
take more."""


def of_row(
    kernels: Kernels, variants: dict[str, str], layer: int, row: int, at: Int[np.ndarray, " query"],
    window: Int[np.ndarray, " query"], settings: Settings, n_kept: int = 0,
) -> Generator[tuple[str, Query], None, None]:  # fmt: skip
    """Each query of a row in each variant, with the variant's label; measured, and released when the next is asked for.

    Args:
        kernels: where kernels come from.
        variants: label of each variant, and its name there.
        layer, row: by position.
        at, window: of the queries.
        settings: what is measured.
        n_kept: kernels of the first query to keep, as executed.
    """
    size = len(kernels.names)
    wanted = [(query, label) for query in range(len(at)) for label in variants]
    spans = {label: min(size, settings.n_span) if label in SPANNING else 0 for label in variants}
    spanned = np.array([window[query] * spans[label] for query, label in wanted])
    held = np.where(spanned <= span.IN_MEMORY, spanned, spanned // ON_DISK)
    held += kernels.held * np.repeat(window, len(variants))
    passes = np.maximum(np.cumsum(held) - 1, 0) // HELD
    for one in np.unique(passes):
        now = [wanted[i] for i in np.flatnonzero(passes == one)]
        found = [
            Query(size, settings, label == "real", label in SPANNING, n_kept if (query, label) == (0, "real") else 0)
            for query, label in now
        ]
        asked = [(int(at[query]), int(window[query]), variants[label]) for query, label in now]
        try:
            for i, block in kernels.kernels(layer, row, asked):
                found[i].add(block)
            for (_, label), query in zip(now, found, strict=True):
                yield label, query
                query.release()
        finally:
            for query in found:
                query.release()
