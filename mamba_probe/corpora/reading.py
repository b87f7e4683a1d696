"""Documents from wherever a user has them: text files, JSONL, folders of these, any iterable; one after another."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mamba_probe.trace.contract import nearest, unknown_name

__all__ = ["SAMPLE_BY", "Document", "check_known", "documents", "n_unknown", "named", "token_ids"]

JSONL = (".jsonl", ".ndjson")
TEXT = (".txt", ".text", ".md", ".rst")
SAMPLE_BY = ("document", "line")
LARGEST = 2**31 - 1
"""Largest token id that is kept."""
UNKNOWN = 0.01
"""Share of tokens that the tokenizer does not know, above which it is said."""
_ADDED = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
"""Tokens that a tokenizer may add to a text."""
CONVERT = "convert it first, as in `iconv -f latin1 -t utf-8 FILE > NEW` with the encoding that it has"


class Document(NamedTuple):
    """A text or token ids, and where it came from, for an error to say."""

    content: Any
    place: str


def named(source: Any) -> str:
    """A source in words: its path, or what kind of iterable it is."""
    return str(source) if isinstance(source, str | PathLike) else f"a {type(source).__name__}"


def documents(
    source: Any, *, field: str | None = None, sample_by: str = "document", glob: str | None = None
) -> Iterator[Document]:
    """Documents of `source`, in order: a folder's files by path, a file's lines from its first.

    Args:
        source: a path of a text file, a JSONL file or a folder of them; or an iterable of strings, of sequences of
            token ids, or of mappings that hold either under `field`.
        field: of a JSONL line or a mapping.
        sample_by: what is one document of a text file: the whole file ("document"), or each line that is not blank.
        glob: which files of a folder to read; None is all, and then each must be text or JSONL by its name.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: what cannot be read as documents, with its file and line.
    """
    if sample_by not in SAMPLE_BY:
        raise unknown_name("sample_by", sample_by, SAMPLE_BY)
    if isinstance(source, str | PathLike):
        for path in _files(Path(source).expanduser(), glob):
            yield from _jsonl(path, field) if path.suffix.lower() in JSONL else _text(path, sample_by)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        if glob is not None:
            raise ValueError(f"glob={glob!r} says which files of a folder to read; got {named(source)}")
        for i, item in enumerate(source):
            yield _taken(item, field, f"document {i}")
    else:
        hint = "; of several splits, name one: splits['train']" if isinstance(source, Mapping) else ""
        raise ValueError(
            "a corpus is read from a path, or an iterable of strings, of token ids or of mappings; got"
            f" {named(source)}{hint}"
        )


def _files(path: Path, glob: str | None) -> list[Path]:
    if path.is_file():
        if glob is not None:
            raise ValueError(f"glob={glob!r} says which files of a folder to read; {path} is a file")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder at {path}: a string is a path; pass texts as a list, ['...']")
    below = (file for file in path.rglob(glob or "*") if file.is_file())
    files = sorted(file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts))
    strange = [file for file in files if file.suffix.lower() not in (*JSONL, *TEXT)] if glob is None else []
    if strange:
        known = ", ".join((*TEXT, *JSONL))
        raise ValueError(
            f"{strange[0]} is neither text nor JSONL by its name ({known}): say which files of the folder to read,"
            " glob='**/*.txt'"
        )
    if not files:
        raise ValueError(f"no documents: {path} holds no file{f' that matches {glob!r}' if glob else ''}")
    return files


def _text(path: Path, sample_by: str) -> Iterator[Document]:
    found = False
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if sample_by == "document":
                yield Document(file.read(), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield Document(line.rstrip("\r\n"), f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}; {CONVERT}") from error
    if not found:
        raise ValueError(f"{path} is empty: it holds no line that is not blank")


def _jsonl(path: Path, field: str | None) -> Iterator[Document]:
    """Blank lines are no documents."""
    found = False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 text: {error}; {CONVERT}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON: {error}") from error
            if not isinstance(item, dict):
                raise ValueError(f"{place} is no JSON object with fields, but {type(item).__name__}")
            found = True
            yield _taken(item, field, place)
    if not found:
        raise ValueError(f"{path} is empty: it holds no line that is not blank")


def _taken(item: Any, field: str | None, place: str) -> Document:
    """A document: itself, or what a mapping holds under `field`."""
    if not isinstance(item, Mapping):
        return Document(item, place)
    if field is None:
        raise ValueError(f"{place} has fields {sorted(map(str, item))}: say which holds the text, field=...")
    if field not in item:
        raise ValueError(f"{place} has no field {field!r}: {nearest(field, sorted(map(str, item)))}")
    return Document(item[field], f"{place}, field {field!r}")


def token_ids(document: Document, tokenizer: Any) -> Int[np.ndarray, " token"]:
    """Token ids of a document, as the tokenizer gives them for it alone.

    Raises:
        ValueError: a text without a tokenizer or that no tokenizer takes; ids that are no sequence of whole numbers.

    >>> token_ids(Document([3, 1], "here"), None).tolist()
    [3, 1]
    """
    content, place = document
    content = _tokenised(content, tokenizer, place) if isinstance(content, str) else content
    try:
        ids = np.asarray(content)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{place} is neither a string nor a sequence of token ids: {error}") from error
    if not ids.size and ids.ndim == 1:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{place} is neither a string nor a sequence of token ids, but {type(content).__name__}"
            f" of {ids.dtype} with {ids.ndim} dimension(s)"
        )
    if ids.min() < 0 or ids.max() > LARGEST:
        bad = ids[(ids < 0) | (ids > LARGEST)][0]
        raise ValueError(f"{place} holds {bad}, which is no token id: those are 0..{LARGEST}")
    return ids.astype(np.int64)


def _tokenised(text: str, tokenizer: Any, place: str) -> Any:
    if not callable(tokenizer):
        got = "" if tokenizer is None else f"; got tokenizer={tokenizer!r}"
        raise ValueError(f"text needs tokenizer=mp.load_tokenizer(...): the one the model was trained with{got}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no text that UTF-8 can hold: {error}") from error
    found: Any = tokenizer(text)
    return found["input_ids"]


def n_unknown(ids: Any, tokenizer: Any) -> int:
    """How many of a text's ids are the tokenizer's unknown token; 0 where it has none, or adds the same to a text.

    >>> class Words:
    ...     unk_token_id = 0
    >>> n_unknown([3, 0, 0], Words()), n_unknown([3, 0, 0], None)
    (2, 0)
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in [getattr(tokenizer, name, None) for name in _ADDED]:
        return 0
    return int((np.asarray(ids) == unknown).sum())


def check_known(n: int, n_tokens: int, place: str) -> None:
    """Warn where more than UNKNOWN of a text's tokens are the tokenizer's unknown token.

    Args:
        n: unknown tokens.
        n_tokens: all tokens.
        place: where the text came from.

    Raises:
        ValueError: all are.

    >>> check_known(1, 1000, "notes.txt")
    >>> check_known(8, 8, "notes.txt")
    Traceback (most recent call last):
    ...
    ValueError: notes.txt: all 8 tokens are the tokenizer's unknown token: is it the one the model was trained with?
    """
    ask = "is it the one the model was trained with?"
    if n and n == n_tokens:
        raise ValueError(f"{place}: all {n:,} tokens are the tokenizer's unknown token: {ask}")
    if n > UNKNOWN * n_tokens:
        share = f"{n:,} of {n_tokens:,} tokens ({n / n_tokens:.1%})"
        warnings.warn(f"{place}: {share} are the tokenizer's unknown token: {ask}", stacklevel=2)
