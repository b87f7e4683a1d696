"""What queries read while the tokens of a prompt go by, of which a run is in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Inexact, Int

from mamba_probe.analyses.recall_circuit.core import (
    Prompt,
    Questions,
    Reader,
    Run,
    gate_energy,
    mean_log_delta,
    silu,
    write_energy,
    written,
)

__all__ = ["Answer", "Reading", "Survey", "Tokens", "Write", "read_answers", "read_sums", "survey"]


@runtime_checkable
class Tokens(Protocol):
    """The tokens of one prompt in one layer, a run of them after another; `stream.Stream` reads them from a trace."""

    @property
    def size(self) -> int:
        """How many tokens there are."""
        ...

    def prompts(self) -> Iterator[tuple[slice, Prompt]]:
        """Every token: which tokens, and these."""
        ...

    def runs(self, until: int) -> Iterator[tuple[slice, Run]]:
        """What the tokens before `until` write: which tokens, and these."""
        ...


@dataclass(frozen=True)
class Survey:
    """What all tokens show before any query reads.

    Attributes:
        readers: what each query reads with.
        held: tokens where a pair may have been written, ascending.
        B: of these.
        write, gate, log_delta: `write_energy`, `gate_energy`, `mean_log_delta` of each token.
    """

    readers: list[Reader]
    held: Int[np.ndarray, " held"]
    B: Inexact[np.ndarray, "#held group state"]
    write: Float[np.ndarray, " token"]
    gate: Float[np.ndarray, " token"]
    log_delta: Float[np.ndarray, " token"]

    def B_at(self, tokens: Int[np.ndarray, " asked"]) -> Inexact[np.ndarray, "#asked group state"]:
        """B of tokens that are held; one row where it is the same at all of them (S4D)."""
        return self.B if np.iscomplexobj(self.B) else self.B[np.searchsorted(self.held, tokens)]


def survey(
    tokens: Tokens, asked: Questions, offsets: Sequence[int], out_energy: Float[np.ndarray, "head head_channel"]
) -> Survey:
    """One pass over all tokens; `offsets` and `out_energy` as in `tally`."""
    held = np.unique([asked.pairs + offset for offset in offsets])
    held, readers, B, found = held[held < tokens.size], {}, [], np.empty((3, tokens.size))
    for part, prompt in tokens.prompts():
        found[:, part] = (
            write_energy(prompt, out_energy), gate_energy(prompt, out_energy), mean_log_delta(prompt.delta)
        )  # fmt: skip
        for i in np.flatnonzero((asked.query >= part.start) & (asked.query < part.stop)).tolist():
            readers[i] = prompt.reader(int(asked.query[i]) - part.start)
        inside = held[(held >= part.start) & (held < part.stop)] - part.start
        B.append(prompt.B[inside] if not np.iscomplexobj(prompt.A) else prompt.B[: 1 - min(part.start, 1)])
    return Survey([readers[i] for i in range(len(asked.query))], held, np.concatenate(B), *found)


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
        reader: what t reads with.
    """

    query: int
    truth: int
    value: int
    scale: Float[np.ndarray, " head"]
    read: Float[np.ndarray, "value head head_channel"]
    reader: Reader

    @property
    def rows(self) -> Float[np.ndarray, "value part"]:
        """The read-out, heads and their channels in one axis."""
        return self.read.reshape(len(self.read), -1)

    @property
    def passed(self) -> Float[np.ndarray, " part"]:
        """What gate and frozen norm make of a unit of what is read."""
        return (np.asarray(silu(self.reader.z)) * self.scale[:, None]).ravel()


@dataclass(frozen=True)
class Reading:
    """What one query reads.

    Attributes:
        shares: L_{t,s}[v*] of every source s <= t: what it adds to the right value's logit.
        total: sum of `core.written` over all sources.
        writes: of the right pair at each offset, by token; none after the query.
    """

    shares: Float[np.ndarray, " source"]
    total: Float[np.ndarray, "head head_channel"]
    writes: dict[int, Write]


def read_sums(
    tokens: Tokens, queries: Int[np.ndarray, " n"], readers: Sequence[Reader]
) -> Float[np.ndarray, "n head head_channel"]:
    """Sum of `core.written` over all sources of each query, in one pass over the tokens."""
    totals = np.zeros((len(queries), *readers[0].x.shape))
    for i, _, _, given in _written(tokens, queries.tolist(), readers):
        totals[i] += given.sum(axis=0)
    return totals


def read_answers(tokens: Tokens, asked: Sequence[Answer], offsets: Sequence[int]) -> list[Reading]:
    """What each query reads, in one pass over the tokens; `offsets` as in `tally`."""
    found = [Reading(np.empty(one.query + 1), np.zeros(one.reader.x.shape), {}) for one in asked]
    for i, start, run, given in _written(tokens, [one.query for one in asked], [one.reader for one in asked]):
        one, reading = asked[i], found[i]
        flat = given.reshape(len(given), -1)
        reading.shares[start : start + len(given)] = flat @ (one.passed * one.rows[one.value])
        reading.total[:] += given.sum(axis=0)
        for token in (one.truth + offset for offset in offsets):
            if start <= token < start + len(given):
                unfaded = written(run, one.reader, np.array([token - start]), faded=False)
                reading.writes[token] = Write(token, one.passed * flat[token - start], one.passed * unfaded.ravel())
    return found


def _written(
    tokens: Tokens, queries: list[int], readers: Sequence[Reader]
) -> Iterator[tuple[int, int, Run, Float[np.ndarray, "source head head_channel"]]]:
    """`core.written` of each run of tokens to each query that comes after it: (query, first token, run, written)."""
    for part, run in tokens.runs(max(queries) + 1):
        for i, (query, reader) in enumerate(zip(queries, readers, strict=True)):
            if query >= part.start:
                yield i, part.start, run, written(run, reader, slice(min(len(run.delta), query + 1 - part.start)))
