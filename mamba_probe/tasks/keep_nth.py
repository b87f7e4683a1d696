"""Keep the n-th token: one token, somewhere before, is to be returned at the end."""

import numpy as np

from mamba_probe.tasks.refusal import require, require_integers
from mamba_probe.tasks.task import Task, blank

__all__ = ["keep_nth"]


def keep_nth(
    batch: int = 32,
    length: int = 128,
    n: int | None = 64,
    n_tokens: int = 16,
    seed: int = 0,
    marker: bool = False,
) -> Task:
    r"""Draw sequences whose token at index n is the answer at the last position.

    .. math:: \text{target}_{T-1} = x_n, \qquad x_t \sim U\{0, .., \text{n\_tokens} - 1\}

    Nothing in the tokens says where n is; with `marker` token n_tokens, seen nowhere else, stands right before it.
    Source: the task of arXiv 2506.11891's claim on keeping the n-th token; the marker is ours.

    Roles: "kept" at n ("query" if n is the last position), "marker", "query" at the last position, else "filler".

    Arguments:
        batch: number of rows.
        length: tokens in a row, T above.
        n: index of the token to keep, equal in all rows; None (with `marker`): drawn a row from `1 .. length - 2`.
        n_tokens: number of different tokens, `0 .. n_tokens - 1`.
        seed: of the random generator; equal seeds give equal tasks.
        marker: put token n_tokens at n - 1; the vocabulary is then `n_tokens + 1`.

    Raises:
        ValueError: if the sizes do not fit each other, or n is None without a marker.

    Example:
        >>> task = keep_nth(batch=1, length=6, n=2, n_tokens=5)
        >>> task.input_ids.tolist(), task.target[0, -1].item(), task.source_token[0, -1].item()
        ([[4, 3, 2, 1, 1, 0]], 2, 2)
        >>> keep_nth(batch=1, length=6, n=2, n_tokens=5, marker=True).input_ids.tolist()
        [[4, 5, 2, 1, 1, 0]]
    """
    given = dict(locals())
    _check(batch, length, n, n_tokens, seed, marker)
    rng = np.random.default_rng(seed)
    row = np.arange(batch)
    input_ids, role, target, source_token = blank(batch, length)
    input_ids[:] = rng.integers(n_tokens, size=(batch, length))
    kept = rng.integers(1, length - 1, size=batch) if n is None else np.full(batch, n)
    role[row, kept] = "kept"
    if marker:
        input_ids[row, kept - 1], role[row, kept - 1] = n_tokens, "marker"
    role[:, -1], target[:, -1], source_token[:, -1] = "query", input_ids[row, kept], kept
    return Task("keep_nth", input_ids, role, target, source_token, n_tokens + marker, given, range(n_tokens))


def _check(batch: int, length: int, n: int | None, n_tokens: int, seed: int, marker: bool) -> None:
    require_integers("keep_nth", batch=batch, length=length, n_tokens=n_tokens, seed=seed, n=0 if n is None else n)
    if not isinstance(marker, bool):
        raise ValueError(f"keep_nth: marker is True or False; got {marker!r}")
    if n is None and not marker:
        raise ValueError("keep_nth: n=None draws n a row, which nothing in the tokens says; give n, or marker=True")
    least = 1 if marker else 0
    place = {f"length >= 3 (got {length})": length >= 3}
    if n is not None:
        place = {f"{least} <= n <= length - 1 (got n={n}, length={length})": least <= n < length}
    needs = {f"batch >= 1 (got {batch})": batch >= 1, f"n_tokens >= 2 (got {n_tokens})": n_tokens >= 2}
    require("keep_nth", needs | place)
