"""Selective copying: tokens scattered among noise, asked for in order at the end."""

import numpy as np

from mamba_probe.tasks.draw import distinct
from mamba_probe.tasks.refusal import require, require_integers
from mamba_probe.tasks.task import Task, blank

__all__ = ["selective_copying"]


def selective_copying(batch: int = 32, length: int = 128, n_tokens: int = 8, vocab: int = 16, seed: int = 0) -> Task:
    r"""Draw sequences of data tokens at random places among noise, which n markers at the end ask for in order.

    .. math:: \text{target}_{T-n+i} = x_{p_i}, \quad p_0 < .. < p_{n-1} < T - n, \quad i = 0 .. n - 1

    Noise is token 0, the marker token vocab - 1; data are drawn from `1 .. vocab - 2` and may repeat, and every set
    of places is as likely. Source: the selective-copying task of Mamba (arXiv 2312.00752).

    Roles: "kept" at the data, "query" at the markers, else "filler".

    Arguments:
        batch: number of rows.
        length: tokens in a row, the markers among them, T above.
        n_tokens: tokens to copy, n above.
        vocab: number of token ids.
        seed: of the random generator; equal seeds give equal tasks.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> task = selective_copying(batch=1, length=9, n_tokens=3, vocab=8)
        >>> task.input_ids.tolist()
        [[0, 0, 4, 4, 6, 0, 7, 7, 7]]
        >>> task.target[0, -3:].tolist(), task.source_token[0, -3:].tolist()
        ([4, 4, 6], [2, 3, 4])
    """
    given = dict(locals())
    require_integers("selective_copying", batch=batch, length=length, n_tokens=n_tokens, vocab=vocab, seed=seed)
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"n_tokens >= 1 (got {n_tokens})": n_tokens >= 1,
        f"length >= 2 * n_tokens (got {length} < {2 * n_tokens})": length >= 2 * n_tokens,
        f"vocab >= 4, noise, marker and two data tokens (got {vocab})": vocab >= 4,
    }
    require("selective_copying", needs)
    rng = np.random.default_rng(seed)
    asked, row = slice(length - n_tokens, length), np.arange(batch)[:, None]
    place = np.sort(distinct(rng, batch, np.ones(length - n_tokens), n_tokens), axis=1)
    data = rng.integers(1, vocab - 1, size=(batch, n_tokens))
    input_ids, role, target, source_token = blank(batch, length)
    input_ids[row, place], role[row, place] = data, "kept"
    input_ids[:, asked], role[:, asked] = vocab - 1, "query"
    target[:, asked], source_token[:, asked] = data, place
    return Task("selective_copying", input_ids, role, target, source_token, vocab, given, range(1, vocab - 1))
