"""Multi-query associative recall: a list of key-value pairs, then questions about each key."""

import numpy as np
from jaxtyping import Int

from mamba_probe.tasks.draw import distinct
from mamba_probe.tasks.refusal import require, require_integers
from mamba_probe.tasks.task import Task, blank

__all__ = ["mqar"]

FILLERS = ("zero", "random")


def mqar(
    batch: int = 32,
    length: int = 128,
    n_pairs: int = 8,
    vocab: int = 256,
    seed: int = 0,
    power_a: float = 0.01,
    filler: str = "zero",
    n_keys: int | None = None,
) -> Task:
    r"""Draw sequences of multi-query associative recall.

    A row is `k_1 v_1 ... k_n v_n` and then filler, among which each key is asked once, at an even distance `2 g_i`
    from the end of the pairs; the target there is the key's value, the last one where the key is repeated. Keys are
    tokens of `1 .. vocab/2 - 1`, values distinct tokens of `vocab/2 .. vocab - 1`, and the gaps are drawn without
    replacement with

    .. math:: p(g) \propto a (g + 1)^{a - 1}, \quad g = 0 .. (\text{length} - 2n)/2 - 1

    Source: the distribution of `multiquery_ar` in Zoology, https://github.com/HazyResearch/zoology (arXiv 2312.04927);
    repeated keys are ours.

    Arguments:
        batch: number of rows.
        length: tokens in a row, even.
        n_pairs: pairs in a row, n above.
        vocab: number of token ids, even.
        seed: of the random generator; equal seeds give equal tasks.
        power_a: exponent a of the gaps; near 0, queries crowd behind the pairs.
        filler: "zero": every other token is token 0; "random": it is any token of the vocabulary, keys and values
            among them (Zoology's `random_non_queries`).
        n_keys: distinct keys in a row; each is in one pair at least, at random places. None: as many as pairs.

    Raises:
        ValueError: if the sizes do not fit each other, or `filler` is another one.

    Example:
        >>> task = mqar(batch=1, length=12, n_pairs=2, vocab=12)
        >>> task.input_ids.tolist()
        [[4, 7, 3, 8, 4, 0, 0, 0, 3, 0, 0, 0]]
        >>> task.target.tolist()
        [[-1, -1, -1, -1, 7, -1, -1, -1, 8, -1, -1, -1]]
        >>> task.source_token[0, [4, 8]].tolist()
        [1, 3]
        >>> repeated = mqar(batch=1, length=12, n_pairs=4, vocab=12, n_keys=1)
        >>> repeated.input_ids[0, :9].tolist(), repeated.target[0, 8].item()
        ([4, 7, 4, 8, 4, 6, 4, 9, 4], 9)
    """
    given = {key: value for key, value in locals().items() if key != "n_keys"}
    n_keys = n_pairs if n_keys is None else n_keys
    _check(batch, length, n_pairs, vocab, power_a, filler, n_keys, seed)
    rng = np.random.default_rng(seed)
    context, half = 2 * n_pairs, vocab // 2
    space = (length - context) // 2
    keys = 1 + distinct(rng, batch, np.ones(half - 1), n_keys)
    values = half + distinct(rng, batch, np.ones(half), n_pairs)
    gaps = distinct(rng, batch, power_a * np.arange(1.0, space + 1) ** (power_a - 1), n_keys)
    which, row = _which(rng, batch, n_pairs, n_keys), np.arange(batch)[:, None]
    last = np.zeros_like(keys)  # last pair of each key
    np.maximum.at(last, (row, which), np.arange(n_pairs))

    input_ids, role, target, source_token = blank(batch, length)
    input_ids[:, 0:context:2], input_ids[:, 1:context:2] = keys[row, which], values
    role[:, 0:context:2], role[:, 1:context:2] = "key", "value"
    query = context + 2 * gaps
    input_ids[row, query], role[row, query] = keys, "query"
    target[row, query], source_token[row, query] = values[row, last], 2 * last + 1
    if filler == "random":
        input_ids = np.where(role == "filler", rng.integers(vocab, size=(batch, length)), input_ids)
    return Task("mqar", input_ids, role, target, source_token, vocab, given | {"n_keys": n_keys}, range(half, vocab))


def _which(rng: np.random.Generator, batch: int, n_pairs: int, n_keys: int) -> Int[np.ndarray, "batch pair"]:
    """Draw which key each pair has: every key in one pair at least, in order where none is repeated."""
    once = np.broadcast_to(np.arange(n_keys), (batch, n_keys))
    if n_keys == n_pairs:
        return once
    again = rng.integers(n_keys, size=(batch, n_pairs - n_keys))
    return rng.permuted(np.concatenate([once, again], axis=1), axis=1)


def _check(
    batch: int, length: int, n_pairs: int, vocab: int, power_a: float, filler: str, n_keys: int, seed: int
) -> None:
    require_integers("mqar", batch=batch, length=length, n_pairs=n_pairs, vocab=vocab, n_keys=n_keys, seed=seed)
    if not isinstance(power_a, int | float | np.number):
        raise ValueError(f"mqar: power_a is a number; got {power_a!r}")
    if not isinstance(filler, str) or filler not in FILLERS:
        raise ValueError(f"mqar: filler={filler!r} is unknown; known: {', '.join(FILLERS)}")
    tokens = 2 * (n_pairs + n_keys)
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"n_pairs >= 1 (got {n_pairs})": n_pairs >= 1,
        f"1 <= n_keys <= n_pairs (got {n_keys}, {n_pairs})": n_pairs < 1 or 1 <= n_keys <= n_pairs,
        f"length even (got {length})": length % 2 == 0,
        f"length >= 2 * (n_pairs + n_keys) (got {length} < {tokens})": length >= tokens,
        f"vocab even (got {vocab})": vocab % 2 == 0,
        f"vocab // 2 - 1 >= n_keys, which is n_pairs unless given (got {vocab // 2 - 1} < {n_keys})": (
            vocab // 2 - 1 >= n_keys
        ),
        f"vocab // 2 >= n_pairs (got {vocab // 2} < {n_pairs})": vocab // 2 >= n_pairs,
        f"power_a > 0 and finite (got {power_a})": 0 < power_a < np.inf,
    }
    require("mqar", needs)
