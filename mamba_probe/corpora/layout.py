"""A corpus: documents as rows of token ids, packed or padded, read once and then at hand in any order."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from mamba_probe.corpora.reading import Document, check_known, documents, n_unknown, named, token_ids
from mamba_probe.corpora.spool import Spool
from mamba_probe.progress import bar
from mamba_probe.trace.contract import unknown_name

__all__ = ["Batch", "Corpus", "corpus"]

LAYOUTS = ("packed", "padded")
LONG = ("error", "split", "truncate")
EMPTY = ("error", "skip")
BLOCK = 2**13
"""Tokens read at once where all rows are gone through."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a corpus.

    Attributes:
        first: number of the first row.
        ids: token ids, 0 at padding.
        mask: 1 at tokens, 0 at padding.
        document: number of the document that each token is of, counted from 0 in the order they were read; -1 at
            separators and padding.
        document_position: index of each token in its document; -1 at separators and padding.
        token_text: what the tokenizer writes for each token, "" at padding; made when it is asked for.
    """

    first: int
    ids: Int[np.ndarray, "batch token"]
    mask: Int[np.ndarray, "batch token"]
    document: Int[np.ndarray, "batch token"]
    document_position: Int[np.ndarray, "batch token"]
    _tokenizer: Any = field(default=None, repr=False)

    @cached_property
    def token_text(self) -> Shaped[np.ndarray, "batch token"]:
        """See `Batch`.

        Raises:
            ValueError: the corpus has no tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError("token_text needs the tokenizer: mp.corpus(..., tokenizer=mp.load_tokenizer(...))")
        text = np.full(self.ids.shape, "", dtype=object)
        at = self.mask == 1
        text[at] = self._tokenizer.convert_ids_to_tokens(self.ids[at].tolist())
        return text

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """Everything over (batch, token) that a trace is labelled with."""
        found = {"document": self.document, "document_position": self.document_position}
        return found if self._tokenizer is None else found | {"token_text": self.token_text}


@dataclass(frozen=True)
class _Layout:
    """How documents become rows, checked."""

    name: str
    length: int | None
    separator: int | None
    long: str
    empty: str


@dataclass
class _Counts:
    documents: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    split_documents: int = 0
    skipped_documents: int = 0
    tokenised: int = 0
    unknown: int = 0
    largest: int = 0
    longest: int = 0


class Corpus:
    """Rows of token ids (see `corpus`), the same whenever they are read.

    The ids lie in nameless temporary files (in TMPDIR), four bytes a token and 32 a document: memory does not grow with
    the corpus. `len` is the number of rows; a slice is a `Batch`, and `batches` yields them in order.

    Attributes:
        length: tokens of every row, padding included.
        n_documents: documents that have tokens in a row, before the tail is left out.
        tail_tokens: of a packed corpus: tokens at its end that fill no row, and are in none.
        truncated_tokens, truncated_documents, split_documents, skipped_documents: what was done to documents.
        largest_id: largest token id.
    """

    def __init__(self, given: Iterable[Document], tokenizer: Any, layout: _Layout, source: str, progress: bool):
        self.source, self.tokenizer, self.layout = source, tokenizer, layout.name
        self.separator = layout.separator
        flat, rows = Spool(np.int32), tuple(Spool(np.int64) for _ in range(4))
        with bar(f"reading {source}", None, progress) as step:
            counts = _spooled(given, tokenizer, layout, flat, rows, step)
        check_known(counts.unknown, counts.tokenised, source)
        self._flat = flat.read()
        self._start, self._size, self._document, self._offset = (spool.read() for spool in rows)
        self.n_documents, self.largest_id = counts.documents, counts.largest
        self.truncated_documents, self.truncated_tokens = counts.truncated_documents, counts.truncated_tokens
        self.split_documents, self.skipped_documents = counts.split_documents, counts.skipped_documents
        packed = layout.name == "packed"
        self.length = layout.length if packed and layout.length else counts.longest
        self._n_rows = flat.size // self.length if packed else len(self._start)
        self.tail_tokens = flat.size - self._n_rows * self.length if packed else 0
        if not self._n_rows:
            raise ValueError(
                f"{flat.size} token(s) of {source} do not fill one row of {self.length}: take a smaller length, or"
                ' layout="padded"'
            )

    def __len__(self) -> int:
        return self._n_rows

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(1)

    def __getitem__(self, rows: int | slice) -> Batch:
        """Some rows; an index is one of them, as a batch of one.

        Raises:
            ValueError: a slice with a step, or of no rows.
            IndexError: no such row.
        """
        if not isinstance(rows, slice):
            if not -self._n_rows <= rows < self._n_rows:
                raise IndexError(f"row {rows} of a corpus of {self._n_rows} rows")
            rows = slice(rows % self._n_rows, rows % self._n_rows + 1)
        start, stop, step = rows.indices(self._n_rows)
        if step != 1 or stop <= start:
            raise ValueError(f"rows are read in runs of at least one: corpus[start:stop]; got {rows}")
        return self._packed(start, stop) if self.layout == "packed" else self._padded(start, stop)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows in order, `batch_size` at a time; the last batch has what is left.

        Raises:
            ValueError: batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1; got {batch_size}")
        return (self[start : start + batch_size] for start in range(0, self._n_rows, batch_size))

    def blocks(self) -> Iterator[Batch]:
        """All rows in order, as many at a time as memory does not feel."""
        return self.batches(max(1, BLOCK // self.length))

    @property
    def padding_tokens(self) -> int:
        """Places of all rows that hold no token."""
        return 0 if self.layout == "packed" else self._n_rows * self.length - int(self._size.sum())

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, separators included."""
        return self._n_rows * self.length - self.padding_tokens

    @cached_property
    def sha256(self) -> str:
        """Hash of the rows: their number and length, then each row's ids and mask (8 and 1 bytes, little-endian)."""
        digest = hashlib.sha256(np.array([self._n_rows, self.length], "<i8").tobytes())
        for batch in self.blocks():
            for ids, mask in zip(batch.ids, batch.mask, strict=True):
                digest.update(ids.astype("<i8").tobytes() + mask.astype("u1").tobytes())
        return digest.hexdigest()

    @property
    def left_out(self) -> str:
        """What of the documents is in no row, or was cut, in words; nothing where all is there, each in one piece."""
        said = {
            f"{self.tail_tokens} token(s) of the tail fill no row": self.tail_tokens,
            f"{self.truncated_tokens} token(s) of {self.truncated_documents} document(s) truncated":
                self.truncated_tokens,
            f"{self.split_documents} document(s) split over rows": self.split_documents,
            f"{self.skipped_documents} document(s) without tokens skipped": self.skipped_documents,
        }  # fmt: skip
        return "; ".join(text for text, n in said.items() if n)

    @property
    def attrs(self) -> dict[str, Any]:
        """What a trace says of the corpus that it was recorded on."""
        return {
            "corpus": repr(self), "corpus_sha256": self.sha256, "corpus_layout": self.layout,
            "corpus_separator": -1 if self.separator is None else self.separator, "corpus_left_out": self.left_out,
        }  # fmt: skip

    def __repr__(self) -> str:
        how = f"separator {self.separator}" if self.layout == "packed" else f"{self.padding_tokens:,} of them padding"
        left = f"; {self.left_out}" if self.left_out else ""
        return (
            f"Corpus({self.source}: {self.n_documents:,} document(s), {self.layout} into {self._n_rows:,} row(s) of"
            f" {self.length:,} tokens, {how}{left})"
        )

    # -- reading rows --------------------------------------------------------------------------------------------

    def _packed(self, start: int, stop: int) -> Batch:
        at = np.arange(start * self.length, stop * self.length)
        of = np.searchsorted(self._start, at, side="right") - 1
        position = at - self._start[of]
        within = position < self._size[of]  # beyond: the separator
        document, position = np.where(within, self._document[of], -1), np.where(within, position, -1)
        ids = self._flat[at[0] : at[-1] + 1].astype(np.int64)
        shape = stop - start, self.length
        return Batch(
            start, ids.reshape(shape), np.ones(shape, np.int64), document.reshape(shape), position.reshape(shape),
            self.tokenizer,
        )  # fmt: skip

    def _padded(self, start: int, stop: int) -> Batch:
        rows, place = slice(start, stop), np.arange(self.length)
        first, size = self._start[rows, None], self._size[rows, None]
        within = place < size
        ids = np.where(within, self._flat[np.where(within, first + place, first)], 0).astype(np.int64)
        document = np.where(within, self._document[rows, None], -1)
        position = np.where(within, self._offset[rows, None] + place, -1)
        return Batch(start, ids, within.astype(np.int64), document, position, self.tokenizer)


def _spooled(
    given: Iterable[Document], tokenizer: Any, layout: _Layout, flat: Spool, rows: tuple[Spool, ...],
    step: Callable[[str], None],
) -> _Counts:  # fmt: skip
    """Every document's tokens in `flat`; in `rows` where each row (packed: document) starts, its tokens, its document
    and its first token's index there."""
    counts = _Counts()
    for number, document in enumerate(given):
        ids = token_ids(document, tokenizer)
        if isinstance(document.content, str):
            counts.tokenised, counts.unknown = counts.tokenised + len(ids), counts.unknown + n_unknown(ids, tokenizer)
        step("")
        if not len(ids):
            _skip(document.place, layout, counts)
            continue
        if layout.separator is not None and counts.documents:
            flat.write([layout.separator])
            counts.largest = max(counts.largest, layout.separator)
        counts.documents, counts.largest = counts.documents + 1, max(counts.largest, int(ids.max()))
        for offset, part in _parts(ids, layout, document.place, counts):
            for spool, value in zip(rows, (flat.size, len(part), number, offset), strict=True):
                spool.write([value])
            flat.write(part)
            counts.longest = max(counts.longest, len(part))
    if not counts.documents:
        left = f" but {counts.skipped_documents} without tokens, which were skipped" if counts.skipped_documents else ""
        raise ValueError(f"no documents{left}")
    return counts


def _skip(place: str, layout: _Layout, counts: _Counts) -> None:
    if layout.empty == "error":
        raise ValueError(
            f'{place} has no tokens: an empty sequence cannot be recorded; empty="skip" leaves such documents out,'
            " counted"
        )
    counts.skipped_documents += 1


def _parts(
    ids: Int[np.ndarray, " token"], layout: _Layout, place: str, counts: _Counts
) -> Iterator[tuple[int, Int[np.ndarray, " part"]]]:
    """A document in pieces that fit a row, each with its first token's index."""
    length = layout.length
    if layout.name == "packed" or length is None or len(ids) <= length:
        yield 0, ids
    elif layout.long == "truncate":
        counts.truncated_documents += 1
        counts.truncated_tokens += len(ids) - length
        yield 0, ids[:length]
    elif layout.long == "split":
        counts.split_documents += 1
        yield from ((start, ids[start : start + length]) for start in range(0, len(ids), length))
    else:
        raise ValueError(
            f"{place} has {len(ids)} tokens, more than length={length}: say what becomes of such documents,"
            ' long="split" (into several rows) or long="truncate" (their ends are left out, counted)'
        )


def corpus(
    source: Any, *, tokenizer: Any = None, layout: str | None = None, length: int | None = None,
    separator: int | None = None, long: str | None = None, empty: str = "error", field: str | None = None,
    sample_by: str = "document", glob: str | None = None, progress: bool = False,
) -> Corpus:  # fmt: skip
    """Read documents once, and lay their tokens out in rows.

    Args:
        source: a path of a UTF-8 text file, a JSONL file (.jsonl, .ndjson) or a folder of these, searched to its depth
            in the order of paths, hidden files left out; or any iterable of strings, of sequences of token ids, or of
            mappings such as the rows of a Hugging Face dataset. It is read to its end: cut what has none with
            `itertools.islice`.
        tokenizer: see `mp.load_tokenizer`; not needed for token ids. Each document is tokenised by itself.
        layout: "packed": documents joined, with a separator between them, and cut into rows of `length` tokens, the
            tail that fills no row left out and counted; or "padded": one document a row, padded on the right. There
            is no default.
        length: tokens of a packed row; of a padded one the most there may be (None: the longest document's).
        separator: token id between packed documents; None is the tokenizer's eos_token_id, where it has one.
        long: of padded documents longer than `length`: "error" (None is this), "split" into several rows, "truncate".
        empty: of documents without tokens: "error" or "skip".
        field: which field of a JSONL line or of a mapping is the document.
        sample_by: what one document of a text file is: all of it ("document") or a "line" that is not blank.
        glob: which files of a folder; None is all, and then each must be text or JSONL by its name.
        progress: a bar, on a terminal (stderr) or in a notebook.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no layout; what is missing, or does not belong to the layout; what cannot be read as documents, with
            its file and line; no documents; too few tokens for one row.

    >>> rows = corpus([[1, 2, 3], [4, 5]], layout="packed", length=2, separator=0)
    >>> rows
    Corpus(a list: 2 document(s), packed into 3 row(s) of 2 tokens, separator 0)
    >>> rows[:].ids.tolist(), rows[:].document.tolist()
    ([[1, 2], [3, 0], [4, 5]], [[0, 0], [0, -1], [1, 1]])
    >>> corpus([[1, 2, 3], [4, 5]], layout="padded")[1].mask.tolist()
    [[1, 1, 0]]
    """
    checked = _checked(layout, length, separator, long, empty, tokenizer)
    given = documents(source, field=field, sample_by=sample_by, glob=glob)
    return Corpus(given, tokenizer, checked, named(source), progress)


def _checked(
    layout: str | None, length: int | None, separator: int | None, long: str | None, empty: str, tokenizer: Any
) -> _Layout:
    if layout is None:
        raise ValueError(
            'say how documents become rows: layout="packed" (joined with a separator, cut into rows of length tokens)'
            ' or layout="padded" (one document a row)'
        )
    for name, value, known in (("layout", layout, LAYOUTS), ("long", long or "error", LONG), ("empty", empty, EMPTY)):
        if value not in known:
            raise unknown_name(name, value, known)
    for name, value, least in (("length", length, 1), ("separator", separator, 0)):
        if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} is a whole number of at least {least}; got {value!r}")
    if layout == "padded":
        if separator is not None:
            raise ValueError(f'separator={separator} stands between packed documents; layout="padded" has one a row')
        return _Layout(layout, length, None, long or "error", empty)
    if length is None:
        raise ValueError('layout="packed" cuts documents into rows: say of how many tokens, length=...')
    if long is not None:
        raise ValueError(f'long={long!r} is of padded documents: layout="packed" has documents of any length')
    separator = getattr(tokenizer, "eos_token_id", None) if separator is None else separator
    if separator is None:
        raise ValueError(
            'layout="packed" joins documents with a separator, and no tokenizer says which (eos_token_id): pass'
            " separator=..., a token id"
        )
    return _Layout(layout, int(length), int(separator), "error", empty)
