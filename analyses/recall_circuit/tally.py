"""The signatures of one prompt that activations show, as numerators and denominators, so that prompts add up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Inexact, Int

from mamba_probe.analyses.recall_circuit.core import Questions, log_delta_contrast
from mamba_probe.analyses.recall_circuit.reading import Answer, Reading, Survey, Tokens, Write, read_answers

__all__ = ["ANSWERS", "ROUTES", "Tally", "match", "pair_scores", "tally"]

ANSWERS = ("S1", "S2", "S2_sum", "S3", "S4", "S5", "S6")
"""Means over queries, in the order of `tally`."""
ROUTES = ("S7", "S8", "S9")
"""Of a prompt's tokens, in the order of `tally`, after `ANSWERS`."""
QUERY_BYTES = 2**26
"""Most bytes of what queries read, a number a source, that is held at once; one query may take more."""


@dataclass(frozen=True)
class Tally:
    """What one prompt shows, at every offset.

    Attributes:
        totals: kind: measured, closed-form null; signature: `ANSWERS`, then `ROUTES`; part: numerator, denominator.
        carried: sum over queries of |L_{t,s*}[v*]| that runs through each head.
        matched: sum over queries of |C_t[n] B_s*[n]| by group and state; 0 where both are constant.
        last: sum of `core.written` over all sources of the last query.
    """

    totals: Float[np.ndarray, "offset kind=2 signature=10 part=2"]
    carried: Float[np.ndarray, "offset head"]
    matched: Float[np.ndarray, "offset group state"]
    last: Float[np.ndarray, "head head_channel"]


def pair_scores(
    answers: Float[np.ndarray, " source"], logits: Float[np.ndarray, " value"], asked: Answer,
    candidates: Int[np.ndarray, " candidate"], written: int,
) -> tuple[float, float]:  # fmt: skip
    """S1 and S3 of one query: is the right write the one that speaks for the answer, and does it say the answer?

    S1 = 1[argmax_w L_{t,w}[v*] = s*], S3 = 1[argmax_v L_{t,s*}[v] = v*], L_{t,s} = R . o_{t,s}. A tie counts as wrong.

    Args:
        answers: L_{t,s}[v*] of all sources.
        logits: L_{t,s*} over the values.
        asked: the query.
        candidates: tokens where a pair may have been written, all <= t.
        written: s*, the token where the right pair was written.
    """
    index = int(np.flatnonzero(candidates == written)[0])
    return _strict_argmax(answers[candidates], index), _strict_argmax(logits, asked.value)


def _strict_argmax(scores: Float[np.ndarray, " n"], index: int) -> float:
    """1.0 when `index` alone holds the maximum."""
    return float(scores[index] > np.delete(scores, index).max())


def _retained(asked: Answer, write: Write) -> list[float]:
    """S4 of one query, as numerator and denominator: |L_{t,s*}|, and the same with all decay left out.

    Norms over the values. Complex modes may turn against one another: then it is above 1.
    """
    return [float(np.linalg.norm(asked.rows @ given)) for given in (write.given, write.unfaded)]


def match(
    C: Inexact[np.ndarray, "group state"], B: Inexact[np.ndarray, "candidate group state"], truth: int | None
) -> tuple[float, float, float]:
    """S5, S6 and the null of S5 of one query: does the query's key find the pair's key in state space?

    S5 = (C_t.B_{s*} - max_{w != s*} C_t.B_w) / (|C_t| max_w |B_w|), S6 = 1[argmax_w C_t.B_w = s*]. The null of
    S5 is its mean over all permutations of the candidates. `truth` None (written after the query): a match of 0.

    Args:
        C: of the query; groups count as further states.
        B: of the candidates, at least two.
        truth: index of s* among the candidates.

    Returns:
        NaN where C and B are complex (S4D): they are the same at every token, and match nothing.

    >>> match(np.array([[1.0, 0.0]]), np.eye(2)[:, None], 0)
    (1.0, 1.0, 0.0)
    """
    if np.iscomplexobj(C):
        return float("nan"), float("nan"), float("nan")
    products = np.einsum("gn,wgn->w", C, B)
    scale = np.linalg.norm(C) * np.sqrt((B**2).sum(axis=(1, 2)).max())
    if scale == 0:
        return 0.0, 0.0, 0.0
    second, first = np.sort(products)[-2:]
    margins = products - np.where(np.arange(len(products)) == products.argmax(), second, first)
    margin = -first if truth is None else margins[truth]
    return float(margin / scale), float(margin > 0), float(margins.mean() / scale)


def tally(
    tokens: Tokens, seen: Survey, read: Float[np.ndarray, "value head head_channel"], asked: Questions,
    offsets: Sequence[int], scale: Float[np.ndarray, "n head"],
) -> Tally:  # fmt: skip
    """All activation signatures of one prompt at every offset, and which heads and states carry the answer.

    Args:
        tokens: of one prompt of one layer.
        seen: from `survey` of the same.
        read: from `readout`.
        asked: the queries to score.
        offsets: tokens between a value and the write of its pair; a write after the query contributes nothing.
        scale: of a gated norm before `out_proj` at each query; ones without.
    """
    totals, carried = np.zeros((len(offsets), 2, len(ANSWERS), 2)), np.zeros((len(offsets), read.shape[1]))
    selective = not np.iscomplexobj(seen.B)
    matched, last = np.zeros((len(offsets), *seen.readers[0].C.shape)), int(asked.query.argmax())
    total = np.zeros(read.shape[1:])
    for i, one, reading in _readings(tokens, seen, read, asked, offsets, scale):
        near, total = _near(asked.pairs, one, max(offsets)), reading.total if i == last else total
        for j, offset in enumerate(offsets):
            write = reading.writes.get(one.truth + offset)
            totals[j] += _ask(seen, one, reading.shares, asked.pairs + offset, write, near)
            if write:
                carried[j] += _carried(one, write, len(scale[i]))
            if write and selective:
                matched[j] += np.abs(one.reader.C * seen.B_at(np.array([write.token]))[0])
    routes = np.array([_routes(seen, asked, offset) for offset in offsets])
    return Tally(np.concatenate([totals, routes], axis=2), carried, matched, total)


def _readings(
    tokens: Tokens, seen: Survey, read: Float[np.ndarray, "value head head_channel"], asked: Questions,
    offsets: Sequence[int], scale: Float[np.ndarray, "n head"],
) -> Iterator[tuple[int, Answer, Reading]]:  # fmt: skip
    """Each query and what it reads, as many queries a pass over the tokens as `QUERY_BYTES` hold."""
    parts = read[0].size * (2 * len(offsets) + 2)
    most = max(1, QUERY_BYTES // (8 * (tokens.size + parts)))
    for start in range(0, len(asked.query), most):
        chosen = range(start, min(start + most, len(asked.query)))
        answers = [
            Answer(int(asked.query[i]), int(asked.truth[i]), int(asked.value[i]), scale[i], read, seen.readers[i])
            for i in chosen
        ]
        yield from zip(chosen, answers, read_answers(tokens, answers, offsets), strict=True)


def _near(pairs: Int[np.ndarray, " pair"], asked: Answer, furthest: int) -> Int[np.ndarray, " near"]:
    """The answer's token and those after it up to the largest offset that come before the next value and the query."""
    later = pairs[pairs > asked.truth]
    end = min([asked.truth + furthest, asked.query, *(later[:1] - 1).tolist()])
    return np.arange(asked.truth, end + 1)


def _ask(
    seen: Survey, asked: Answer, answers: Float[np.ndarray, " source"], pairs: Int[np.ndarray, " pair"],
    write: Write | None, near: Int[np.ndarray, " near"],
) -> Float[np.ndarray, "kind=2 signature=7 part=2"]:  # fmt: skip
    """`ANSWERS` of one query, and their nulls; `write` None: the pair would be written after the query."""
    candidates = pairs[pairs <= asked.query]
    share, chance, n = np.abs(answers), 1 / len(candidates), len(answers)
    total = share.sum()
    index = int(np.searchsorted(candidates, write.token)) if write else None
    margin, found, margin_null = match(asked.reader.C, seen.B_at(candidates), index)
    pair, said, kept, alone = 0.0, 0.0, [0.0, 0.0], 0.0
    if write:
        pair, said = pair_scores(answers, asked.rows @ write.given, asked, candidates, write.token)
        kept, alone = _retained(asked, write), share[write.token]
    first, summed = (alone / total, share[near].sum() / total) if total else (0.0, 0.0)
    measured = [[pair, 1], [first, 1], [summed, 1], [said, 1], kept, [margin, 1], [found, 1]]
    null = [chance, 1 / n, len(near) / n, 1 / len(asked.read), 0.0, margin_null, chance]
    return np.array([measured, [[value, 1.0] for value in null]])


def _carried(asked: Answer, write: Write, n_heads: int) -> Float[np.ndarray, " head"]:
    """|L_{t,s*}[v*]| by head."""
    return np.abs(write.given * asked.rows[asked.value]).reshape(n_heads, -1).sum(axis=1)


def _routes(seen: Survey, asked: Questions, offset: int) -> Float[np.ndarray, "kind=2 signature=3 part=2"]:
    """`ROUTES` of one prompt, and their nulls."""
    writes: Bool[np.ndarray, " token"] = np.zeros(len(seen.write), dtype=bool)
    writes[(asked.pairs + offset)[asked.pairs + offset < len(writes)]] = True
    written, gate, n = seen.write, seen.gate, float(len(writes))
    contrast = float("nan") if np.iscomplexobj(seen.B) else log_delta_contrast(seen.log_delta, writes)
    measured = [[written[writes].sum(), written.sum()], [contrast, 1.0], [gate[asked.keys].sum(), gate.sum()]]
    return np.array([measured, [[writes.sum(), n], [0.0, 1.0], [asked.keys.sum(), n]]])
