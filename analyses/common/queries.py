"""Which query of a row an analysis looks at."""

import numpy as np
import xarray as xr

__all__ = ["answerable_queries"]


def answerable_queries(trace: xr.Dataset) -> np.ndarray | None:
    """Position of one query a row, (batch, 1): the last whose source lies in the window up to it, else the last query.

    A kernel is taken over the last 2^floor(log2 n) of the n tokens up to its query; where the pair was written before
    that window there is nothing to see. None without a task: then the last valid token is the query.
    """
    if "role" not in trace.coords:
        return None
    position = trace["position"].values
    asked = (trace["role"] == "query").values & trace["valid"].values
    source = np.take_along_axis(position, np.maximum(trace["source_token"].values, 0), axis=1)
    window = 2 ** np.floor(np.log2(np.maximum(position + 1, 1))).astype(int)
    seen = asked & (source > position - window)
    score = np.where(seen, 2, np.where(asked, 1, 0)) * position.shape[1] + np.arange(position.shape[1])
    return np.take_along_axis(position, score.argmax(axis=1)[:, None], axis=1)
