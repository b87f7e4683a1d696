"""Corpora: rows against a brute-force layout, whatever the documents come from; refusals; what a recording says."""

import hashlib
import json
import struct

import numpy as np
import pytest

import mamba_probe as mp
from mamba_probe.corpora import Corpus
from mamba_probe.inputs import checked_input


class Letters:
    """A tokenizer of single letters: a..z are 1..26, anything else 27."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) - 96 if "a" <= c <= "z" else 27 for c in text]}

    def convert_ids_to_tokens(self, ids):
        return ["<eos>" if i == 0 else chr(96 + i) if i < 27 else "?" for i in ids]


class Known(Letters):
    """Which says that 27 is its unknown token."""

    unk_token_id = 27


TOKENS = Letters()
DOCUMENTS = ["abc", "de", "fghijklm", "n", "opqr"]


def brute_packed(rows_of_ids, length, separator):
    """Token by token: (id, document, position) of every place, cut into rows."""
    flat = []
    for number, ids in enumerate(rows_of_ids):
        if number:
            flat.append((separator, -1, -1))
        flat += [(token, number, at) for at, token in enumerate(ids)]
    n = len(flat) // length
    return np.array(flat[: n * length]).reshape(n, length, 3), len(flat) - n * length


def brute_hash(batch):
    """As documented, with struct in place of numpy."""
    text = struct.pack("<2q", *batch.ids.shape)
    for ids, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True):
        text += struct.pack(f"<{len(ids)}q", *ids) + bytes(mask)
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("length", [1, 3, 5, 7, 21])
def test_packed_rows_are_those_of_a_layout_by_hand(length):
    made = mp.corpus(DOCUMENTS, tokenizer=TOKENS, layout="packed", length=length)
    want, tail = brute_packed([TOKENS(text)["input_ids"] for text in DOCUMENTS], length, 0)
    assert (len(made), made.length, made.tail_tokens) == (len(want), length, tail)
    whole = made[:]
    found = np.stack([whole.ids, whole.document, whole.document_position], axis=-1)
    np.testing.assert_array_equal(found, want)
    assert whole.mask.all()
    assert made.n_tokens == want.shape[0] * length
    assert (f"{tail} token(s) of the tail" in repr(made)) == (tail > 0)
    for size in (1, 2, 100):
        np.testing.assert_array_equal(np.concatenate([batch.ids for batch in made.batches(size)]), want[..., 0])
        np.testing.assert_array_equal(np.concatenate([batch.document for batch in made.batches(size)]), want[..., 1])
    assert made.sha256 == brute_hash(whole)


@pytest.mark.parametrize("long", ["split", "truncate"])
def test_padded_rows_of_long_documents(long):
    made = mp.corpus(DOCUMENTS, tokenizer=TOKENS, layout="padded", length=3, long=long)
    rows = [("abc", 0, 0), ("de", 1, 0), ("fgh", 2, 0)]
    rows += [("ijk", 2, 3), ("lm", 2, 6)] if long == "split" else []
    rows += [("n", 3, 0), ("opq", 4, 0)] + ([("r", 4, 3)] if long == "split" else [])
    assert len(made) == len(rows)
    whole = made[:]
    for i, (text, document, first) in enumerate(rows):
        n = len(text)
        assert whole.mask[i].tolist() == [1] * n + [0] * (3 - n)
        assert whole.ids[i].tolist() == TOKENS(text)["input_ids"] + [0] * (3 - n)
        assert whole.document[i].tolist() == [document] * n + [-1] * (3 - n)
        assert whole.document_position[i].tolist() == [*range(first, first + n)] + [-1] * (3 - n)
        assert whole.token_text[i].tolist() == list(text) + [""] * (3 - n)
    said = "2 document(s) split" if long == "split" else "6 token(s) of 2 document(s) truncated"
    assert said in made.left_out
    assert made.padding_tokens == int((whole.mask == 0).sum())
    assert made.sha256 == brute_hash(whole)


def test_a_corpus_is_read_again_with_the_same_rows_also_from_an_iterator(tmp_path):
    made = mp.corpus((text for text in DOCUMENTS), tokenizer=TOKENS, layout="packed", length=4)
    once, twice = ([batch.ids.tolist() for batch in made] for _ in range(2))
    assert once == twice
    assert made[2].ids.tolist() == once[2]
    assert made[-1].ids.tolist() == once[-1]
    path = tmp_path / "notes.txt"
    path.write_text("abcdef")
    read = mp.corpus(path, tokenizer=TOKENS, layout="padded")
    path.write_text("zzz")
    assert read[0].ids.tolist() == [[1, 2, 3, 4, 5, 6]], "what was read is kept"


def test_every_source_gives_the_same_rows(tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(DOCUMENTS) + "\r\n \n")
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "ids.jsonl").write_text(
        "\n\n".join(json.dumps({"text": TOKENS(text)["input_ids"]}) for text in DOCUMENTS)
    )
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("".join(DOCUMENTS[1:2]))
    (folder.parent / "a.txt").write_text("\ufeff" + DOCUMENTS[0], encoding="utf-8")
    (folder.parent / ".hidden").write_text("zzz")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[2:]))
    options = {"tokenizer": TOKENS, "layout": "packed", "length": 4}
    want = mp.corpus(DOCUMENTS, **options).sha256
    for made in (
        mp.corpus(tmp_path / "lines.txt", sample_by="line", **options),
        mp.corpus(str(tmp_path / "one.jsonl"), field="text", **options),
        mp.corpus(tmp_path / "ids.jsonl", field="text", layout="packed", length=4, separator=0),
        mp.corpus(folder.parent, field="text", **options),
        mp.corpus([{"text": text} for text in DOCUMENTS], field="text", **options),
        mp.corpus([np.array(TOKENS(text)["input_ids"]) for text in DOCUMENTS], **options),
        mp.corpus(iter([tuple(TOKENS(text)["input_ids"]) for text in DOCUMENTS]), **options),
    ):
        assert made.sha256 == want, repr(made)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    only = mp.corpus(folder.parent, glob="**/*.txt", **options)
    assert only.n_documents == 2


def test_the_separator_the_hash_and_the_layout_tell_corpora_apart():
    options = {"tokenizer": TOKENS, "length": 4}
    hashes = {
        mp.corpus(DOCUMENTS, layout="packed", **options).sha256,
        mp.corpus(DOCUMENTS, layout="packed", separator=5, **options).sha256,
        mp.corpus(DOCUMENTS, layout="padded", long="split", **options).sha256,
        mp.corpus(DOCUMENTS, layout="padded", long="truncate", **options).sha256,
        mp.corpus(DOCUMENTS[::-1], layout="packed", **options).sha256,
    }
    assert len(hashes) == 5


def test_empty_documents_are_refused_or_skipped_and_counted():
    with pytest.raises(ValueError, match=r'document 1 has no tokens.*empty="skip"'):
        mp.corpus(["abc", "", "de"], tokenizer=TOKENS, layout="padded")
    made = mp.corpus(["abc", "", "de"], tokenizer=TOKENS, layout="padded", empty="skip")
    assert made.skipped_documents == 1
    assert "1 document(s) without tokens skipped" in repr(made)
    assert made[:].document[:, 0].tolist() == [0, 2], "numbers are those of the documents as given"


BAD_FILES = {
    "empty.txt": b"",
    "blank.jsonl": b"\n  \n",
    "latin.txt": "caf\u00e9 ol\u00e9".encode("latin-1"),
    "latin.jsonl": b'{"text": "abc"}\n{"text": "caf\xe9"}\n',
    "broken.jsonl": b'{"text": "abc"}\n\n{"text": "de\n',
    "list.jsonl": b'{"text": "abc"}\n[1, 2]\n',
    "other.jsonl": b'{"text": "abc"}\n{"txt": "de"}\n',
    "number.jsonl": b'{"text": 3.5}\n',
    "null.jsonl": b'{"text": null}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
    "digits.jsonl": b'{"text": ' + b"1" * 10_000 + b"}\n",
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty.txt", r"empty\.txt has no tokens"),
        ("blank.jsonl", r"blank\.jsonl is empty"),
        ("latin.txt", r"latin\.txt is not UTF-8 text.*position 3"),
        ("latin.jsonl", r"latin\.jsonl line 2 is not UTF-8"),
        ("broken.jsonl", r"broken\.jsonl line 3 is not JSON"),
        ("list.jsonl", r"list\.jsonl line 2 is no JSON object with fields, but list"),
        ("other.jsonl", r"other\.jsonl line 2 has no field 'text'.*'txt'"),
        ("number.jsonl", r"number\.jsonl line 1, field 'text' is neither a string nor"),
        ("null.jsonl", r"null\.jsonl line 1, field 'text' is neither"),
        ("surrogate.jsonl", r"surrogate\.jsonl line 1, field 'text' is no text that UTF-8"),
        ("deep.jsonl", r"deep\.jsonl line 1 is not JSON"),
        ("digits.jsonl", r"digits\.jsonl line 1 is not JSON"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, words):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(ValueError, match=words):
        mp.corpus(tmp_path / name, tokenizer=TOKENS, layout="padded", field="text")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (["ab"], {}, r'say how documents become rows: layout="packed"'),
        (["ab"], {"layout": "pack"}, r"unknown layout 'pack': did you mean 'packed'"),
        (["ab"], {"layout": "packed"}, r"say of how many tokens, length="),
        (["ab"], {"layout": "packed", "length": 0}, r"length is a whole number of at least 1; got 0"),
        (["ab"], {"layout": "packed", "length": True}, r"length is a whole number"),
        (["ab"], {"layout": "packed", "length": 2, "separator": -1}, r"separator is a whole number of at least 0"),
        (["ab"], {"layout": "packed", "length": 2, "long": "split"}, r"long='split' is of padded documents"),
        (["ab"], {"layout": "padded", "separator": 0}, r"separator=0 stands between packed documents"),
        (["ab"], {"layout": "padded", "long": "cut"}, r"unknown long 'cut'"),
        (["ab"], {"layout": "padded", "empty": "drop"}, r"unknown empty 'drop'"),
        (["ab"], {"layout": "padded", "sample_by": "word"}, r"unknown sample_by 'word'"),
        (["ab"], {"layout": "padded", "glob": "*.txt"}, r"glob='\*\.txt' says which files"),
        (["abcd"], {"layout": "padded", "length": 3}, r"document 0 has 4 tokens, more than length=3.*long=\"split\""),
        (["ab"], {"layout": "packed", "length": 9}, r"2 token\(s\) of a list do not fill one row of 9"),
        ([], {"layout": "padded"}, r"no documents"),
        ([""], {"layout": "padded", "empty": "skip"}, r"no documents but 1 without tokens"),
        ([[1, -2]], {"layout": "padded"}, r"document 0 holds -2, which is no token id"),
        ([[1, 2**31]], {"layout": "padded"}, r"holds 2147483648, which is no token id"),
        ([[1.5]], {"layout": "padded"}, r"document 0 is neither a string nor a sequence of token ids"),
        ([[True]], {"layout": "padded"}, r"document 0 is neither a string nor"),
        ([[[1], [2]]], {"layout": "padded"}, r"document 0 is neither.*2 dimension"),
        ([{"text": "ab"}], {"layout": "padded"}, r"document 0 has fields \['text'\]: say which"),
        ({"train": ["ab"]}, {"layout": "padded"}, r"got a dict; of several splits, name one"),
        (7, {"layout": "padded"}, r"read from a path, or an iterable.*got a int"),
        (b"ab", {"layout": "padded"}, r"got a bytes"),
    ],
)
def test_bad_input_is_answered_in_words(source, options, words):
    with pytest.raises(ValueError, match=words):
        mp.corpus(source, tokenizer=TOKENS, **options)


def test_missing_things(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder at the cat sat: a string is a path"):
        mp.corpus("the cat sat", tokenizer=TOKENS, layout="padded")
    with pytest.raises(ValueError, match=r"no documents: .* holds no file"):
        mp.corpus(tmp_path, tokenizer=TOKENS, layout="padded")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png is neither text nor JSONL by its name"):
        mp.corpus(tmp_path, tokenizer=TOKENS, layout="padded")
    with pytest.raises(ValueError, match=r"holds no file that matches"):
        mp.corpus(tmp_path, tokenizer=TOKENS, layout="padded", glob="*.txt")
    with pytest.raises(ValueError, match=r"text needs tokenizer=mp\.load_tokenizer"):
        mp.corpus(["ab"], layout="padded")
    with pytest.raises(ValueError, match=r"got tokenizer='gpt-neox'"):
        mp.corpus(["ab"], layout="padded", tokenizer="gpt-neox")
    with pytest.raises(ValueError, match="no tokenizer says which"):
        mp.corpus([[1, 2]], layout="packed", length=2)
    with pytest.raises(ValueError, match="token_text needs the tokenizer"):
        mp.corpus([[1, 2]], layout="padded")[:].token_text  # noqa: B018
    made = mp.corpus([[1, 2]], layout="padded")
    with pytest.raises(IndexError, match="row 1 of a corpus of 1 rows"):
        made[1]
    with pytest.raises(ValueError, match="read in runs"):
        made[::2]
    with pytest.raises(ValueError, match="batch_size is at least 1"):
        made.batches(0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_recording_of_a_corpus_is_that_of_its_rows(model, layout):
    options = {"length": 5} if layout == "packed" else {}
    made = mp.corpus(DOCUMENTS, tokenizer=TOKENS, layout=layout, **options)
    with mp.attach(model) as probe:
        trace = probe.record(made, batch_size=2)
        plain = probe.record(made[:].ids, made[:].mask, batch_size=2)
        assert probe.losses(made)["loss"].sizes["batch"] == len(made), "what takes ids takes a corpus"
    for name in plain.data_vars:
        np.testing.assert_array_equal(trace[name].values, plain[name].values)
    for name in ("document", "document_position", "token_text"):
        np.testing.assert_array_equal(trace[name].values, getattr(made[:], name))
    assert trace.attrs["corpus_sha256"] == made.sha256
    np.testing.assert_array_equal(trace["valid"].values, made[:].mask == 1)


def test_pieces_come_by_their_number_and_lazily(model):
    made = mp.corpus(DOCUMENTS, tokenizer=TOKENS, layout="packed", length=3)
    assert made.sha256
    read = []
    Corpus.__getitem__, plain = lambda self, rows: (read.append(rows), plain(self, rows))[1], Corpus.__getitem__
    try:
        given = checked_input(model, 24, made, None, None, None)
        pieces = given.pieces(2)
        assert not read, "nothing was read yet"
        assert next(pieces)["input_ids"].tolist() == plain(made, slice(0, 2)).ids.tolist()
        assert read == [slice(0, 2)]
        last = given.spans(2)[-1]
        assert given.piece(last)["input_ids"].tolist() == plain(made, last).ids.tolist()
    finally:
        Corpus.__getitem__ = plain
    assert (given.batch, given.length) == (len(made), 3)
    assert given.sha256 == made.sha256


def test_an_id_that_the_model_does_not_know_is_named_before_anything_runs(model):
    made = mp.corpus([[1, 2], [3, 61]], layout="padded")
    with (
        mp.attach(model) as probe,
        pytest.raises(ValueError, match=r"token id 61 at row 1, token 1 is out of range: this model knows 0\.\.60"),
    ):
        probe.record(made)
    with mp.attach(model) as probe, pytest.raises(ValueError, match="a corpus brings its own attention mask"):
        probe.record(made, np.ones((2, 2)))


def test_memory_does_not_grow_with_the_corpus(monkeypatch):
    import tracemalloc

    monkeypatch.setattr("mamba_probe.corpora.layout.BLOCK", 512)  # so that the smaller corpus has many

    def peak(n):
        tracemalloc.start()
        try:
            made = mp.corpus(([i % 60 for i in range(j % 50 + 1)] for j in range(n)), layout="packed", length=64,
                             separator=60)  # fmt: skip
            assert made.sha256
            return tracemalloc.get_traced_memory()[1], len(made)
        finally:
            tracemalloc.stop()

    peak(400)
    (small, few), (large, many) = peak(400), peak(4000)
    assert many > 9 * few
    assert large < small + 80_000, (small, large)  # a bar keeps 1000 times; 32 bytes a document would be seen


# -- what the tokenizer does not know -----------------------------------------------------------------------------


def read_as_text(text, tokenizer):
    with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        return probe.record(text=[text], tokenizer=tokenizer, variables=["delta"])


def read_as_corpus(text, tokenizer):
    return mp.corpus([text[:40], text[40:]], tokenizer=tokenizer, layout="packed", length=8)


@pytest.mark.parametrize("read", [read_as_text, read_as_corpus])
def test_unknown_tokens_are_counted_and_said(read):
    read("a" * 98 + "b?", Known())  # 1 of 100: not above the share
    with pytest.warns(UserWarning, match=r"2 of 100 tokens \(2.0%\) are the tokenizer's unknown token"):
        read("a" * 98 + "??", Known())
    with pytest.raises(ValueError, match="all 60 tokens are the tokenizer's unknown token"):
        read("A" * 60, Known())
    read("A" * 60, TOKENS)  # has no unknown token, as far as it says


def test_a_token_that_is_added_to_texts_is_no_unknown_one():
    shared = Known()
    shared.eos_token_id = 27  # as in GPT-NeoX's
    read_as_corpus("A" * 60, shared)
