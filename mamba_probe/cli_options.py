"""Arguments and options that commands share: one meaning and one help text each."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mamba_probe import cli_completing as completing

__all__ = [
    "ANALYSES",
    "BACKEND",
    "BATCH_SIZE",
    "BESIDE",
    "COMPRESS",
    "FORCE",
    "LENGTH",
    "LOAD_MODELS",
    "MAX_MEMORY",
    "MODEL",
    "OUT",
    "OVERWRITE",
    "PAIRS",
    "RESUME",
    "ROWS",
    "RUN",
    "SEED",
    "TASK",
    "TEXT",
    "TOKENIZER",
    "TRAINED_ON",
    "Backend",
    "Compression",
    "Task",
    "What",
]


class Task(StrEnum):
    """Tasks that can be generated."""

    mqar = "mqar"


class What(StrEnum):
    """Claims that can be reproduced."""

    haar = "haar"
    keep = "keep"
    mqar = "mqar"
    induction = "induction"
    trained_keep = "trained-keep"
    trained_recall = "trained-recall"
    trained_analyses = "trained-analyses"
    all = "all"


class Backend(StrEnum):
    """Backends of the scan."""

    auto = "auto"
    cpu = "cpu"
    naive = "naive"
    triton = "triton"


class Compression(StrEnum):
    """Compressions of a Zarr store."""

    zstd = "zstd"
    lz4 = "lz4"


MODEL = Annotated[
    str,
    typer.Argument(
        help="zoo:NAME, a directory (transformers or state-spaces format), or a hub id.",
        autocompletion=completing.models,
    ),
]
RUN = Annotated[Path, typer.Argument(help="What `record` or `report` wrote.", autocompletion=completing.runs)]
OUT = Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")]
TASK = Annotated[Task | None, typer.Option(help="Record on a generated task, whose answers are known.")]
TEXT = Annotated[Path | None, typer.Option(help="Record on a text file (UTF-8), cut into rows of --length tokens.")]
TOKENIZER = Annotated[str | None, typer.Option(help="Directory or hub id of the tokenizer; default: MODEL's own.")]
ROWS = Annotated[
    int | None, typer.Option(min=1, help="Rows: of the task (default 64), of the text at most (default 4).")
]
LENGTH = Annotated[int | None, typer.Option(min=1, help="Tokens a row: of the task (default 64), of the text (512).")]
PAIRS = Annotated[int, typer.Option(min=1, help="Key-value pairs in a row of mqar.")]
SEED = Annotated[int, typer.Option(help="Seed of the task, the randomised twin and the intervals.")]
BESIDE = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing.references,
        help="With --task, a reference recorded and measured beside MODEL: construction:KIND (mamba1, mamba2, s4d: the"
        " task's closed form at MODEL's vocabulary), whatever MODEL can be, or none. Default: what MODEL's card names.",
    ),
]
TRAINED_ON = Annotated[
    int | None,
    typer.Option("--train-length", min=1, help="Tokens of the rows MODEL was trained on. Default: what its card says."),
]
ANALYSES = Annotated[
    str,
    typer.Option(
        autocompletion=completing.analyses,
        help="Analyses of the report: main (the three), all that the run has what it needs for, or names with commas"
        " between; `mamba-probe analyze --help` has them.",
    ),
]
LOAD_MODELS = Annotated[
    bool,
    typer.Option(
        "--load-models",
        help="Load a run's model again from the directory or hub id that the run itself names, for measures that need"
        " it. This reads that directory, or the network. Without it only zoo:NAME and construction:KIND are loaded.",
    ),
]
RESUME = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that DIR holds, recorded with the same options.")
]
MAX_MEMORY = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of tensors on their way to disk, as 8GB or 512MiB; default 1GiB.")
]
BATCH_SIZE = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of a forward call, and of a block, which is on disk whole or not at all."),
]
COMPRESS = Annotated[Compression | None, typer.Option(help="Compress the traces, without loss.")]
FORCE = Annotated[bool, typer.Option("--force", help="Begin although the disk will not hold all of it.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what the directory holds of an earlier run.")]
BACKEND = Annotated[Backend, typer.Option(help="Backend of our scan; `mamba-probe doctor` says what auto is here.")]
