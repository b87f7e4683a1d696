"""Associative recall solved by planted weights: every mixer, several key codes, filler, and keys that come again."""

from functools import partial
from itertools import product
from typing import Any

import torch

from mamba_probe.constructions import Construction, mqar, mqar_gated
from mamba_probe.reproduce.accuracy import accuracy_rows
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.mqar_figure import draw
from mamba_probe.reproduce.table import Cell, Criterion
from mamba_probe.tasks import mqar as task_of

__all__ = ["MQAR", "cells"]

SIZES = "Every query answered"
RANDOM = "Random keys and values of +1 and -1"
FILLER = "Filler that is any token"
PLAIN = "S4D without the antisymmetric kernel: taps and features of one sign"
AGAIN = "Keys that come again: 24 pairs over 8 keys, the last value asked"

GRID = ((4, 64, 128, 64), (8, 64, 256, 32), (16, 128, 512, 16), (32, 256, 1024, 8), (64, 512, 2048, 4))
"""Pairs, tokens, vocabulary, sequences."""
LARGEST = {"mamba1": 2048, "mamba2": 2048, "s4d": 512}
"""Largest vocabulary of each mixer here."""
BOTH = 512
"""Largest vocabulary in both precisions; float32 beyond."""
EXACT = Criterion("=", 1)
CODES = ("one-hot", "constant-weight")


def cells() -> tuple[Cell, ...]:
    """Return the tables as data."""
    return (*_sizes(), *_random(), *_plain(), *_filler(), *_again())


def _sizes() -> list[Cell]:
    return [
        Cell(
            SIZES, "recall", EXACT,
            {"mixer": mixer, "n_keys": vocab // 2, "n_values": vocab // 2, "key_code": code, "dtype": dtype},
            {"batch": batch, "length": length, "n_pairs": n_pairs, "vocab": vocab}, _null(mixer, code, vocab),
        )
        for mixer, code, (n_pairs, length, vocab, batch), dtype in product(LARGEST, CODES, GRID, ("float32", "float64"))
        if vocab <= LARGEST[mixer] and (vocab <= BOTH or dtype == "float32")
    ]  # fmt: skip


def _null(mixer: str, code: str, vocab: int) -> str:
    return "chance" if mixer == "mamba1" and code == "one-hot" and vocab > BOTH else "twin"


def _random() -> list[Cell]:
    enough, few = Criterion(">=", 0.97), Criterion("<", 0.97, must_fail=True)
    grid = [(16, 16, few), (16, 32, enough), (16, 64, enough), (64, 64, few), (64, 128, enough), (64, 256, enough)]
    return [
        Cell(
            RANDOM, "recall", criterion,
            {
                "mixer": mixer, "n_keys": 4096, "n_values": 4096, "key_code": "random", "bits": (bits, 32),
                "seed": 0, "dtype": "float32",
            },
            {"batch": 256 // n_pairs, "length": 4 * n_pairs, "n_pairs": n_pairs, "vocab": 8192}, "chance",
        )
        for mixer, (n_pairs, bits, criterion) in product(("mamba1", "mamba2"), grid)
    ] + [
        Cell(
            RANDOM, "recall", criterion,
            {
                "mixer": "s4d", "n_keys": 512, "n_values": 512, "key_code": "random", "bits": (bits, 16), "seed": 0,
                "dtype": "float32",
            },
            {"batch": 24, "length": 64, "n_pairs": 8, "vocab": 1024}, "chance",
        )
        for bits, criterion in ((16, few), (64, enough))
    ]  # fmt: skip


def _plain() -> list[Cell]:
    build = {"mixer": "s4d", "n_keys": 128, "n_values": 128, "dtype": "float32"}
    task = {"batch": 32, "length": 64, "n_pairs": 8, "vocab": 256}
    return [
        Cell(PLAIN, "plain kernel", Criterion("<", 0.5, must_fail=True), build | {"key_code": "one-hot"}, task),
        Cell(PLAIN, "recall", EXACT, build | {"key_code": "one-hot"}, task),
    ]


def _same_sign(**build: Any) -> Construction:
    """Let each channel of S4D add its key and its value, on both tokens: a value before a key is written too."""
    construction = mqar(**build)
    weights = dict(construction.model.named_parameters())
    with torch.no_grad():
        for name in ("in_proj.weight", "conv1d.weight"):
            weights[f"backbone.layers.0.mixer.{name}"].abs_()
    return construction


def _filler() -> list[Cell]:
    lost, found = Criterion("<", 1, must_fail=True), []
    for code, (n_pairs, length, vocab, batch) in product(CODES, ((4, 64, 128, 128), (16, 128, 512, 32))):
        build = {"n_keys": vocab // 2, "n_values": vocab // 2, "key_code": code, "dtype": "float32"}
        task = {"batch": batch, "length": length, "n_pairs": n_pairs, "vocab": vocab, "filler": "random"}
        gated = build | {"n_pairs": n_pairs, "length": length}
        found += [Cell(FILLER, "recall", lost, build | {"mixer": mixer}, task) for mixer in ("mamba1", "s4d")]
        found.append(Cell(FILLER, "gated", EXACT, gated, task))
    return found


def _again() -> list[Cell]:
    task = {"batch": 64, "length": 96, "n_pairs": 24, "vocab": 128, "n_keys": 8}
    kinds = (
        ("mamba1", "add"),
        ("mamba2", "add"),
        ("s4d", "add"),
        ("mamba1", "last"),
        ("mamba2", "last"),
        ("mamba1", "overwrite"),
    )
    return [
        Cell(
            AGAIN, "recall", Criterion("<", 0.5, must_fail=True) if writes == "add" else EXACT,
            {"mixer": mixer, "n_keys": 64, "n_values": 64, "writes": writes, "dtype": dtype}, task,
        )
        for (mixer, writes), dtype in product(kinds, ("float32", "float64"))
    ]  # fmt: skip


def _named(cell: Cell) -> str:
    code = cell.build.get("key_code", "one-hot")
    if code == "random":
        return "random codes of {} and {} bits".format(*cell.build["bits"])
    if cell.table == AGAIN:
        return WRITES[cell.build["writes"]]
    return f"{code} keys" + {"gated": ", gated by position", "plain kernel": ", one sign"}.get(cell.how, "")


WRITES = {"add": "writes add", "last": "writes shrink older ones", "overwrite": "writes overwrite"}

_SHOWN = {"n_pairs": "pairs", "length": "T", "vocab": "vocab"}
_measure = partial(accuracy_rows, task_of=task_of, named=_named, shown=_SHOWN)

MQAR = Claim(
    name="mqar",
    title="Associative recall (MQAR)",
    paper=(
        "There are analytical solutions to the MQAR associative recall task using the Mamba architecture with different"
        " mixers: Mamba, Mamba-2 and S4D."
    ),
    ours=(
        "One-layer language models with planted weights answer every query of the MQAR task: each mixer with one-hot"
        " keys and with constant-weight codes, which need few states; random codes, right up to chance; writing gated"
        " by position, for random filler; and keys that come again, where adding must fail and forgetting helps."
    ),
    cells=cells,
    measures={
        "recall": partial(_measure, builder=mqar), "gated": partial(_measure, builder=mqar_gated),
        "plain kernel": partial(_measure, builder=_same_sign),
    },
    draw=draw,
    caption=(
        "Left: accuracy, Wilson intervals, and the null of each model as a black mark; hatched bars must fail; where"
        " every query is answered, the largest size of each kind stands for all. Right: states a channel and channels"
        " of the layer against the keys of the vocabulary: what Mamba holds in states, S4D holds in channels."
    ),
    left_out=(
        "S4D beyond vocabulary 512: it takes key bits times value bits in channels, 61,440 at vocabulary 8,192.",
        "Vocabulary 8,192 with one-hot keys in Mamba-1 (4,096 states a channel) takes more time than is meant here.",
        "The twin of one-hot Mamba-1 beyond vocabulary 512, and of random codes: chance stands in its place.",
    ),
)  # fmt: skip
