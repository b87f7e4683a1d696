"""One self-contained HTML page: what the paper claims, and apart from it what we constructed and measured."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mamba_probe.pages import Table, picture, read_template
from mamba_probe.pages import write_page as write
from mamba_probe.provenance import versions
from mamba_probe.reproduce.claim import PAPER, Claim, Result
from mamba_probe.reproduce.table import AS_IT_MUST, FAILS, HOLDS, Readable, Row, count, readable, sentence, text

__all__ = ["write_page"]

MARKS = {HOLDS: "holds", AS_IT_MUST: "must", FAILS: "fails"}
MOST_TOLD = 12
"""Rows that the text of a figure has; the tables below it have all."""
NUMBER = re.compile(r"[-+]?\d")


def write_page(pairs: Sequence[tuple[Claim, Result]], directory: Path) -> Path:
    """Write DIRECTORY/index.html from results whose figures are there; it needs no other file."""
    rows = [row for _, result in pairs for row in result.rows]
    contents = [("found", "In short"), *((claim.name, claim.title) for claim, _ in pairs), ("provenance", "Provenance")]
    return write(
        directory / "index.html", read_template("reproduce.html"), paper=PAPER, said=sentence(rows), contents=contents,
        title=f"The claims of {PAPER}, reproduced by mamba_probe",
        sections=[_section(claim, result, directory) for claim, result in pairs],
        provenance=Table("What the numbers depend on", ["of the run", "value"], _provenance(pairs), sortable=False),
    )  # fmt: skip


def _section(claim: Claim, result: Result, directory: Path) -> dict[str, Any]:
    """A claim: what is said of it, its figure, its tables each with what its rows share and what its letters mean."""
    tables = [
        {"shared": each.shared, "notes": each.notes,
         "table": Table(each.heading, each.columns, each.cells, _numbers(each), MARKS)}
        for each in readable(result.rows)
    ]  # fmt: skip
    shown = picture(directory / f"{claim.name}.png", claim.title, described(claim, result))
    return {
        "claim": claim, "said": sentence(result.rows), "failed": count(result.rows)[FAILS], "tables": tables,
        "picture": shown, "left_out": result.left_out, "says": result.says,
    }  # fmt: skip


def described(claim: Claim, result: Result) -> str:
    """What the figure of a claim shows, in words and numbers, for who does not see it."""
    told = "; ".join(_told(row) for row in result.rows[:MOST_TOLD])
    more = len(result.rows) - MOST_TOLD
    rest = f"; {more} more in the tables below" if more > 0 else ""
    return f"{claim.title}. {claim.caption} {sentence(result.rows)}. In numbers: {told}{rest}."


def _told(row: Row) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in row.sizes.items())
    known = {"null": text(row.null, near_one=False), "interval": f"{text(row.low)} to {text(row.high)}"}
    said = "; ".join(f"{what} {value}" for what, value in known.items() if value.strip(" to"))
    where = f" at {sizes}" if sizes else ""
    return f"{row.what}, {row.mixer}{where}: {row.quantity} {text(row.value)}{f' ({said})' if said else ''}"


def _numbers(table: Readable) -> list[str]:
    """The columns of a table whose cells all begin with a number."""
    cells = {name: [line[at] for line in table.cells if line[at]] for at, name in enumerate(table.columns)}
    return [name for name, found in cells.items() if found and all(NUMBER.match(cell) for cell in found)]


def _provenance(pairs: Sequence[tuple[Claim, Result]]) -> list[tuple[str, str]]:
    """What the numbers depend on."""
    dtypes = sorted({row.dtype for _, result in pairs for row in result.rows})
    seeds = sorted({result.seed for _, result in pairs})
    seconds = ", ".join(f"{claim.name} {result.seconds:.0f}" for claim, result in pairs)
    return [
        ("versions", ", ".join(f"{name} {found}" for name, found in versions().items())),
        ("seed", f"{', '.join(map(str, seeds))} of every draw; the twins' is one more"),
        ("dtype", f"{', '.join(dtypes)}, as each row says"),
        ("device", f"cpu, {torch.get_num_threads()} threads"),
        ("seconds", f"{seconds} (measurements, figures left out)"),
        ("created at", datetime.now(UTC).isoformat(timespec="seconds")),
    ]
