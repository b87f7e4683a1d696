"""Writing results: tables as CSV and Markdown, figures, and the page."""

from os import PathLike
from pathlib import Path

from mamba_probe.analyses.common import style
from mamba_probe.reproduce.claim import PAPER, Claim, Result
from mamba_probe.reproduce.table import readable, sentence, write_csv

__all__ = ["check_free", "clear", "files_of", "write"]

SUFFIXES = ("csv", "md", "png", "svg")


def files_of(name: str) -> list[str]:
    """Return the names of the files of a claim.

    >>> files_of("haar")
    ['haar.csv', 'haar.md', 'haar.png', 'haar.svg']
    """
    return [f"{name}.{suffix}" for suffix in SUFFIXES]


def check_free(directory: str | PathLike[str], names: list[str], overwrite: bool) -> None:
    """Refuse a directory that holds results of any of these claims, unless overwriting.

    Raises:
        ValueError: a file in the place of the directory, or results that are there.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"{directory} is a file: -o names a directory")
    taken = [path.name for path in _there(directory, names)]
    if taken and not overwrite:
        raise ValueError(
            f"{directory} holds an earlier result ({', '.join(taken)}): pass --overwrite, or choose another"
        )


def clear(directory: Path, names: list[str]) -> None:
    """Take away an earlier run's files, so that none stands beside results that it does not belong to."""
    for path in _there(directory, names):
        path.unlink()


def _there(directory: Path, names: list[str]) -> list[Path]:
    wanted = [*(file for name in names for file in files_of(name)), "index.html"]
    return [directory / file for file in wanted if (directory / file).exists()]


def write(claim: Claim, result: Result, directory: str | PathLike[str]) -> list[Path]:
    """Write DIRECTORY/NAME.csv, .md, .png and .svg; the same rows give the same bytes, seconds aside."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table, text, png, svg = (directory / file for file in files_of(claim.name))
    write_csv(table, claim.name, result.rows)
    text.write_text(_markdown(claim, result), encoding="utf-8")
    _draw(claim, result, png, svg)
    return [table, text, png, svg]


def _draw(claim: Claim, result: Result, png: Path, svg: Path) -> None:
    from matplotlib.figure import Figure

    with style.house():
        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        claim.draw(result, figure)
        figure.savefig(png, dpi=140)
        figure.savefig(svg, metadata={"Date": None})


def _markdown(claim: Claim, result: Result) -> str:
    lines = [f"# {claim.title}", "", "## What the paper claims", ""]
    lines += [
        f"{PAPER}, abstract: {claim.paper}" if claim.paper else f"Nothing: {PAPER} does not claim it in its abstract."
    ]
    lines += ["", "## What we constructed and measured (ours)", "", claim.ours, "", f"{sentence(result.rows)}.", ""]
    lines += ["Found:", "", *(f"- {each}" for each in result.says), ""] if result.says else []
    for table in readable(result.rows):
        lines += [f"### {table.heading}", "", "; ".join(f"{name}: {said}" for name, said in table.shared), ""]
        lines += [_line(table.columns), _line(["---"] * len(table.columns)), *map(_line, table.cells), ""]
        lines += [*(f"- {letter}: {said}" for letter, said in table.notes), ""] if table.notes else []
    if result.left_out:
        lines += ["## Left out, and limits", "", *(f"- {each}" for each in result.left_out), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
