"""The signatures of one prompt that activations show, as numerators and denominators, so that prompts add up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Inexact, Int

from mamba_probe.analyses.recall_circuit.core import (
    Prompt,
    Questions,
    contribution,
    gate_energy,
    log_delta_contrast,
    write_energy,
)

__all__ = ["ANSWERS", "ROUTES", "Answer", "Tally", "answer_shares", "match", "pair_scores", "tally"]

ANSWERS = ("S1", "S2", "S2_sum", "S3", "S4", "S5", "S6")
"""Means over queries, in the order of `tally`."""
ROUTES = ("S7", "S8", "S9")
"""Of a prompt's tokens, in the order of `tally`, after `ANSWERS`."""
CHUNK = 4096
"""Sources whose contributions are in memory at a time."""


@dataclass(frozen=True)
class Tally:
    """What one prompt shows, at every offset.

    Attributes:
        totals: kind: measured, closed-form null; signature: `ANSWERS`, then `ROUTES`; part: numerator, denominator.
        carried: sum over queries of |L_{t,s*}[v*]| that runs through each head.
        matched: sum over queries of |C_t[n] B_s*[n]| by group and state; 0 where both are constant.
    """

    totals: Float[np.ndarray, "offset kind=2 signature=10 part=2"]
    carried: Float[np.ndarray, "offset head"]
    matched: Float[np.ndarray, "offset group state"]


@dataclass(frozen=True)
class Write:
    """The write of the right pair, and what it gives at the query: as executed, and with all decay left out."""

    token: int
    given: Float[np.ndarray, " part"]
    unfaded: Float[np.ndarray, " part"]


@dataclass(frozen=True)
class Answer:
    """One query: the token t that asks, s* where the right pair's value is, and v*, the right value.

    Attributes:
        query: t.
        truth: s*.
        value: index of v* in the read-out.
        scale: of a gated norm before `out_proj` at t, frozen; ones without.
        read: the read-out of `core.readout`.
    """

    query: int
    truth: int
    value: int
    scale: Float[np.ndarray, " head"]
    read: Float[np.ndarray, "value head head_channel"]

    def given(
        self, prompt: Prompt, sources: Int[np.ndarray, " source"], faded: bool = True
    ) -> Float[np.ndarray, "source part"]:
        """What each source gives, behind the frozen norm; heads and their channels in one axis."""
        return (contribution(prompt, self.query, sources, faded) * self.scale[:, None]).reshape(len(sources), -1)

    @property
    def rows(self) -> Float[np.ndarray, "value part"]:
        """The read-out, heads and their channels in one axis."""
        return self.read.reshape(len(self.read), -1)


def answer_shares(prompt: Prompt, asked: Answer) -> Float[np.ndarray, " source"]:
    """L_{t,s}[v*] of every source s <= t: what it adds to the right value's logit. `CHUNK` sources at a time."""
    return _read(prompt, asked, [])[0]


def _read(
    prompt: Prompt, asked: Answer, tokens: Sequence[int]
) -> tuple[Float[np.ndarray, " source"], dict[int, Float[np.ndarray, " part"]]]:
    """`answer_shares`, and what those of `tokens` that are sources give, by token."""
    every, row, shares, kept = np.arange(asked.query + 1), asked.rows[asked.value], [], {}
    for start in range(0, len(every), CHUNK):
        given = asked.given(prompt, every[start : start + CHUNK])
        shares.append(given @ row)
        kept |= {token: given[token - start].copy() for token in tokens if start <= token < start + len(given)}
    return np.concatenate(shares), kept


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
    prompt: Prompt, read: Float[np.ndarray, "value head head_channel"],
    out_energy: Float[np.ndarray, "head head_channel"], asked: Questions, offsets: Sequence[int],
    scale: Float[np.ndarray, "n head"],
) -> Tally:  # fmt: skip
    """All activation signatures of one prompt at every offset, and which heads and states carry the answer.

    Args:
        prompt: one prompt of one layer.
        read: from `readout`.
        out_energy: squared norm of each column of `out_proj`.
        asked: the queries to score.
        offsets: tokens between a value and the write of its pair; a write after the query contributes nothing.
        scale: of a gated norm before `out_proj` at each query; ones without.
    """
    totals, carried = np.zeros((len(offsets), 2, len(ANSWERS), 2)), np.zeros((len(offsets), len(prompt.A)))
    matched, selective = np.zeros((len(offsets), *prompt.B.shape[1:])), not np.iscomplexobj(prompt.A)
    for query, truth, value, frozen in zip(asked.query, asked.truth, asked.value, scale, strict=True):
        one = Answer(int(query), int(truth), int(value), frozen, read)
        answers, given = _read(prompt, one, [one.truth + offset for offset in offsets])
        near = _near(asked.pairs, one, max(offsets))
        for i, offset in enumerate(offsets):
            token = one.truth + offset
            write = Write(token, given[token], _unfaded(prompt, one, token)) if token in given else None
            totals[i] += _ask(prompt, one, answers, asked.pairs + offset, write, near)
            if write:
                carried[i] += _carried(one, write, len(prompt.A))
                matched[i] += np.abs(prompt.C[one.query] * prompt.B[write.token]) * selective
    routes = np.array([_routes(prompt, out_energy, asked, offset) for offset in offsets])
    return Tally(np.concatenate([totals, routes], axis=2), carried, matched)


def _near(pairs: Int[np.ndarray, " pair"], asked: Answer, furthest: int) -> Int[np.ndarray, " near"]:
    """The answer's token and those after it up to the largest offset that come before the next value and the query."""
    later = pairs[pairs > asked.truth]
    end = min([asked.truth + furthest, asked.query, *(later[:1] - 1).tolist()])
    return np.arange(asked.truth, end + 1)


def _unfaded(prompt: Prompt, asked: Answer, token: int) -> Float[np.ndarray, " part"]:
    return asked.given(prompt, np.array([token]), faded=False)[0]


def _ask(
    prompt: Prompt, asked: Answer, answers: Float[np.ndarray, " source"], pairs: Int[np.ndarray, " pair"],
    write: Write | None, near: Int[np.ndarray, " near"],
) -> Float[np.ndarray, "kind=2 signature=7 part=2"]:  # fmt: skip
    """`ANSWERS` of one query, and their nulls; `write` None: the pair would be written after the query."""
    candidates = pairs[pairs <= asked.query]
    share, chance, n = np.abs(answers), 1 / len(candidates), len(answers)
    total = share.sum()
    index = int(np.searchsorted(candidates, write.token)) if write else None
    margin, found, margin_null = match(prompt.C[asked.query], prompt.B[candidates], index)
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


def _routes(
    prompt: Prompt, out_energy: Float[np.ndarray, "head head_channel"], asked: Questions, offset: int
) -> Float[np.ndarray, "kind=2 signature=3 part=2"]:
    """`ROUTES` of one prompt, and their nulls."""
    writes: Bool[np.ndarray, " token"] = np.zeros(len(prompt.delta), dtype=bool)
    writes[(asked.pairs + offset)[asked.pairs + offset < len(writes)]] = True
    written, gate, n = write_energy(prompt, out_energy), gate_energy(prompt, out_energy), float(len(writes))
    constant = np.iscomplexobj(prompt.A)
    contrast = float("nan") if constant else log_delta_contrast(prompt.delta, writes)
    measured = [[written[writes].sum(), written.sum()], [contrast, 1.0], [gate[asked.keys].sum(), gate.sum()]]
    return np.array([measured, [[writes.sum(), n], [0.0, 1.0], [asked.keys.sum(), n]]])
