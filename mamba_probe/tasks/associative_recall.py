"""Multi-query associative recall: a list of key-value pairs, then questions about each key."""

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.tasks.task import Task

__all__ = ["mqar"]

FILLER = 0


def mqar(
    batch: int = 32,
    length: int = 128,
    n_pairs: int = 8,
    vocab: int = 256,
    seed: int = 0,
    power_a: float = 0.01,
    filler: str = "zero",
) -> Task:
    r"""Draw sequences of multi-query associative recall.

    A row is `k_1 v_1 ... k_n v_n` and then filler (token 0), among which each key is asked once, at an even distance
    `2 g_i` from the end of the pairs; the target there is the key's value. Keys are distinct tokens of
    `1 .. vocab/2 - 1`, values distinct tokens of `vocab/2 .. vocab - 1`, and the gaps are drawn without replacement
    with

    .. math:: p(g) \propto a (g + 1)^{a - 1}, \quad g = 0 .. (\text{length} - 2n)/2 - 1

    Source: the distribution of `multiquery_ar` in Zoology, https://github.com/HazyResearch/zoology (arXiv 2312.04927).

    Arguments:
        batch: number of rows.
        length: tokens in a row, even.
        n_pairs: pairs in a row, n above.
        vocab: number of token ids, even.
        seed: of the random generator; equal seeds give equal tasks.
        power_a: exponent a of the gaps; near 0, queries crowd behind the pairs.
        filler: "zero": every other token is token 0.

    Raises:
        ValueError: if the sizes do not fit each other, or `filler` is not "zero".

    Example:
        >>> task = mqar(batch=1, length=12, n_pairs=2, vocab=12)
        >>> task.input_ids.tolist()
        [[4, 7, 3, 8, 4, 0, 0, 0, 3, 0, 0, 0]]
        >>> task.target.tolist()
        [[-1, -1, -1, -1, 7, -1, -1, -1, 8, -1, -1, -1]]
        >>> task.source_token[0, [4, 8]].tolist()
        [1, 3]
    """
    _check(batch, length, n_pairs, vocab, power_a, filler)
    rng = np.random.default_rng(seed)
    context, half = 2 * n_pairs, vocab // 2
    space = (length - context) // 2
    keys = 1 + _distinct(rng, batch, np.ones(half - 1), n_pairs)
    values = half + _distinct(rng, batch, np.ones(half), n_pairs)
    gaps = _distinct(rng, batch, power_a * np.arange(1.0, space + 1) ** (power_a - 1), n_pairs)

    input_ids = np.full((batch, length), FILLER, dtype=np.int64)
    role = np.full((batch, length), "filler", dtype="<U6")
    target, source_token = np.full((2, batch, length), -1, dtype=np.int64)
    input_ids[:, 0:context:2], input_ids[:, 1:context:2] = keys, values
    role[:, 0:context:2], role[:, 1:context:2] = "key", "value"
    row, query = np.arange(batch)[:, None], context + 2 * gaps
    input_ids[row, query], role[row, query] = keys, "query"
    target[row, query], source_token[row, query] = values, np.arange(1, context, 2)
    params = {
        "batch": batch,
        "length": length,
        "n_pairs": n_pairs,
        "vocab": vocab,
        "seed": seed,
        "power_a": power_a,
        "filler": filler,
    }
    return Task("mqar", input_ids, role, target, source_token, vocab, params, answers=range(vocab // 2, vocab))


def _distinct(
    rng: np.random.Generator, batch: int, weight: Float[np.ndarray, " choice"], size: int
) -> Int[np.ndarray, "batch size"]:
    """Draw `size` of the choices a row, in order and without replacement, by a race of exponential clocks."""
    return np.argsort(rng.standard_exponential((batch, weight.size)) / weight, axis=1)[:, :size]


def _check(batch: int, length: int, n_pairs: int, vocab: int, power_a: float, filler: str) -> None:
    sizes = {"batch": batch, "length": length, "n_pairs": n_pairs, "vocab": vocab}
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not isinstance(value, int | np.integer)]
    if wrong:
        raise ValueError(f"mqar: sizes are integers; got {', '.join(wrong)}")
    if filler != "zero":
        hint = '"random" is not supported yet; ' if filler == "random" else ""
        raise ValueError(f'mqar: filler={filler!r}: {hint}use filler="zero"')
    needs = {
        f"batch >= 1 (got {batch})": batch >= 1,
        f"n_pairs >= 1 (got {n_pairs})": n_pairs >= 1,
        f"length even (got {length})": length % 2 == 0,
        f"length >= 4 * n_pairs (got {length} < {4 * n_pairs})": length >= 4 * n_pairs,
        f"vocab even (got {vocab})": vocab % 2 == 0,
        f"vocab // 2 - 1 >= n_pairs (got {vocab // 2 - 1} < {n_pairs})": vocab // 2 - 1 >= n_pairs,
        f"power_a > 0 and finite (got {power_a})": 0 < power_a < np.inf,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"mqar: needs {'; '.join(failed)}")
