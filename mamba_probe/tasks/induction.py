"""Induction heads: what followed the same token before follows it again."""

import numpy as np
from jaxtyping import Int

from mamba_probe.tasks.draw import separate
from mamba_probe.tasks.refusal import require, require_integers
from mamba_probe.tasks.task import Task, blank

__all__ = ["induction", "induction_every_token"]


def induction(
    batch: int = 32, length: int = 128, vocab: int = 16, occurrences: int = 1, seed: int = 0, special: int = 0
) -> Task:
    r"""Draw sequences that end in a special token S, to be answered with the token after its last earlier occurrence.

    .. math:: \text{target}_{T-1} = x_{s+1}, \quad s = \max\{t < T - 1 : x_t = S\}

    Every other token is drawn from the vocabulary without S. No two occurrences are adjacent, and every set of places
    that allows is as likely. Source: the induction-heads task of Mamba (arXiv 2312.00752), there with one occurrence;
    more of them are ours.

    Roles: "key" at the earlier occurrences, "value" right after each, "query" at the last position, else "filler".

    Arguments:
        batch: number of rows.
        length: tokens in a row, T above.
        vocab: number of token ids.
        occurrences: occurrences of S before the last position.
        seed: of the random generator; equal seeds give equal tasks.
        special: the token S.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> task = induction(batch=1, length=9, vocab=5, occurrences=2)
        >>> task.input_ids.tolist(), task.target[0, -1].item(), task.source_token[0, -1].item()
        ([[4, 0, 3, 0, 2, 1, 1, 1, 0]], 2, 4)
    """
    given = dict(locals())
    require_integers(
        "induction", batch=batch, length=length, vocab=vocab, occurrences=occurrences, special=special, seed=seed
    )
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"vocab >= 3 (got {vocab})": vocab >= 3,
        f"occurrences >= 1 (got {occurrences})": occurrences >= 1,
        f"length >= 2 * occurrences + 1 (got {length} < {2 * occurrences + 1})": length >= 2 * occurrences + 1,
        f"special == 0 or special == vocab - 1, so that the answers are a range (got {special})": special
        in (0, vocab - 1),
    }
    require("induction", needs)
    rng = np.random.default_rng(seed)
    answers = range(1, vocab) if special == 0 else range(vocab - 1)
    row, (input_ids, role, target, source_token) = np.arange(batch)[:, None], blank(batch, length)
    input_ids[:] = rng.integers(answers.start, answers.stop, size=(batch, length))
    before = separate(rng, batch, length - 2, occurrences)
    input_ids[row, before] = input_ids[:, -1] = special
    role[row, before], role[row, before + 1], role[:, -1] = "key", "value", "query"
    source_token[:, -1] = before[:, -1] + 1
    target[:, -1] = input_ids[row[:, 0], source_token[:, -1]]
    return Task("induction", input_ids, role, target, source_token, vocab, given, answers)


def induction_every_token(batch: int = 32, length: int = 128, vocab: int = 16, seed: int = 0) -> Task:
    r"""Draw random sequences where every token that occurred before asks what followed it the last time.

    .. math:: \text{target}_t = x_{s+1}, \quad s = \max\{s < t : x_s = x_t\}

    Where a token follows itself, s + 1 = t: the answer is the token at hand. Source: ours.

    Roles: "query" wherever the token occurred before, else "filler"; a query is also a key and a value of later ones.

    Arguments:
        batch: number of rows.
        length: tokens in a row.
        vocab: number of token ids, each as likely at every position.
        seed: of the random generator; equal seeds give equal tasks.

    Raises:
        ValueError: if a size is too small.

    Example:
        >>> task = induction_every_token(batch=1, length=8, vocab=4)
        >>> task.input_ids.tolist()
        [[3, 2, 2, 1, 1, 0, 0, 0]]
        >>> task.target.tolist()
        [[-1, -1, 2, -1, 1, -1, 0, 0]]
    """
    given = dict(locals())
    require_integers("induction_every_token", batch=batch, length=length, vocab=vocab, seed=seed)
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"vocab >= 2 (got {vocab})": vocab >= 2,
        f"length >= 2 (got {length})": length >= 2,
    }
    require("induction_every_token", needs)
    input_ids = np.random.default_rng(seed).integers(vocab, size=(batch, length))
    before = _previous(input_ids)
    asked = before >= 0
    source_token = np.where(asked, before + 1, -1)
    target = np.where(asked, np.take_along_axis(input_ids, before + 1, axis=1), -1)
    role = np.where(asked, "query", "filler")
    return Task("induction_every_token", input_ids, role, target, source_token, vocab, given, range(vocab))


def _previous(ids: Int[np.ndarray, "batch token"]) -> Int[np.ndarray, "batch token"]:
    """Return the index of the previous occurrence of each token, -1 where there is none."""
    order = np.argsort(ids, axis=1, kind="stable")
    grouped = np.take_along_axis(ids, order, axis=1)
    before = np.full_like(order, -1)
    before[:, 1:] = np.where(grouped[:, 1:] == grouped[:, :-1], order[:, :-1], -1)
    previous = np.empty_like(order)
    np.put_along_axis(previous, order, before, axis=1)
    return previous
