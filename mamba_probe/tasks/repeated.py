"""Repeated random tokens: a stretch that comes again, which an induction head goes on with."""

import numpy as np

from mamba_probe.tasks.refusal import require, require_integers
from mamba_probe.tasks.task import Task, blank

__all__ = ["repeated_tokens"]


def repeated_tokens(batch: int = 8, period: int = 32, vocab: int = 50_000, repeats: int = 2, seed: int = 0) -> Task:
    r"""Draw a stretch of distinct random tokens and repeat it; from its second time on, each next token is known.

    .. math:: \text{target}_t = x_{t+1} = x_{t+1-p}, \quad p \le t < T - 1

    with period p. Nothing but the earlier copy tells the next token: what a model trained on text answers here, it
    answers by induction. Source: the repeated random sequences of Olsson et al. 2022 (arXiv 2209.11895).

    Roles: "query" from the second time on but for the last token, else "filler". `source_token` is the token after the
    last earlier occurrence of the query's.

    Arguments:
        batch: number of rows.
        period: tokens of the stretch.
        vocab: token ids are drawn from 0 .. vocab - 1, each at most once a row.
        repeats: how often the stretch stands there.
        seed: of the random generator; equal seeds give equal tasks.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> task = repeated_tokens(batch=1, period=3, vocab=9)
        >>> task.input_ids.tolist(), task.target.tolist(), task.source_token.tolist()
        ([[7, 4, 5, 7, 4, 5]], [[-1, -1, -1, 4, 5, -1]], [[-1, -1, -1, 1, 2, -1]])
    """
    given = dict(locals())
    require_integers("repeated_tokens", batch=batch, period=period, vocab=vocab, repeats=repeats, seed=seed)
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"period >= 2 (got {period})": period >= 2,
        f"vocab >= period, so that no token comes twice in a stretch (got {vocab} < {period})": vocab >= period,
        f"repeats >= 2 (got {repeats})": repeats >= 2,
    }
    require("repeated_tokens", needs)
    rng = np.random.default_rng(seed)
    length = period * repeats
    input_ids, role, target, source_token = blank(batch, length)
    input_ids[:] = np.tile([rng.choice(vocab, period, replace=False) for _ in range(batch)], repeats)
    asked = slice(period, length - 1)
    role[:, asked], target[:, asked] = "query", input_ids[:, period + 1 :]
    source_token[:, asked] = np.arange(1, length - period)
    return Task("repeated_tokens", input_ids, role, target, source_token, vocab, given, range(vocab))
