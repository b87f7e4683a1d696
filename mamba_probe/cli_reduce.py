"""`mamba-probe reduce`: what the scans of a model execute on a corpus, by class of token, without a trace."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mamba_probe.cli_options import BACKEND, MODEL, OUT, OVERWRITE, SEED, TOKENIZER, Backend
from mamba_probe.cli_steps import answered, out, progress

__all__ = ["reduce_command"]

RESULT, PICTURE = "reduction.nc", "reduction.png"
BINS = range(-20, 7)
"""Edges of log2 delta: a millionth to 64."""


class Layout(StrEnum):
    """How documents become rows."""

    packed = "packed"
    padded = "padded"


class Long(StrEnum):
    """What becomes of padded documents that are longer than a row."""

    error = "error"
    split = "split"  # pyright: ignore[reportAssignmentType]
    truncate = "truncate"


class By(StrEnum):
    """Classes of tokens."""

    none = "none"
    text = "text"


@answered
def reduce_command(
    model: MODEL,
    text: Annotated[Path, typer.Option(help="A text file (UTF-8), a JSONL file, or a folder of these.")],
    layout: Annotated[Layout, typer.Option(help="packed: documents joined and cut into rows. padded: one a row.")],
    out_dir: OUT,
    tokenizer: TOKENIZER = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a packed row; of a padded one at most.")] = None,
    field: Annotated[str | None, typer.Option(help="Field of a JSONL line that holds the text.")] = None,
    glob: Annotated[str | None, typer.Option(help="Files of a folder, as '**/*.txt'; default: all.")] = None,
    sample_by: Annotated[str, typer.Option(help="A document of a text file: all of it (document), or a line.")]
    = "document",
    separator: Annotated[int | None, typer.Option(min=0, help="Token id between packed documents; default: EOS.")]
    = None,
    long: Annotated[Long | None, typer.Option(help="Of padded documents above --length; default: error.")] = None,
    by: Annotated[By, typer.Option(help="Classes: text has first tokens of rows, newlines, punctuation.")] = By.text,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a model call.")] = 8,
    twin: Annotated[bool, typer.Option("--twin", help="The randomised twin beside it: an untrained model's.")] = False,
    overwrite: OVERWRITE = False,
    seed: SEED = 0,
    backend: BACKEND = Backend.auto,
) -> None:  # fmt: skip
    """Step sizes and memory horizons over a whole corpus, by class of token, with intervals; no trace is stored.

    Writes DIR/reduction.nc and reduction.png. Broken off, it goes on where it was with the same command.

    Example:

      mamba-probe reduce DIRECTORY --text notes/ --layout packed --length 1024 -o sizes
    """
    from mamba_probe import corpus, reduce
    from mamba_probe.cli_recording import or_else_no_model, quiet_transformers
    from mamba_probe.loading import load, load_tokenizer
    from mamba_probe.probe import attach
    from mamba_probe.run import randomised_twin
    from mamba_probe.trace.store import check_free, save

    quiet_transformers()
    path = check_free(out_dir / RESULT, overwrite)
    with progress() as say:
        say(f"loading {model}")
        with or_else_no_model(model):
            loaded = load(model)
        words = load_tokenizer(tokenizer or model)
        say(f"reading {text}")
        rows = corpus(
            text, tokenizer=words, layout=layout.value, length=length, separator=separator, field=field, glob=glob,
            sample_by=sample_by, long=None if long is None else long.value,
        )  # fmt: skip
    out.print(repr(rows), highlight=False, soft_wrap=True)
    found = None
    for name, each in ([("twin", randomised_twin(loaded, seed))] if twin else []) + [("model", loaded)]:
        with attach(each, backend=backend.value) as probe:
            found = probe.reduce(
                rows, [reduce.mean("delta", seed=seed), reduce.histogram("delta", bins=BINS, seed=seed),
                       reduce.horizon(seed=seed)],
                by=None if by is By.none else by.value, batch_size=batch_size, baseline=found,
                checkpoint=out_dir / f"{name}.partial.npz", progress=True,
            )  # fmt: skip
    assert found is not None  # the model is the last of the two
    save(found, path, overwrite=overwrite)
    reduce.draw(found).savefig(out_dir / PICTURE, dpi=160)
    for name in ("twin", "model"):
        (out_dir / f"{name}.partial.npz").unlink(missing_ok=True)  # what broken-off calls left
    out.print(str(path), str(out_dir / PICTURE), sep="\n", highlight=False, soft_wrap=True)
